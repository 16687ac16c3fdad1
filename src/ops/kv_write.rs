//! `kv_write`: new K and V rows into their slots of the pool.
pub mod device;

use super::prefix_attention::{Element, KvLayout, PAGE};
use super::slice;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// Which of the two slabs is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `[pages, kv_heads, head_dim, PAGE]`.
    Key,
    /// `[pages, kv_heads, PAGE, head_dim]`.
    Value,
}

struct KvWrite {
    part: Part,
    layout: KvLayout,
    slots: Arc<[u32]>,
    /// First element of the part within a row of the source.
    column: usize,
}

/// Writes row i of `rows` `[m, width]`, from `column` on, into slot `slots[i]` (page * PAGE + place) of `slab`,
/// rounded to the slab's type: f32, bf16 or f16.
pub fn kv_write(
    slab: &Tensor,
    rows: &Tensor,
    part: Part,
    layout: KvLayout,
    slots: &Arc<[u32]>,
    column: usize,
) -> Result<()> {
    slab.inplace_op2(rows, &KvWrite { part, layout, slots: slots.clone(), column })
}

impl InplaceOp2 for KvWrite {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(&self, slab: &mut CpuStorage, slab_l: &Layout, rows: &CpuStorage, rows_l: &Layout) -> Result<()> {
        let (rows, shape) = (slice(rows, rows_l, "kv_write")?, rows_l.shape().dims2()?);
        match slab.dtype() {
            DType::F32 => self.write::<f32>(slab, slab_l, rows, shape),
            DType::BF16 => self.write::<bf16>(slab, slab_l, rows, shape),
            DType::F16 => self.write::<f16>(slab, slab_l, rows, shape),
            other => bail!("kv_write: the pool is {other:?}, must be f32, bf16 or f16"),
        }
    }
}

impl KvWrite {
    /// `rows` `[m, width]`.
    fn write<S: Element>(
        &self,
        slab: &mut CpuStorage,
        slab_l: &Layout,
        rows: &[f32],
        (m, width): (usize, usize),
    ) -> Result<()> {
        let (heads, dim) = (self.layout.kv_heads, self.layout.head_dim);
        if m != self.slots.len() || self.column + heads * dim > width {
            bail!("kv_write: rows are [{m}, {width}], slots [{}], column {}", self.slots.len(), self.column);
        }
        let (Some(slab), Some((start, end))) = (S::elements(slab), slab_l.contiguous_offsets()) else {
            bail!("kv_write: the pool must be contiguous");
        };
        let slab = &mut slab[start..end];
        let page_len = self.layout.page_len();
        for (row, &slot) in rows.chunks_exact(width).zip(&*self.slots) {
            let (page, place) = (slot as usize / PAGE, slot as usize % PAGE);
            let Some(page) = slab.get_mut(page * page_len..(page + 1) * page_len) else {
                bail!("kv_write: slot {slot} is outside the pool");
            };
            let source = row[self.column..self.column + heads * dim].chunks_exact(dim);
            for (head, source) in page.chunks_exact_mut(dim * PAGE).zip(source) {
                match self.part {
                    Part::Key => {
                        source.iter().enumerate().for_each(|(d, v)| head[d * PAGE + place] = S::nearest(*v));
                    }
                    Part::Value => {
                        let to = &mut head[place * dim..(place + 1) * dim];
                        to.iter_mut().zip(source).for_each(|(to, v)| *to = S::nearest(*v));
                    }
                }
            }
        }
        Ok(())
    }
}
