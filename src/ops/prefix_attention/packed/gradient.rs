//! The gradient of packed attention.
//!
//! With p_j the softmax over the scores s_j = cap(scale q . k_j), o = sum_j p_j v_j and g the gradient of o:
//! dv_j = sum p_j g; ds_j = p_j (g . v_j - g . o); dk_j = sum t_j ds_j scale q; dq = sum_j t_j ds_j scale k_j, where
//! t_j = 1 - (s_j / c)^2 is the slope of the cap (1 without one). Scores are computed again, a block of rows at a time: nothing
//! of the size rows x rows is kept. A prefix that several sequences share gets the sum of their shares, in their order.
use super::super::{Attention, KvLayout};
use super::{Packed, PackedSequence, Rows};
use crate::ops::dense::{Matrix, add_product};
use crate::ops::{Shared, float};
use std::sync::{Mutex, PoisonError};

/// Rows of scores, heads of a group counted, in one block.
const ROWS: usize = 32;
/// Keys are counted in so many: one vector.
const LANES: usize = 16;

/// What the gradient reads: the rows, and out and grad `[m, heads * head_dim]`.
pub(super) struct Input<'a> {
    pub op: &'a Packed,
    pub rows: Rows<'a>,
    pub out: &'a [f32],
    pub grad: &'a [f32],
}

/// Shares of one sequence and KV head in the gradient of its prefix: dk, then dv, `[prefix, head_dim]` each.
type PrefixShare = Mutex<Vec<f32>>;

impl Input<'_> {
    /// Of the projection, and of the stored rows.
    pub(super) fn gradients(&self) -> (Vec<f32>, Vec<f32>) {
        let plan = &*self.op.plan;
        let KvLayout { kv_heads, head_dim: dim } = plan.layout;
        let mut d_stored = vec![0f32; self.rows.stored.len()];
        // Not zeroed: each row is a query and an own row of one sequence.
        let mut d_qkv = Vec::<f32>::with_capacity(self.rows.qkv.len());
        let units = plan.sequences.len() * kv_heads;
        let shares: Vec<PrefixShare> = (0..units).map(|_| Mutex::default()).collect();
        let out = Shared(d_qkv.as_mut_ptr());
        self.op.machine.pool.for_each(units, |unit| {
            let (s, head) = (&plan.sequences[unit / kv_heads], unit % kv_heads);
            let mut part = HeadGradient::new(self, s, head);
            part.run();
            // SAFETY: the queries and the own rows of a sequence, and the heads of a unit, are its alone.
            let share = unsafe { part.store(out) };
            *shares[unit].lock().unwrap_or_else(PoisonError::into_inner) = share;
        });
        // SAFETY: the plan was checked: its sequences cover all rows, and their units all heads of q, K and V.
        unsafe { d_qkv.set_len(self.rows.qkv.len()) };
        let (stored, width) = (self.stored(), kv_heads * dim);
        for (unit, share) in shares.into_iter().enumerate() {
            let (s, head) = (&plan.sequences[unit / kv_heads], unit % kv_heads);
            let share = share.into_inner().unwrap_or_else(PoisonError::into_inner);
            let (keys, values) = share.split_at(s.prefix.len() * dim);
            for (i, row) in s.prefix.clone().enumerate() {
                let (is_stored, at) = plan.place(row, stored);
                let of_row = if is_stored { &mut d_stored } else { &mut d_qkv };
                for (at, share) in [(at + head * dim, keys), (at + width + head * dim, values)] {
                    of_row[at..at + dim].iter_mut().zip(&share[i * dim..]).for_each(|(d, x)| *d += x);
                }
            }
        }
        (d_qkv, d_stored)
    }

    /// Rows before the projection's.
    fn stored(&self) -> usize {
        self.rows.stored.len() / (2 * self.op.plan.widths().1)
    }

    /// K (part 0) or V (part 1) of a row and a head.
    fn key_value(&self, row: usize, part: usize, head: usize) -> &[f32] {
        let (plan, dim) = (&*self.op.plan, self.op.plan.layout.head_dim);
        let (is_stored, at) = plan.place(row, self.stored());
        let from = if is_stored { self.rows.stored } else { self.rows.qkv };
        &from[at + part * plan.widths().1 + head * dim..][..dim]
    }
}

/// The gradient of one sequence and KV head, dense: prefix and own rows are one list of keys.
struct HeadGradient<'a> {
    input: &'a Input<'a>,
    sequence: &'a PackedSequence,
    head: usize,
    /// `[keys, head_dim]`, and transposed `[head_dim, padded]`.
    k: [Vec<f32>; 2],
    /// The same of V.
    v: [Vec<f32>; 2],
    /// Keys, rounded up to whole vectors.
    padded: usize,
    /// `[queries, group, head_dim]`
    dq: Vec<f32>,
    /// `[keys, head_dim]`
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl<'a> HeadGradient<'a> {
    fn new(input: &'a Input<'a>, sequence: &'a PackedSequence, head: usize) -> Self {
        let plan = &*input.op.plan;
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let keys = sequence.prefix.len() + sequence.own.len();
        let padded = keys.next_multiple_of(LANES);
        let gather = |part: usize| {
            let (mut rows, mut turned) = (Vec::with_capacity(keys * dim), vec![0f32; dim * padded]);
            for (j, row) in sequence.prefix.clone().chain(sequence.own.clone()).enumerate() {
                let row = input.key_value(row, part, head);
                rows.extend_from_slice(row);
                row.iter().enumerate().for_each(|(d, x)| turned[d * padded + j] = *x);
            }
            [rows, turned]
        };
        let zeros = |n: usize| vec![0f32; n * dim];
        HeadGradient {
            k: gather(0),
            v: gather(1),
            padded,
            dq: zeros(sequence.queries.len() * group),
            dk: zeros(keys),
            dv: zeros(keys),
            input,
            sequence,
            head,
        }
    }

    fn run(&mut self) {
        let plan = &*self.input.op.plan;
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let (q_width, kv_width) = plan.widths();
        let Attention { window, causal, .. } = self.input.op.attention;
        let (prefix, own) = (self.sequence.prefix.len(), self.sequence.own.len());
        let step = (ROWS / group).max(1);
        let rows = step * group;
        let (mut q, mut grad) = (vec![0f32; rows * dim], vec![0f32; rows * dim]);
        let (mut p, mut ds) = (vec![0f32; rows * self.padded], vec![0f32; rows * self.padded]);
        for start in (0..own).step_by(step) {
            let end = own.min(start + step);
            let rows = (end - start) * group;
            // The heads of a group are neighbours within a row.
            for i in start..end {
                let (row, heads) = (self.sequence.queries.start + i, self.head * group * dim);
                let to = (i - start) * group * dim..(i - start + 1) * group * dim;
                let from = &self.input.rows.qkv[row * (q_width + 2 * kv_width) + heads..];
                q[to.clone()].copy_from_slice(&from[..group * dim]);
                grad[to].copy_from_slice(&self.input.grad[row * q_width + heads..][..group * dim]);
            }
            // Keys that any row of the block sees, in whole vectors.
            let first = window.map_or(0, |w| (prefix + start + 1).saturating_sub(w)) / LANES * LANES;
            let last = if causal { prefix + end } else { prefix + own };
            let width = last.next_multiple_of(LANES) - first;
            let (p, ds) = (&mut p[..rows * width], &mut ds[..rows * width]);
            p.fill(0.0);
            ds.fill(0.0);
            add_product(Matrix::rows(&q, dim), dim, &self.k[1][first..], self.padded, p, width, rows, width);
            add_product(Matrix::rows(&grad, dim), dim, &self.v[1][first..], self.padded, ds, width, rows, width);
            for r in 0..rows {
                let position = prefix + start + r / group;
                let seen = Seen {
                    start: window.map_or(0, |w| (position + 1).saturating_sub(w)) - first,
                    end: if causal { position + 1 } else { prefix + own } - first,
                };
                let at =
                    ((self.sequence.queries.start + start + r / group) * plan.heads + self.head * group + r % group)
                        * dim;
                let (g, out) = (&grad[r * dim..(r + 1) * dim], &self.input.out[at..at + dim]);
                let (p, ds) = (&mut p[r * width..(r + 1) * width], &mut ds[r * width..(r + 1) * width]);
                of_scores(p, ds, seen, self.input.op.attention, g, out);
            }
            let keys = last - first;
            let (k, range) = (&self.k[0][first * dim..], first * dim..last * dim);
            let dq = &mut self.dq[start * group * dim..][..rows * dim];
            add_product(Matrix::rows(ds, width), keys, k, dim, dq, dim, rows, dim);
            let (dk, dv) = (&mut self.dk[range.clone()], &mut self.dv[range]);
            add_product(Matrix::transposed(ds, width), rows, &q, dim, dk, dim, keys, dim);
            add_product(Matrix::transposed(p, width), rows, &grad, dim, dv, dim, keys, dim);
        }
    }

    /// Writes dq and the own rows of dk and dv to their places in `[q | k | v]`; returns those of the prefix.
    ///
    /// # Safety
    /// Nobody else writes this sequence's rows of this head.
    unsafe fn store(mut self, d_qkv: Shared<f32>) -> Vec<f32> {
        let (plan, s) = (&*self.input.op.plan, self.sequence);
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let (q_width, kv_width) = plan.widths();
        let prefix = s.prefix.len() * dim;
        let put = |at: usize, from: &[f32]| {
            // SAFETY: the caller's, and the plan was checked against the rows.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), d_qkv.get().add(at), from.len()) }
        };
        for (i, row) in s.queries.clone().enumerate() {
            let at = row * (q_width + 2 * kv_width);
            put(at + self.head * group * dim, &self.dq[i * group * dim..][..group * dim]);
            put(at + q_width + self.head * dim, &self.dk[prefix + i * dim..][..dim]);
            put(at + q_width + kv_width + self.head * dim, &self.dv[prefix + i * dim..][..dim]);
        }
        self.dk.truncate(prefix);
        self.dk.extend_from_slice(&self.dv[..prefix]);
        self.dk
    }
}

/// Columns of a row of scores that count.
#[derive(Clone, Copy)]
struct Seen {
    start: usize,
    end: usize,
}

simd! {
    /// From q . k and g . v of a row to its p and ds, both 0 for keys that it does not see.
    fn of_scores(p: &mut [f32], ds: &mut [f32], seen: Seen, attention: Attention, grad: &[f32], out: &[f32]) {
        let Attention { scale, soft_cap, .. } = attention;
        let mut sums = [0f32; LANES];
        for (g, o) in grad.chunks(LANES).zip(out.chunks(LANES)) {
            for ((sum, g), o) in sums.iter_mut().zip(g).zip(o) {
                *sum += g * o;
            }
        }
        let correction: f32 = sums.iter().sum();
        let mut most = [f32::NEG_INFINITY; LANES];
        for (i, chunk) in p.chunks_exact_mut(LANES).enumerate() {
            for (l, (most, p)) in most.iter_mut().zip(chunk).enumerate() {
                let score = *p * scale;
                let score = if let Some(cap) = soft_cap { cap * float::tanh(score / cap) } else { score };
                let key = i * LANES + l;
                *p = if key >= seen.start && key < seen.end { score } else { f32::NEG_INFINITY };
                *most = if *p > *most { *p } else { *most };
            }
        }
        let most = most.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let mut sums = [0f32; LANES];
        // The slope of the cap needs the score, so it goes first.
        for (p, ds) in p.chunks_exact_mut(LANES).zip(ds.chunks_exact_mut(LANES)) {
            for ((sum, p), ds) in sums.iter_mut().zip(p).zip(ds) {
                let seen = *p > f32::NEG_INFINITY;
                let t = if let Some(cap) = soft_cap { *p / cap } else { 0.0 };
                *ds = if seen { (*ds - correction) * (1.0 - t * t) * scale } else { 0.0 };
                *p = float::exp(*p - most);
                *sum += *p;
            }
        }
        let norm = 1.0 / sums.iter().sum::<f32>();
        for (p, ds) in p.iter_mut().zip(ds) {
            *p *= norm;
            *ds *= *p;
        }
    }
}
