//! `embed`: rows of the token table and rows of soft prompts gathered into one packed tensor, and learned positions.
pub mod device;

use super::{Linear, Machine, Vector, make_rows, slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// Where an input row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSource {
    /// A token's row of the table.
    Token(u32),
    /// A row of the batch's soft prompts.
    Soft(u32),
    /// The table's row of the token that the step before chose in this place, which nobody has read: on a GPU alone.
    Sampled(u32),
}

/// The token table `[vocab, hidden]` of a model.
#[derive(Clone)]
pub struct Embedding {
    /// One row a token, shared with a tied head.
    pub table: Linear,
    /// Token rows are multiplied by this (Gemma: sqrt(hidden)); soft rows are not.
    pub scale: f32,
    /// Learned positions `[positions, hidden]`, added to every row, soft ones too.
    pub positions: Option<Vector>,
}

struct Embed {
    embedding: Embedding,
    rows: Vec<RowSource>,
    positions: Arc<[u32]>,
    machine: Arc<Machine>,
}

/// `rows` and their `positions` `[rows]`, `soft` `[num_soft, hidden]` -> `[rows, hidden]` in f32.
pub fn embed(
    embedding: &Embedding,
    soft: &Tensor,
    rows: Vec<RowSource>,
    positions: &Arc<[u32]>,
    machine: &Arc<Machine>,
) -> Result<Tensor> {
    soft.apply_op1(Embed { embedding: embedding.clone(), rows, positions: positions.clone(), machine: machine.clone() })
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, soft: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let soft = slice(soft, layout, "embed")?;
        let Embedding { table, scale, positions } = &self.embedding;
        let Some(table) = table.packed() else { bail!("embed: the table is not on the CPU") };
        let hidden = table.k();
        let (num_soft, width) = layout.shape().dims2()?;
        if width != hidden || self.rows.len() != self.positions.len() {
            let (rows, positions) = (self.rows.len(), self.positions.len());
            bail!("embed: {rows} rows at {positions} positions, soft ones of {width}, the table's of {hidden}");
        }
        let known = |row: &RowSource| match *row {
            RowSource::Token(id) => (id as usize) < table.n(),
            RowSource::Soft(i) => (i as usize) < num_soft,
            RowSource::Sampled(_) => false,
        };
        if let Some(other) = self.rows.iter().find(|row| !known(row)) {
            bail!("embed: {other:?} is out of range ({} tokens, {num_soft} soft rows)", table.n());
        }
        let mut y = make_rows(&self.machine.pool, self.rows.len(), hidden, |first, y| {
            for (row, y) in self.rows[first..].iter().zip(y.chunks_exact_mut(hidden)) {
                match *row {
                    RowSource::Token(id) => {
                        table.row(id as usize, y);
                        if *scale != 1.0 {
                            y.iter_mut().for_each(|y| *y *= scale);
                        }
                    }
                    RowSource::Soft(i) => y.copy_from_slice(&soft[i as usize * hidden..][..hidden]),
                    // Refused above.
                    RowSource::Sampled(_) => {}
                }
            }
        });
        if let Some(learned) = positions {
            for (&p, y) in self.positions.iter().zip(y.chunks_exact_mut(hidden)) {
                let Some(row) = learned.get(p as usize * hidden..(p as usize + 1) * hidden) else {
                    bail!("embed: position {p} is past the table's {}", learned.len() / hidden);
                };
                y.iter_mut().zip(row).for_each(|(y, p)| *y += p);
            }
        }
        Ok((CpuStorage::F32(y), (self.rows.len(), hidden).into()))
    }

    /// Each soft row gets the sum over the rows that are it; the table and the positions are frozen.
    fn bwd(&self, soft: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (num_soft, hidden) = soft.dims2()?;
        let mut gradient = vec![0f32; num_soft * hidden];
        let dy = dy.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        for (row, dy) in self.rows.iter().zip(dy.chunks_exact(hidden)) {
            if let RowSource::Soft(i) = *row {
                gradient[i as usize * hidden..][..hidden].iter_mut().zip(dy).for_each(|(g, d)| *g += d);
            }
        }
        Ok(Some(Tensor::from_vec(gradient, (num_soft, hidden), soft.device())?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn gathers_and_refuses() {
        let machine = Machine::new(1);
        let table = Tensor::new(&[[0f32, 1.], [2., 3.], [4., 5.]], &Device::Cpu).unwrap();
        let table = Linear::new(&[table], &[None], &machine).unwrap();
        let soft = Tensor::new(&[[10f32, 11.]], &Device::Cpu).unwrap();
        let mut embedding = Embedding { table, scale: 1.0, positions: None };
        let rows = vec![RowSource::Token(2), RowSource::Soft(0), RowSource::Token(0)];
        let at: Arc<[u32]> = vec![1, 2, 0].into();
        let y = embed(&embedding, &soft, rows.clone(), &at, &Machine::new(1)).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[4., 5.], [10., 11.], [0., 1.]]);
        let one: Arc<[u32]> = vec![0].into();
        assert!(embed(&embedding, &soft, vec![RowSource::Token(3)], &one, &Machine::new(1)).is_err());
        assert!(embed(&embedding, &soft, vec![RowSource::Soft(1)], &one, &Machine::new(1)).is_err());
        // The scale is for tokens, learned positions for all.
        embedding.scale = 2.0;
        embedding.positions = Some(Vector::new(vec![0.1, 0.2, 100., 200., 1000., 2000.], &machine).unwrap());
        let y = embed(&embedding, &soft, rows.clone(), &at, &Machine::new(1)).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[108., 210.], [1010., 2011.], [0.1, 2.2]]);
        assert!(embed(&embedding, &soft, rows, &vec![1, 2, 3].into(), &Machine::new(1)).is_err());
    }
}
