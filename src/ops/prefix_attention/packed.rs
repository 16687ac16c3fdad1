//! The same attention over packed rows, with its gradient: what training runs.
//!
//! K and V are rows `[n, kv_heads * head_dim]`: the prefixes of all jobs and the own rows of all sequences, in any
//! order. The forward pass puts them into pages and runs the kernel that serves, so both give the same bits.
//!
//! # Gradient
//! With p_j the softmax over the scores s_j = cap(scale q . k_j), o = sum_j p_j v_j and g the gradient of o:
//! dv_j = sum p_j g; ds_j = p_j (g . v_j - g . o); dk_j = sum t_j ds_j scale q; dq = sum_j t_j ds_j scale k_j, where
//! t_j = 1 - (s_j / c)^2 is the slope of the cap (1 without one). Scores are computed again: nothing of the size
//! rows x rows is kept. A prefix that several sequences share gets the sum of their shares, in their order.
use super::super::kv_write::{Part, kv_write};
use super::{Attention, KvLayout, PAGE, Plan, SequenceView, prefix_attention};
use crate::ops::linear::Cpu;
use crate::ops::{Shared, f32_slice, float};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

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
    cpu: &Arc<Cpu>,
) -> Result<Tensor> {
    q.apply_op3(k, v, Packed { plan: plan.clone(), attention, cpu: cpu.clone() })
}

#[derive(Clone)]
struct Packed {
    plan: Arc<PackedPlan>,
    attention: Attention,
    cpu: Arc<Cpu>,
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
            Tensor::from_slice(f32_slice(s, l, "packed_attention")?, (rows, kv_width), &Device::Cpu)
        };
        let rows = Tensor::from_vec(slots.iter().map(|s| s.1 as u32).collect(), slots.len(), &Device::Cpu)?;
        let slots: Arc<[u32]> = slots.iter().map(|s| s.0).collect();
        let keys = Tensor::zeros((pages.max(1), kv_heads, head_dim, PAGE), DType::F32, &Device::Cpu)?;
        let values = Tensor::zeros((pages.max(1), kv_heads, PAGE, head_dim), DType::F32, &Device::Cpu)?;
        kv_write(&keys, &tensor(k, k_l, n)?.index_select(&rows, 0)?, Part::Key, self.plan.layout, &slots, 0)?;
        kv_write(&values, &tensor(v, v_l, n)?.index_select(&rows, 0)?, Part::Value, self.plan.layout, &slots, 0)?;
        let q = Tensor::from_slice(f32_slice(q, q_l, "packed_attention")?, (m, width), &Device::Cpu)?;
        let out = prefix_attention(&q, &keys, &values, &Arc::new(plan), self.attention, &self.cpu)?;
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
        let input = Rows { op: self, q: &q_rows, k: &k_rows, v: &v_rows, out: &out, grad: &grad };
        let (dq, dk, dv) = input.gradients();
        let tensor = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// What the gradient reads: q, out and grad `[m, heads * head_dim]`, k and v `[n, kv_heads * head_dim]`.
struct Rows<'a> {
    op: &'a Packed,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    grad: &'a [f32],
}

/// Shares of one sequence and KV head in the gradient of its prefix: dk, then dv, `[prefix, head_dim]` each.
type PrefixShare = Mutex<Vec<f32>>;

impl Rows<'_> {
    fn gradients(&self) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let plan = &*self.op.plan;
        let KvLayout { kv_heads, head_dim: dim } = plan.layout;
        let (mut dq, mut dk, mut dv) = (vec![0f32; self.q.len()], vec![0f32; self.k.len()], vec![0f32; self.v.len()]);
        let units = plan.sequences.len() * kv_heads;
        let shares: Vec<PrefixShare> = (0..units).map(|_| Mutex::default()).collect();
        let out = [Shared(dq.as_mut_ptr()), Shared(dk.as_mut_ptr()), Shared(dv.as_mut_ptr())];
        self.op.cpu.pool.for_each(units, |unit| {
            let (s, head) = (&plan.sequences[unit / kv_heads], unit % kv_heads);
            let mut part = HeadGradient::new(self, s, head);
            part.run();
            // SAFETY: the queries and the own rows of a sequence, and the heads of a unit, are its alone.
            unsafe { part.store(out) };
            *shares[unit].lock().unwrap_or_else(PoisonError::into_inner) = part.prefix;
        });
        for (unit, share) in shares.into_iter().enumerate() {
            let (s, head) = (&plan.sequences[unit / kv_heads], unit % kv_heads);
            let share = share.into_inner().unwrap_or_else(PoisonError::into_inner);
            let (keys, values) = share.split_at(s.prefix.len() * dim);
            for (i, row) in s.prefix.clone().enumerate() {
                let at = (row * kv_heads + head) * dim;
                dk[at..at + dim].iter_mut().zip(&keys[i * dim..]).for_each(|(d, x)| *d += x);
                dv[at..at + dim].iter_mut().zip(&values[i * dim..]).for_each(|(d, x)| *d += x);
            }
        }
        (dq, dk, dv)
    }
}

/// The gradient of one sequence and KV head, dense.
struct HeadGradient<'a> {
    rows: &'a Rows<'a>,
    sequence: &'a PackedSequence,
    head: usize,
    /// `[queries, group, head_dim]`
    dq: Vec<f32>,
    /// dk, then dv of the own rows, `[own, head_dim]` each.
    own: Vec<f32>,
    /// The same of the prefix.
    prefix: Vec<f32>,
}

impl<'a> HeadGradient<'a> {
    fn new(rows: &'a Rows<'a>, sequence: &'a PackedSequence, head: usize) -> Self {
        let plan = &*rows.op.plan;
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let zeros = |n: usize| vec![0f32; n * dim];
        let (dq, own) = (zeros(sequence.queries.len() * group), zeros(2 * sequence.own.len()));
        HeadGradient { rows, sequence, head, dq, own, prefix: zeros(2 * sequence.prefix.len()) }
    }

    fn run(&mut self) {
        let (plan, s) = (&*self.rows.op.plan, self.sequence);
        let Attention { scale, soft_cap, window, causal } = self.rows.op.attention;
        let (group, dim, kv_heads) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim, plan.layout.kv_heads);
        let (prefix, own) = (s.prefix.len(), s.own.len());
        let row = |j: usize| if j < prefix { s.prefix.start + j } else { s.own.start + j - prefix };
        let kv = |j: usize| (row(j) * kv_heads + self.head) * dim;
        let (mut p, mut slope) = (vec![0f32; prefix + own], vec![1f32; prefix + own]);
        for i in 0..own {
            let position = prefix + i;
            let end = if causal { position + 1 } else { prefix + own };
            let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
            for g in 0..group {
                let at = ((s.queries.start + i) * plan.heads + self.head * group + g) * dim;
                let (q, grad) = (&self.rows.q[at..at + dim], &self.rows.grad[at..at + dim]);
                let correction = dot(grad, &self.rows.out[at..at + dim]);
                let mut most = f32::NEG_INFINITY;
                for j in first..end {
                    let mut score = dot(q, &self.rows.k[kv(j)..][..dim]) * scale;
                    if let Some(cap) = soft_cap {
                        let t = float::tanh(score / cap);
                        (score, slope[j]) = (cap * t, 1.0 - t * t);
                    }
                    p[j] = score;
                    most = most.max(score);
                }
                p[first..end].iter_mut().for_each(|p| *p = float::exp(*p - most));
                let norm = 1.0 / p[first..end].iter().sum::<f32>();
                for j in first..end {
                    let p = p[j] * norm;
                    let ds = p * (dot(grad, &self.rows.v[kv(j)..][..dim]) - correction) * slope[j] * scale;
                    let dq = &mut self.dq[(i * group + g) * dim..][..dim];
                    add_scaled(dq, &self.rows.k[kv(j)..][..dim], ds);
                    let (part, j, len) =
                        if j < prefix { (&mut self.prefix, j, prefix) } else { (&mut self.own, j - prefix, own) };
                    let (keys, values) = part.split_at_mut(len * dim);
                    add_scaled(&mut keys[j * dim..][..dim], q, ds);
                    add_scaled(&mut values[j * dim..][..dim], grad, p);
                }
            }
        }
    }

    /// Writes dq and the own rows of dk and dv to their places.
    ///
    /// # Safety
    /// Nobody else writes this sequence's rows of this head.
    unsafe fn store(&self, [dq, dk, dv]: [Shared<f32>; 3]) {
        let (plan, s) = (&*self.rows.op.plan, self.sequence);
        let (group, dim, kv_heads) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim, plan.layout.kv_heads);
        let (keys, values) = self.own.split_at(s.own.len() * dim);
        let put = |to: Shared<f32>, at: usize, from: &[f32]| {
            // SAFETY: the caller's, and the plan was checked against the rows.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.get().add(at), from.len()) }
        };
        for i in 0..s.own.len() {
            let at = ((s.queries.start + i) * plan.heads + self.head * group) * dim;
            put(dq, at, &self.dq[i * group * dim..][..group * dim]);
            let at = ((s.own.start + i) * kv_heads + self.head) * dim;
            put(dk, at, &keys[i * dim..][..dim]);
            put(dv, at, &values[i * dim..][..dim]);
        }
    }
}

/// 16 partial sums, folded in one order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

#[inline(always)]
fn add_scaled(y: &mut [f32], x: &[f32], by: f32) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x * by);
}

#[cfg(test)]
mod tests;
