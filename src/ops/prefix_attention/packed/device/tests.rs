#![allow(clippy::unwrap_used)]
mod lists;

use super::super::{Packed, PackedSequence, gradient};
use super::*;
use crate::ops::Machine;
use crate::ops::gpu::tests::rows::{ORDERS, TYPES, flat, noise, rounded};
use candle_core::Device;

/// Several jobs: `(prefix, own rows)`, the prefixes first, as training packs them. Returns the rows of K and V too.
pub(super) fn plan(
    sequences: &[(std::ops::Range<usize>, usize)],
    layout: KvLayout,
    heads: usize,
) -> (Arc<PackedPlan>, usize) {
    let (mut q, mut own) = (0, sequences.iter().map(|s| s.0.end).max().unwrap_or(0));
    let sequences = sequences.iter().map(|(prefix, n)| {
        let s = PackedSequence { queries: q..q + n, prefix: prefix.clone(), own: own..own + n };
        (q, own) = (q + n, own + n);
        s
    });
    let sequences = sequences.collect();
    (Arc::new(PackedPlan { sequences, layout, heads }), own)
}

/// Log-sum-exp of each row's scores, and its attention, in f64: what the forward pass leaves.
fn forward(plan: &PackedPlan, a: Attention, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (dim, kv_heads, heads) = (plan.layout.head_dim, plan.layout.kv_heads, plan.heads);
    let m = plan.sequences.last().map_or(0, |s| s.queries.end);
    let (mut lse, mut out) = (vec![0f32; m * heads], vec![0f32; m * heads * dim]);
    for s in &plan.sequences {
        let rows: Vec<usize> = s.prefix.clone().chain(s.own.clone()).collect();
        for (row, head) in s.queries.clone().flat_map(|row| (0..heads).map(move |h| (row, h))) {
            let (position, at) = (s.prefix.len() + row - s.queries.start, (row * heads + head) * dim);
            let of = |j: usize| (rows[j] * kv_heads + head * kv_heads / heads) * dim;
            let seen = |j: &usize| (!a.causal || *j <= position) && a.window.is_none_or(|w| j + w > position);
            let score = |j: usize| {
                let dot: f64 = (0..dim).map(|d| f64::from(q[at + d]) * f64::from(k[of(j) + d])).sum();
                let s = dot * f64::from(a.scale);
                a.soft_cap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
            };
            let scores: Vec<(usize, f64)> = (0..rows.len()).filter(seen).map(|j| (j, score(j))).collect();
            let log = scores.iter().map(|s| s.1.exp()).sum::<f64>().ln();
            lse[row * heads + head] = log as f32;
            for d in 0..dim {
                out[at + d] =
                    scores.iter().map(|(j, s)| (s - log).exp() * f64::from(v[of(*j) + d])).sum::<f64>() as f32;
            }
        }
    }
    (lse, out)
}

struct Case {
    plan: Arc<PackedPlan>,
    rows: usize,
    attention: Attention,
    /// q, k, v, out and its gradient, as the CPU sees them and as the device does.
    wide: [Tensor; 5],
    narrow: [Tensor; 5],
    lse: Vec<f32>,
}

impl Case {
    fn new((plan, rows): (Arc<PackedPlan>, usize), attention: Attention, dtype: DType) -> Self {
        let m = plan.sequences.last().map_or(0, |s| s.queries.end);
        let (q_width, kv_width) = (plan.heads * plan.layout.head_dim, plan.layout.kv_heads * plan.layout.head_dim);
        let scaled = |seed, n, by: f32| noise(seed, n).iter().map(|x| x * by).collect::<Vec<_>>();
        let q = rounded(scaled(1, m * q_width, 2.0), (m, q_width), dtype);
        let k = rounded(scaled(2, rows * kv_width, 2.0), (rows, kv_width), dtype);
        let v = rounded(scaled(3, rows * kv_width, 1.0), (rows, kv_width), dtype);
        let g = rounded(scaled(4, m * q_width, 1.0), (m, q_width), dtype);
        let (lse, out) = forward(&plan, attention, &flat(&q.0), &flat(&k.0), &flat(&v.0));
        let o = rounded(out, (m, q_width), dtype);
        let (wide, narrow) = ([q.0, k.0, v.0, o.0, g.0], [q.1, k.1, v.1, o.1, g.1]);
        Case { plan, rows, attention, wide, narrow, lse }
    }

    /// Gradients by the CPU's op.
    fn reference(&self) -> [Vec<f32>; 3] {
        let op = Packed { plan: self.plan.clone(), attention: self.attention, machine: Machine::new(1) };
        let [q, k, v, out, grad] = &self.wide;
        let (m, n) = (q.dim(0).unwrap(), k.dim(0).unwrap());
        let (stored, (q_width, kv_width)) = (n - m, self.plan.widths());
        let part = |t: &Tensor, from: usize, to: usize| t.narrow(0, from, to - from).unwrap();
        let qkv = flat(&Tensor::cat(&[q.clone(), part(k, stored, n), part(v, stored, n)], 1).unwrap());
        let before = flat(&Tensor::cat(&[part(k, 0, stored), part(v, 0, stored)], 1).unwrap());
        let rows = super::super::Rows { qkv: &qkv, stored: &before };
        let (d_qkv, d_stored) = gradient::Input { op: &op, rows, out: &flat(out), grad: &flat(grad) }.gradients();
        let columns = |rows: &[f32], width: usize, from: usize, to: usize| -> Vec<f32> {
            rows.chunks(width).flat_map(|row| row[from..to].to_vec()).collect()
        };
        let [dk, dv] = [0, 1].map(|part| {
            let (from, to) = (part * kv_width, (part + 1) * kv_width);
            let own = columns(&d_qkv, q_width + 2 * kv_width, q_width + from, q_width + to);
            [columns(&d_stored, 2 * kv_width, from, to), own].concat()
        });
        [columns(&d_qkv, q_width + 2 * kv_width, 0, q_width), dk, dv]
    }

    fn run(&self, order: u32, prefix_rows: usize) -> Gradients {
        let [q, k, v, out, grad] = &self.narrow;
        let gpu = Gpu::emulated(order);
        let lse = Buffer::new(&gpu, &self.lse).unwrap();
        let rows = Rows { q, k, v, out, lse: &lse, grad };
        DevicePlan::new(&self.plan).gradients(&gpu, &rows, self.attention, prefix_rows).unwrap()
    }

    /// Each row of each head is within `within` of the CPU's, relative to its length and that of a fair row: dS is a difference,
    /// so where little is left of it, and in f32 nothing else is rounded, the error is that of a fair row.
    fn check(&self, what: &str, prefix_rows: usize, within: f64, orders: &[u32]) {
        let (want, dim, dtype) = (self.reference(), self.plan.layout.head_dim, self.narrow[0].dtype());
        let mut bits: Option<[Vec<u32>; 3]> = None;
        for order in orders {
            let Gradients { q, k, v, prefix } = self.run(*order, prefix_rows);
            assert!([&q, &k, &v].iter().all(|t| t.dtype() == dtype));
            let mut got = [q, k, v].map(|t| flat(&t));
            for (all, prefix) in got[1..].iter_mut().zip(prefix.into_iter().flatten()) {
                assert_eq!((prefix.dtype(), prefix.dim(0).unwrap()), (DType::F32, prefix_rows));
                all.splice(0..0, flat(&prefix));
            }
            for (name, (got, want)) in ["dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                assert_eq!(got.len(), want.len());
                let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let fair = length(want) / ((want.len() / dim).max(1) as f64).sqrt();
                for (i, (g, w)) in got.chunks(dim).zip(want.chunks(dim)).enumerate() {
                    let off = length(&g.iter().zip(w).map(|(g, w)| g - w).collect::<Vec<_>>());
                    let floor = if dtype == DType::F32 { fair } else { 0.1 * fair };
                    let most = within * (length(w) + floor);
                    assert!(
                        off <= most,
                        "{what} {dtype:?}: {name}, head {i}: off by {off}, {most} is allowed: {g:?} {w:?}"
                    );
                }
            }
            let own = got.map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert!(
                *bits.get_or_insert_with(|| own.clone()) == own,
                "{what} {dtype:?}: the order of the threads shows"
            );
        }
    }
}

/// Of a row's length: rounding of P, dS and the results.
fn within(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

const PLAIN: Attention = Attention { scale: 0.3, soft_cap: None, window: None, causal: true };

fn attentions() -> [(&'static str, Attention); 5] {
    [
        ("causal", PLAIN),
        ("capped", Attention { soft_cap: Some(0.8), ..PLAIN }),
        ("window", Attention { window: Some(7), ..PLAIN }),
        ("full", Attention { causal: false, ..PLAIN }),
        ("full window, capped", Attention { causal: false, window: Some(20), soft_cap: Some(2.0), ..PLAIN }),
    ]
}

/// Prefixes of 5, shared by two, of 17, of 1 and none; sequences of less than a tile and of more.
fn jobs() -> Vec<(std::ops::Range<usize>, usize)> {
    vec![(0..5, 3), (0..5, 18), (5..22, 4), (22..23, 2), (23..23, 6), (5..22, 70)]
}

#[test]
fn agrees_with_the_cpu() {
    for (kv_heads, heads, head_dim) in [(2, 4, 8), (1, 7, 64), (2, 2, 24)] {
        for (name, attention) in attentions() {
            for dtype in TYPES {
                let case = Case::new(plan(&jobs(), KvLayout { kv_heads, head_dim }, heads), attention, dtype);
                let what = format!("{name}, {heads} heads of {head_dim} over {kv_heads}");
                case.check(&what, 23, within(dtype), &[head_dim as u32]);
            }
        }
    }
}

/// Wider heads, which run as other kernels; no width of theirs is a whole tile.
#[test]
fn wide_heads_agree_with_the_cpu() {
    let jobs = [(0..17, 5), (0..17, 30), (17..17, 4)];
    for (head_dim, heads) in [(72, 4), (128, 1), (256, 2), (196, 1)] {
        for dtype in TYPES {
            let layout = KvLayout { kv_heads: 1, head_dim };
            let attention = Attention { scale: 0.1, window: Some(25), soft_cap: Some(3.0), causal: true };
            Case::new(plan(&jobs, layout, heads), attention, dtype).check(
                &format!("{head_dim}"),
                17,
                within(dtype),
                &[2],
            );
        }
    }
}

#[test]
fn the_order_of_threads_does_not_show() {
    for (head_dim, dtype) in TYPES.into_iter().flat_map(|t| [(20, t), (136, t)]) {
        let jobs = [(0..9, 40), (0..9, 3)];
        let layout = KvLayout { kv_heads: 1, head_dim };
        Case::new(plan(&jobs, layout, 2), PLAIN, dtype).check("orders", 9, within(dtype), &ORDERS);
    }
}

/// Where the gradients of prefixes go: apart, among the others, and nothing but prefixes; in f32 they are the same numbers.
#[test]
fn prefixes_come_apart_or_not() {
    let (layout, jobs) = (KvLayout { kv_heads: 2, head_dim: 16 }, [(0..4, 9), (4..20, 5)]);
    let case = Case::new(plan(&jobs, layout, 4), PLAIN, DType::F32);
    let all = |prefix_rows| {
        let Gradients { k, v, prefix, .. } = case.run(0, prefix_rows);
        let mut parts = prefix.map_or([vec![], vec![]], |p| p.map(|t| flat(&t)));
        parts.iter_mut().zip([k, v]).for_each(|(all, own)| all.extend(flat(&own)));
        parts
    };
    let whole = all(0);
    assert_eq!(whole[0].len(), case.rows * 32);
    assert!(whole == all(20) && whole == all(7) && whole == all(case.rows));
}

/// A prefix that many entries see is summed in parts: the CPU's numbers, whatever the order of threads.
#[test]
fn long_lists_are_summed_in_parts() {
    let jobs: Vec<_> = (0..3).map(|_| (0..3, 150)).collect();
    let (plan, rows) = plan(&jobs, KvLayout { kv_heads: 1, head_dim: 4 }, 12);
    const { assert!(450 * 12 > 2 * plan::PART) };
    let case = Case::new((plan, rows), Attention { window: Some(300), ..PLAIN }, DType::F32);
    case.check("parts", 3, 2e-5, &[0, 9]);
}

/// A sequence's gradient does not depend on its neighbours, but for the prefix that it shares.
#[test]
fn a_sequence_alone_has_the_same_gradient() {
    let layout = KvLayout { kv_heads: 1, head_dim: 12 };
    for dtype in TYPES {
        let case = Case::new(plan(&jobs(), layout, 3), PLAIN, dtype);
        let s = case.plan.sequences[3].clone();
        let one = PackedSequence { queries: 0..s.queries.len(), ..s.clone() };
        let alone = Arc::new(PackedPlan { sequences: vec![one], layout, heads: 3 });
        let part = |t: &Tensor| t.narrow(0, s.queries.start, s.queries.len()).unwrap().contiguous().unwrap();
        let [q, k, v, out, grad] = &case.narrow;
        let gpu = Gpu::emulated(0);
        let lse = Buffer::new(&gpu, &case.lse[s.queries.start * 3..s.queries.end * 3]).unwrap();
        let rows = Rows { q: &part(q), k, v, out: &part(out), lse: &lse, grad: &part(grad) };
        let got = DevicePlan::new(&alone).gradients(&gpu, &rows, PLAIN, 0).unwrap();
        let all = case.run(0, 0);
        assert_eq!(flat(&part(&all.q)), flat(&got.q));
        for (all, got) in [(all.k, got.k), (all.v, got.v)] {
            let row = |t: &Tensor, r: std::ops::Range<usize>| flat(&t.narrow(0, r.start, r.len()).unwrap());
            assert_eq!(row(&all, s.own.clone()), row(&got, s.own.clone()));
            assert_eq!(row(&all, s.prefix.clone()), row(&got, s.prefix.clone()));
            assert!(row(&got, 0..s.prefix.start).iter().all(|x| *x == 0.0), "rows that nobody sees");
        }
    }
}

/// f32 on the device against differences of the loss in f64.
#[test]
fn gradients_agree_with_differences() {
    let (layout, jobs) = (KvLayout { kv_heads: 1, head_dim: 6 }, [(0..3, 4), (0..3, 2), (3..3, 3)]);
    let attention = Attention { scale: 0.4, soft_cap: Some(0.9), window: Some(5), causal: true };
    let case = Case::new(plan(&jobs, layout, 2), attention, DType::F32);
    let Gradients { q, k, v, .. } = case.run(0, 0);
    let data = case.wide.each_ref().map(flat);
    let loss = |[q, k, v]: [&[f32]; 3]| {
        crate::ops::prefix_attention::packed::tests::loss(&case.plan, attention, [q, k, v, &data[4]])
    };
    for (which, got) in [q, k, v].iter().map(flat).enumerate() {
        for (i, got) in got.iter().enumerate() {
            let at = |by: f32| {
                let mut moved = [data[0].clone(), data[1].clone(), data[2].clone()];
                moved[which][i] += by;
                (loss(moved.each_ref().map(|v| &v[..])), f64::from(moved[which][i]))
            };
            let (above, below) = (at(1e-3), at(-1e-3));
            let want = (above.0 - below.0) / (above.1 - below.1);
            assert!((f64::from(*got) - want).abs() < 1e-4 * want.abs().max(0.1), "{which} {i}: {got} {want}");
        }
    }
}

/// Rows of q, out and grad that are longer than their heads are read as they are; what does not fit is refused.
#[test]
fn strides_and_shapes() {
    let (layout, jobs) = (KvLayout { kv_heads: 1, head_dim: 8 }, [(0..3, 4), (0..3, 2)]);
    let case = Case::new(plan(&jobs, layout, 2), PLAIN, DType::BF16);
    let [q, k, v, out, grad] = &case.narrow;
    let padded = |t: &Tensor, by: usize| {
        let rest = (Tensor::ones((6, by), DType::BF16, &Device::Cpu).unwrap() * f64::NAN).unwrap();
        Tensor::cat(&[t, &rest], 1).unwrap()
    };
    let (device, gpu) = (DevicePlan::new(&case.plan), Gpu::emulated(0));
    let lse = Buffer::new(&gpu, &case.lse).unwrap();
    let run = |q: &Tensor, out: &Tensor, grad: &Tensor, prefix_rows| {
        let rows = Rows { q, k, v, out, lse: &lse, grad };
        device.gradients(&gpu, &rows, PLAIN, prefix_rows)
    };
    let want = run(q, out, grad, 3).unwrap();
    for [a, b, c] in [[8, 16, 24], [3, 0, 5]] {
        let got = run(&padded(q, a), &padded(out, b), &padded(grad, c), 3).unwrap();
        for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
            assert_eq!(flat(got), flat(want));
        }
    }
    assert!(run(&q.narrow(1, 0, 8).unwrap().contiguous().unwrap(), out, grad, 3).is_err());
    assert!(run(q, out, &grad.to_dtype(DType::F16).unwrap(), 3).is_err() && run(q, out, grad, case.rows + 1).is_err());
    assert!(run(&q.narrow(0, 0, 5).unwrap(), out, grad, 3).is_err());
}
