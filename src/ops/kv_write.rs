//! `kv_write`: new K and V rows into their slots of the pool.
pub mod device;

use super::f32_slice;
use super::prefix_attention::{KvLayout, PAGE};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
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

/// Writes row i of `rows` `[m, width]`, from `column` on, into slot `slots[i]` (page * PAGE + place) of `slab`.
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
        let rows = f32_slice(rows, rows_l, "kv_write")?;
        let (m, width) = rows_l.shape().dims2()?;
        let (heads, dim) = (self.layout.kv_heads, self.layout.head_dim);
        if m != self.slots.len() || self.column + heads * dim > width {
            bail!("kv_write: rows are [{m}, {width}], slots [{}], column {}", self.slots.len(), self.column);
        }
        let (CpuStorage::F32(slab), Some((start, end))) = (slab, slab_l.contiguous_offsets()) else {
            bail!("kv_write: the pool must be contiguous f32");
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
                    Part::Key => source.iter().enumerate().for_each(|(d, v)| head[d * PAGE + place] = *v),
                    Part::Value => head[place * dim..(place + 1) * dim].copy_from_slice(source),
                }
            }
        }
        Ok(())
    }
}
