//! The same attention over packed rows, with its gradient: what training runs.
//!
//! Rows are those of the fused projection, `[q | k | v]`; prefixes may lie before them, as stored rows `[k | v]`. The forward pass
//! puts K and V into pages and runs the kernel that serves, so both give the same bits.
pub mod device;
mod gradient;
mod on_device;

use super::super::kv_write::{Part, kv_write};
use super::{Attention, KvLayout, PAGE, Plan, PrefixAttention, SequenceView};
use crate::ops::Machine;
use crate::ops::slice;
pub use on_device::PackedOnDevice;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Where the rows of one sequence are. Rows of K and V count from the first stored one on: the stored prefixes of all jobs, then
/// those of the projection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedSequence {
    /// Its rows of q.
    pub queries: Range<usize>,
    /// Rows of K and V that it attends to in full; sequences may share them.
    pub prefix: Range<usize>,
    /// Its own rows of K and V: those of its queries.
    pub own: Range<usize>,
}

/// Which rows attend to which.
pub struct PackedPlan {
    /// In the order of their queries, which cover q.
    pub sequences: Vec<PackedSequence>,
    /// Shape of a row of K, and of V.
    pub layout: KvLayout,
    /// Query heads.
    pub heads: usize,
}

/// `qkv` `[m, (heads + 2 * kv_heads) * head_dim]` and the rows before it, `stored` `[stored, 2 * kv_heads * head_dim]`, K then V ->
/// `[m, heads * head_dim]`, differentiable in both.
pub fn packed_attention(
    qkv: &Tensor,
    stored: Option<&Tensor>,
    plan: &Arc<PackedPlan>,
    attention: Attention,
    machine: &Arc<Machine>,
) -> Result<Tensor> {
    let op = Packed { plan: plan.clone(), attention, machine: machine.clone() };
    match stored {
        Some(stored) => qkv.apply_op2(stored, op),
        None => qkv.apply_op1(op),
    }
}

struct Packed {
    plan: Arc<PackedPlan>,
    attention: Attention,
    machine: Arc<Machine>,
}

/// Rows as they come: stored ones `[k | v]`, then `[q | k | v]`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    qkv: &'a [f32],
    stored: &'a [f32],
}

impl PackedPlan {
    /// Elements of a row of q, and of one of K.
    fn widths(&self) -> (usize, usize) {
        (self.heads * self.layout.head_dim, self.layout.kv_heads * self.layout.head_dim)
    }

    /// K and V of a row `[k | v]`: whether it is stored, and its first element there or in the projection.
    fn place(&self, row: usize, stored: usize) -> (bool, usize) {
        let (q, kv) = self.widths();
        match row.checked_sub(stored) {
            None => (true, row * 2 * kv),
            Some(own) => (false, own * (q + 2 * kv) + q),
        }
    }

    /// `m` rows of q, `n` of K and V, `widths` of each.
    fn check(&self, m: usize, n: usize, widths: [usize; 3]) -> Result<()> {
        let (kv_heads, (q, kv)) = (self.layout.kv_heads, self.widths());
        let want = [q, kv, kv];
        if widths != want || kv_heads == 0 || !self.heads.is_multiple_of(kv_heads) {
            bail!("packed_attention: rows of {widths:?}, the plan has {want:?}");
        }
        let mut next = 0;
        for s in &self.sequences {
            let bounds = s.prefix.start <= s.prefix.end && s.prefix.end <= n && s.own.end <= n;
            if s.queries.start != next || s.queries.len() != s.own.len() || !bounds {
                bail!("packed_attention: {s:?} does not follow query {next} or lies outside {n} rows");
            }
            next = s.queries.end;
        }
        if next != m {
            bail!("packed_attention: {next} queries planned, {m} given");
        }
        Ok(())
    }

    /// Pages for every prefix and every sequence's own rows: the serving plan, and for each page slot its row.
    fn paged(&self) -> (Plan, Vec<(u32, usize)>, usize) {
        let (mut pages, mut slots, mut count) = (Vec::new(), Vec::new(), 0u32);
        let mut table = |rows: &Range<usize>| -> Range<usize> {
            let at = pages.len();
            for (i, row) in rows.clone().enumerate() {
                if i % PAGE == 0 {
                    pages.push(count);
                    count += 1;
                }
                slots.push(((count - 1) * PAGE as u32 + (i % PAGE) as u32, row));
            }
            at..pages.len()
        };
        let mut prefixes: HashMap<Range<usize>, Range<usize>> = HashMap::new();
        let views = self.sequences.iter().map(|s| SequenceView {
            rows: s.queries.clone(),
            first: 0,
            prefix_len: s.prefix.len(),
            prefix_pages: prefixes.entry(s.prefix.clone()).or_insert_with(|| table(&s.prefix)).clone(),
            own_pages: table(&s.own),
        });
        let views: Vec<_> = views.collect();
        (Plan::new(views, pages, self.layout, self.heads), slots, count as usize)
    }
}

impl Packed {
    fn run(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        stored: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (m, width) = layout.shape().dims2()?;
        let (q_width, kv_width) = self.plan.widths();
        let mut rows = Rows { qkv: slice(qkv, layout, "packed_attention")?, stored: &[] };
        let mut count = 0;
        if let Some((stored, layout)) = stored {
            let (n, width) = layout.shape().dims2()?;
            if width != 2 * kv_width {
                bail!("packed_attention: stored rows of {width}, the plan has {}", 2 * kv_width);
            }
            (count, rows.stored) = (n, slice(stored, layout, "packed_attention")?);
        }
        self.plan.check(m, count + m, [width.saturating_sub(2 * kv_width), kv_width, kv_width])?;
        if let Some(s) = self.plan.sequences.iter().find(|s| s.own.start != count + s.queries.start) {
            bail!("packed_attention: own rows of {s:?} are not those of its queries, after {count} stored ones");
        }
        let (plan, slots, pages) = self.plan.paged();
        let KvLayout { kv_heads, head_dim } = self.plan.layout;
        let mut kv = Vec::with_capacity(slots.len() * 2 * kv_width);
        for (_, row) in &slots {
            let (is_stored, at) = self.plan.place(*row, count);
            let from = if is_stored { rows.stored } else { rows.qkv };
            kv.extend_from_slice(&from[at..at + 2 * kv_width]);
        }
        let kv = Tensor::from_vec(kv, (slots.len(), 2 * kv_width), &Device::Cpu)?;
        let slots: Arc<[u32]> = slots.iter().map(|s| s.0).collect();
        let keys = Tensor::zeros((pages.max(1), kv_heads, head_dim, PAGE), DType::F32, &Device::Cpu)?;
        let values = Tensor::zeros((pages.max(1), kv_heads, PAGE, head_dim), DType::F32, &Device::Cpu)?;
        kv_write(&keys, &kv, Part::Key, self.plan.layout, &slots, 0)?;
        kv_write(&values, &kv, Part::Value, self.plan.layout, &slots, kv_width)?;
        let ((keys, keys_l), (values, values_l)) = (keys.storage_and_layout(), values.storage_and_layout());
        let (Storage::Cpu(keys), Storage::Cpu(values)) = (&*keys, &*values) else {
            bail!("packed_attention: pages that are not on the CPU")
        };
        let op = PrefixAttention { plan: Arc::new(plan), attention: self.attention, machine: self.machine.clone() };
        let (out, shape) = op.over::<f32>((qkv, layout), (keys, keys_l), (values, values_l))?;
        debug_assert_eq!(shape.dims(), [m, q_width]);
        Ok((out, shape))
    }

    /// Of qkv, and of the stored rows.
    fn gradients(
        &self,
        qkv: &Tensor,
        stored: Option<&Tensor>,
        out: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let guards = [Some(qkv), stored, Some(out), Some(&dy)].map(|t| t.map(Tensor::storage_and_layout));
        let mut slices = [&[] as &[f32]; 4];
        for (slice_of, guard) in slices.iter_mut().zip(&guards) {
            let Some((storage, layout)) = guard else { continue };
            let Storage::Cpu(storage) = &**storage else { bail!("packed_attention: rows that are not on the CPU") };
            *slice_of = slice(storage, layout, "packed_attention")?;
        }
        let [rows, stored_rows, out, grad] = slices;
        let input = gradient::Input { op: self, rows: Rows { qkv: rows, stored: stored_rows }, out, grad };
        let (d_qkv, d_stored) = input.gradients();
        let d_stored = stored.map(|s| Tensor::from_vec(d_stored, s.shape(), &Device::Cpu)).transpose()?;
        Ok((Tensor::from_vec(d_qkv, qkv.shape(), &Device::Cpu)?, d_stored))
    }
}

impl CustomOp1 for Packed {
    fn name(&self) -> &'static str {
        "packed_attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(qkv, layout, None)
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradients(qkv, None, out, dy)?.0))
    }
}

impl CustomOp2 for Packed {
    fn name(&self) -> &'static str {
        "packed_attention_stored"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout, s: &CpuStorage, sl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(qkv, layout, Some((s, sl)))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        stored: &Tensor,
        out: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_qkv, d_stored) = self.gradients(qkv, Some(stored), out, dy)?;
        Ok((Some(d_qkv), d_stored))
    }
}

#[cfg(test)]
mod tests;
