//! The launch of `kernels/embed.cu`, and of its gradient.
use super::{Embedding, RowSource};
use crate::ops::Vector;
use crate::ops::gpu::{Buffer, DeviceRows, Fresh, Gpu, Grid, KernelOp, View};
use candle_core::{DType, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// That every row is one of the table's or of `num_soft` soft ones, at a position that it has: a launch that was recorded reads rows
/// which nobody has looked at.
///
/// # Errors
/// Names the row or the position.
pub fn check(embedding: &Embedding, rows: &DeviceRows, num_soft: usize) -> Result<()> {
    let (tokens, hidden) = (embedding.table.n(), embedding.table.k());
    let chosen = rows.sampled().map_or(0, |sampled| sampled.bytes() / size_of::<u32>());
    let known = |row: &&RowSource| match **row {
        RowSource::Token(id) => (id as usize) < tokens,
        RowSource::Soft(i) => (i as usize) < num_soft,
        RowSource::Sampled(i) => (i as usize) < chosen,
    };
    if let Some(other) = rows.sources().iter().find(|row| !known(row)) {
        bail!("embed: {other:?} is out of range ({tokens} tokens, {num_soft} soft rows, {chosen} chosen ones)");
    }
    match &embedding.positions {
        Some(learned) if rows.largest_position() as usize >= learned.len() / hidden => {
            bail!("embed: position {} is past the table's {}", rows.largest_position(), learned.len() / hidden)
        }
        _ => Ok(()),
    }
}

struct OnDevice {
    embedding: Embedding,
    rows: Arc<DeviceRows>,
}

/// As [`super::embed`], of rows that are on the device: `soft` `[num_soft, hidden]` f32 -> `[rows, hidden]` in the table's type.
pub fn embed(gpu: &Gpu, embedding: &Embedding, soft: &Tensor, rows: &Arc<DeviceRows>) -> Result<Tensor> {
    gpu.apply1(OnDevice { embedding: embedding.clone(), rows: rows.clone() }, soft)
}

impl KernelOp for OnDevice {
    const NAME: &'static str = "embed";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (soft, Embedding { table, scale, positions }) = (&inputs[0], &self.embedding);
        let Some(matrix) = table.matrix() else { bail!("embed: the table is not on the device") };
        let (hidden, count) = (matrix.k(), self.rows.len());
        let (num_soft, width) = soft.dims2()?;
        if width != hidden || soft.dtype() != DType::F32 {
            bail!("embed: soft rows are [{num_soft}, {width}] of {:?}, the table's [{hidden}]", soft.dtype());
        }
        check(&self.embedding, &self.rows, num_soft)?;
        let learned = positions.as_ref().and_then(Vector::buffer);
        let mut y = gpu.fresh(matrix.dtype(), count * hidden)?;
        let (source, position) = (self.rows.source(), self.rows.position());
        let call = gpu.call("embed", matrix.dtype()).optional(Some(matrix.buffer())).view(soft).optional(learned);
        let call = call.buffer(source.0, source.1, 4).buffer(position.0, position.1, 4);
        let call = call.optional(self.rows.sampled()).fresh(&mut y);
        let grid = Grid { blocks: [count as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments; every source and position was checked against its table, and tokens are chosen from it.
        unsafe { call.int(hidden).float(*scale).launch(grid)? };
        Ok((y, (count, hidden).into()))
    }

    /// Each soft row gets the sum over the rows that are it; the table and the positions are frozen.
    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let num_soft = inputs[0].dim(0)?;
        let mut of: Vec<Vec<u32>> = vec![Vec::new(); num_soft];
        for (row, source) in (0..).zip(self.rows.sources()) {
            if let RowSource::Soft(i) = *source {
                of[i as usize].push(row);
            }
        }
        let mut lists = vec![0u32];
        lists.extend(of.iter().scan(0, |end, rows| {
            *end += rows.len() as u32;
            Some(*end)
        }));
        lists.extend(of.into_iter().flatten());
        Ok(vec![Some(gpu.apply1(Back { lists: Buffer::new(gpu, &lists)?, num_soft }, dy)?)])
    }
}

/// dy `[rows, hidden]` -> `[num_soft, hidden]` in f32.
struct Back {
    /// `[starts | rows]`
    lists: Buffer,
    num_soft: usize,
}

impl KernelOp for Back {
    const NAME: &'static str = "embed_backward";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (dy, n) = (&inputs[0], self.num_soft);
        let hidden = dy.dims2()?.1;
        let mut dsoft = gpu.fresh(DType::F32, n * hidden)?;
        let call = gpu.call("embed_backward", dy.dtype()).view(dy).buffer(&self.lists, 0, 4);
        let call = call.buffer(&self.lists, n + 1, 4).fresh(&mut dsoft).int(hidden);
        // SAFETY: the kernel's arguments; the lists name rows of dy.
        unsafe { call.launch(Grid { blocks: [n as u32, 1, 1], threads: 128, shared: 0 })? };
        Ok((dsoft, (n, hidden).into()))
    }
}
