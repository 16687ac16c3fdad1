//! The same attention over packed rows, with its gradient: what training runs.
//!
//! K and V are rows `[n, kv_heads * head_dim]`: the prefixes of all jobs and the own rows of all sequences, in any
//! order. The forward pass puts them into pages and runs the kernel that serves, so both give the same bits.
pub mod device;
mod gradient;
mod on_device;

use super::super::kv_write::{Part, kv_write};
use super::{Attention, KvLayout, PAGE, Plan, SequenceView, prefix_attention};
use crate::ops::Machine;
use crate::ops::slice;
pub use on_device::PackedOnDevice;

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Where the rows of one sequence are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedSequence {
    /// Its rows of q.
    pub queries: Range<usize>,
    /// Rows of K and V that it attends to in full; sequences may share them.
    pub prefix: Range<usize>,
    /// Its own rows of K and V, as many as queries.
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

/// q `[m, heads * head_dim]`, k and v `[n, kv_heads * head_dim]` -> `[m, heads * head_dim]`, differentiable in all three.
pub fn packed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    plan: &Arc<PackedPlan>,
    attention: Attention,
    machine: &Arc<Machine>,
) -> Result<Tensor> {
    q.apply_op3(k, v, Packed { plan: plan.clone(), attention, machine: machine.clone() })
}

#[derive(Clone)]
struct Packed {
    plan: Arc<PackedPlan>,
    attention: Attention,
    machine: Arc<Machine>,
}

impl PackedPlan {
    fn check(&self, m: usize, n: usize, widths: [usize; 3]) -> Result<()> {
        let KvLayout { kv_heads, head_dim } = self.layout;
        let want = [self.heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
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

impl CustomOp3 for Packed {
    fn name(&self) -> &'static str {
        "packed_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_l: &Layout,
        k: &CpuStorage,
        k_l: &Layout,
        v: &CpuStorage,
        v_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, width), (n, kv_width)) = (q_l.shape().dims2()?, k_l.shape().dims2()?);
        self.plan.check(m, n, [width, kv_width, v_l.shape().dims2()?.1])?;
        let (plan, slots, pages) = self.plan.paged();
        let KvLayout { kv_heads, head_dim } = self.plan.layout;
        let tensor = |s, l, rows: usize| {
            Tensor::from_slice(slice::<f32>(s, l, "packed_attention")?, (rows, kv_width), &Device::Cpu)
        };
        let rows = Tensor::from_vec(slots.iter().map(|s| s.1 as u32).collect(), slots.len(), &Device::Cpu)?;
        let slots: Arc<[u32]> = slots.iter().map(|s| s.0).collect();
        let keys = Tensor::zeros((pages.max(1), kv_heads, head_dim, PAGE), DType::F32, &Device::Cpu)?;
        let values = Tensor::zeros((pages.max(1), kv_heads, PAGE, head_dim), DType::F32, &Device::Cpu)?;
        kv_write(&keys, &tensor(k, k_l, n)?.index_select(&rows, 0)?, Part::Key, self.plan.layout, &slots, 0)?;
        kv_write(&values, &tensor(v, v_l, n)?.index_select(&rows, 0)?, Part::Value, self.plan.layout, &slots, 0)?;
        let q = Tensor::from_slice(slice::<f32>(q, q_l, "packed_attention")?, (m, width), &Device::Cpu)?;
        let out = prefix_attention(&q, &keys, &values, &Arc::new(plan), self.attention, &self.machine)?;
        Ok((CpuStorage::F32(out.flatten_all()?.to_vec1()?), (m, width).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let flat = |t: &Tensor| t.contiguous()?.flatten_all()?.to_vec1::<f32>();
        let (q_rows, k_rows, v_rows, out, grad) = (flat(q)?, flat(k)?, flat(v)?, flat(out)?, flat(grad)?);
        let input = gradient::Rows { op: self, q: &q_rows, k: &k_rows, v: &v_rows, out: &out, grad: &grad };
        let (dq, dk, dv) = input.gradients();
        let tensor = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

#[cfg(test)]
mod tests;
