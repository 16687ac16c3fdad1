#![allow(clippy::unwrap_used)]
//! Against a naive f64 attention, with unused slots poisoned, and bit for bit across ways to cut the work.
use super::*;
use crate::ops::kv_write::{Part, kv_write};
use candle_core::{DType, Device};

struct Case {
    heads: usize,
    layout: KvLayout,
    /// (prefix length, own length)
    sequences: Vec<(usize, usize)>,
    attention: Attention,
    /// Of K and V.
    dtype: DType,
}

const PLAIN: Attention = Attention { scale: 0.3, soft_cap: None, window: None, causal: true };

/// Rows of q, k, v for every own position of every sequence, and K, V of the prefixes.
struct Data {
    own: Vec<Vec<f32>>,
    prefix: Vec<Vec<f32>>,
}

/// A value as K and V hold it.
fn held(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn noise(i: usize) -> f32 {
    ((i as f64 * 12.9898).sin() * 43758.547).fract() as f32
}

impl Case {
    fn width(&self) -> usize {
        (self.heads + 2 * self.layout.kv_heads) * self.layout.head_dim
    }

    fn data(&self) -> Data {
        let (w, mut at) = (self.width(), 0);
        let mut rows = |n: usize| -> Vec<f32> {
            at += n * w;
            (at - n * w..at).map(noise).collect()
        };
        let prefix = self.sequences.iter().map(|s| rows(s.0)).collect();
        Data { own: self.sequences.iter().map(|s| rows(s.1)).collect(), prefix }
    }

    /// Runs every sequence in chunks of `chunk` rows, all sequences in one batch; `[sequence][row]` outputs.
    fn run(&self, data: &Data, chunk: usize, threads: usize, shuffle: usize) -> Vec<Vec<f32>> {
        let (n, machine, w) = (self.sequences.len(), Machine::new(threads), self.width());
        let (kw, dim) = (self.layout.kv_heads * self.layout.head_dim, self.layout.head_dim);
        let count = |len: usize| len.div_ceil(PAGE);
        let total: usize = self.sequences.iter().map(|(p, t)| count(*p) + count(*t)).sum::<usize>() + 3;
        // Pages in a scattered order, everything poisoned.
        let mut free: Vec<u32> = (0..total as u32).map(|i| (i * 7 + shuffle as u32) % total as u32).collect();
        if total.is_multiple_of(7) {
            free = (0..total as u32).rev().collect();
        }
        let slab = |shape: (usize, usize, usize, usize)| {
            Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap()
        };
        let keys = slab((total, self.layout.kv_heads, dim, PAGE));
        let values = slab((total, self.layout.kv_heads, PAGE, dim));
        let tables: Vec<(Vec<u32>, Vec<u32>)> = self
            .sequences
            .iter()
            .map(|(p, t)| {
                (
                    (0..count(*p)).map(|_| free.pop().unwrap()).collect(),
                    (0..count(*t)).map(|_| free.pop().unwrap()).collect(),
                )
            })
            .collect();
        let write = |rows: &[f32], pages: &[u32], first: usize| {
            let m = rows.len() / w;
            if m == 0 {
                return;
            }
            let slots: Arc<[u32]> =
                (first..first + m).map(|i| pages[i / PAGE] * PAGE as u32 + (i % PAGE) as u32).collect();
            let rows = Tensor::from_slice(rows, (m, w), &Device::Cpu).unwrap();
            kv_write(&keys, &rows, Part::Key, self.layout, &slots, self.heads * dim).unwrap();
            kv_write(&values, &rows, Part::Value, self.layout, &slots, self.heads * dim + kw).unwrap();
        };
        for (i, (prefix, _)) in tables.iter().enumerate() {
            write(&data.prefix[i], prefix, 0);
        }
        let mut out = vec![Vec::new(); n];
        let longest = self.sequences.iter().map(|s| s.1).max().unwrap();
        for start in (0..longest).step_by(chunk) {
            let (mut views, mut pages, mut rows, mut who) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (i, (p, t)) in self.sequences.iter().enumerate() {
                let end = (start + chunk).min(*t);
                if start >= end {
                    continue;
                }
                let part = &data.own[i][start * w..end * w];
                write(part, &tables[i].1, start);
                let row = rows.len() / w;
                rows.extend_from_slice(part);
                let at = pages.len();
                pages.extend(&tables[i].0);
                let mid = pages.len();
                pages.extend(&tables[i].1);
                let end_pages = pages.len();
                views.push(SequenceView {
                    rows: row..row + end - start,
                    first: start,
                    prefix_len: *p,
                    prefix_pages: at..mid,
                    own_pages: mid..end_pages,
                });
                who.push((i, row..row + end - start));
            }
            let m = rows.len() / w;
            let qkv = Tensor::from_vec(rows, (m, w), &Device::Cpu).unwrap();
            let plan = Arc::new(Plan::new(views, pages, self.layout, self.heads));
            let o = prefix_attention(&qkv, &keys, &values, &plan, self.attention, &machine)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            who.into_iter().for_each(|(i, r)| o[r].iter().for_each(|row| out[i].extend(row)));
        }
        out
    }

    fn reference(&self, data: &Data) -> Vec<Vec<f64>> {
        let (w, dim, group) = (self.width(), self.layout.head_dim, self.heads / self.layout.kv_heads);
        let mut out = Vec::new();
        for (i, (p, t)) in self.sequences.iter().enumerate() {
            let mut rows = Vec::new();
            for row in 0..*t {
                for head in 0..self.heads {
                    let q = &data.own[i][row * w + head * dim..][..dim];
                    let kv = |j: usize, part: usize| -> Vec<f32> {
                        let (source, j) = if j < *p { (&data.prefix[i], j) } else { (&data.own[i], j - p) };
                        let column = (self.heads + part * self.layout.kv_heads + head / group) * dim;
                        let row = &source[j * w + column..][..dim];
                        row.iter().map(|v| held(*v, self.dtype)).collect()
                    };
                    let dot = |k: Vec<f32>| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(b)).sum::<f64>();
                    let Attention { scale, soft_cap, window, causal } = self.attention;
                    let score = |j: usize| {
                        let s = dot(kv(j, 0)) * f64::from(scale);
                        let s = soft_cap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
                        let seen = (!causal || j <= p + row) && window.is_none_or(|w| j + w > p + row);
                        if seen { s.exp() } else { 0.0 }
                    };
                    let e: Vec<f64> = (0..p + t).map(score).collect();
                    let sum: f64 = e.iter().sum();
                    for d in 0..dim {
                        rows.push(e.iter().enumerate().map(|(j, e)| e * f64::from(kv(j, 1)[d])).sum::<f64>() / sum);
                    }
                }
            }
            out.push(rows);
        }
        out
    }
}

fn cases() -> Vec<Case> {
    let case = |heads, kv_heads, head_dim, sequences: &[(usize, usize)]| Case {
        heads,
        layout: KvLayout { kv_heads, head_dim },
        sequences: sequences.to_vec(),
        attention: PLAIN,
        dtype: DType::F32,
    };
    let window = |w, case: Case| Case { attention: Attention { window: Some(w), ..PLAIN }, ..case };
    let halves = |dtype, case: Case| Case { dtype, ..case };
    vec![
        case(2, 1, 8, &[(0, 1), (1, 1), (16, 17), (5, 33)]),
        case(6, 2, 32, &[(20, 40), (0, 70), (300, 3)]),
        case(4, 4, 80, &[(17, 20), (64, 5)]),
        case(2, 2, 64, &[(0, 270), (257, 2)]),
        window(1, case(2, 1, 8, &[(0, 1), (3, 20)])),
        window(12, case(2, 1, 8, &[(0, 30), (5, 33), (16, 4), (40, 3)])),
        window(70, case(2, 2, 16, &[(300, 90), (0, 280), (200, 1)])),
        window(300, case(2, 1, 16, &[(270, 60), (0, 330)])),
        Case { attention: Attention { soft_cap: Some(0.7), window: Some(9), ..PLAIN }, ..case(2, 1, 8, &[(5, 33)]) },
        halves(DType::BF16, case(2, 1, 8, &[(0, 1), (1, 1), (16, 17), (5, 33)])),
        halves(DType::BF16, window(70, case(6, 2, 80, &[(20, 40), (0, 70), (300, 3)]))),
        halves(DType::F16, case(4, 4, 80, &[(17, 20), (64, 5)])),
        halves(DType::F16, case(6, 2, 20, &[(20, 40), (0, 270), (300, 3)])),
    ]
}

#[test]
fn agrees_with_naive_f64() {
    for case in cases() {
        let data = case.data();
        let got = case.run(&data, 1000, 2, 1);
        for (g, w) in got.iter().flatten().zip(case.reference(&data).iter().flatten()) {
            assert!((f64::from(*g) - w).abs() < 2e-6, "{g} {w}");
        }
    }
}

/// An encoder's rows see each other and the prefix.
#[test]
fn bidirectional_agrees_with_naive_f64() {
    let case = Case {
        heads: 4,
        layout: KvLayout { kv_heads: 4, head_dim: 16 },
        sequences: vec![(0, 5), (8, 40), (3, 1), (0, 300)],
        attention: Attention { causal: false, ..PLAIN },
        dtype: DType::F32,
    };
    let data = case.data();
    for (g, w) in case.run(&data, 1000, 2, 1).iter().flatten().zip(case.reference(&data).iter().flatten()) {
        assert!((f64::from(*g) - w).abs() < 2e-6, "{g} {w}");
    }
}

/// Chunks, threads and page order never change a bit; nor does company: each sequence alone gives the same.
#[test]
fn bits_do_not_depend_on_the_cut() {
    let bits =
        |v: &[Vec<f32>]| -> Vec<Vec<u32>> { v.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect() };
    for case in cases() {
        let data = case.data();
        let want = bits(&case.run(&data, 1000, 1, 1));
        for (chunk, threads, shuffle) in [(1, 2, 2), (7, 3, 3), (16, 1, 4), (33, 2, 5)] {
            assert!(bits(&case.run(&data, chunk, threads, shuffle)) == want, "chunk {chunk}");
        }
        for (i, sequence) in case.sequences.iter().enumerate() {
            let alone = Case { sequences: vec![*sequence], ..case };
            let data = Data { own: vec![data.own[i].clone()], prefix: vec![data.prefix[i].clone()] };
            assert!(bits(&alone.run(&data, 5, 1, 0))[0] == want[i]);
        }
    }
}

/// What a type cannot hold becomes the nearest it has, never an infinity; NaN stays, and so does poison.
#[test]
fn what_is_beyond_a_type_is_cut() {
    let layout = KvLayout { kv_heads: 1, head_dim: 4 };
    let rows = Tensor::new(&[[70000f32, -70000.0, f32::NAN, -1.0 / 3.0]], &Device::Cpu).unwrap();
    for (dtype, most) in [(DType::F16, 65504.0), (DType::BF16, 70144.0)] {
        let slab = Tensor::zeros((1, 1, PAGE, 4), dtype, &Device::Cpu).unwrap();
        kv_write(&slab, &rows, Part::Value, layout, &vec![3].into(), 0).unwrap();
        let got = slab.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got[12..14], [most, -most], "{dtype:?}");
        assert!(got[14].is_nan() && got[15] == held(-1.0 / 3.0, dtype) && got[16] == 0.0);
    }
}

#[test]
fn a_plan_that_does_not_fit_is_an_error() {
    let layout = KvLayout { kv_heads: 1, head_dim: 8 };
    let qkv = Tensor::zeros((1, 24), DType::F32, &Device::Cpu).unwrap();
    let keys = Tensor::zeros((2, 1, 8, PAGE), DType::F32, &Device::Cpu).unwrap();
    let values = Tensor::zeros((2, 1, PAGE, 8), DType::F32, &Device::Cpu).unwrap();
    let view = |rows, own| SequenceView { rows, first: 0, prefix_len: 0, prefix_pages: 0..0, own_pages: own };
    for (rows, own, pages) in
        [(0..1, 0..0, vec![]), (0..1, 0..1, vec![9]), (0..2, 0..1, vec![0]), (1..2, 0..1, vec![0])]
    {
        let plan = Arc::new(Plan::new(vec![view(rows, own)], pages, layout, 1));
        assert!(prefix_attention(&qkv, &keys, &values, &plan, PLAIN, &Machine::new(1)).is_err());
    }
}

/// The view that serves has no gradient, and says so: training uses the packed one.
#[test]
fn a_missing_gradient_is_loud() {
    let layout = KvLayout { kv_heads: 1, head_dim: 8 };
    let qkv = candle_core::Var::zeros((1, 24), DType::F32, &Device::Cpu).unwrap();
    let keys = Tensor::zeros((1, 1, 8, PAGE), DType::F32, &Device::Cpu).unwrap();
    let values = Tensor::zeros((1, 1, PAGE, 8), DType::F32, &Device::Cpu).unwrap();
    let view = SequenceView { rows: 0..1, first: 0, prefix_len: 0, prefix_pages: 0..0, own_pages: 0..1 };
    let plan = Arc::new(Plan::new(vec![view], vec![0], layout, 1));
    let out = prefix_attention(&qkv, &keys, &values, &plan, PLAIN, &Machine::new(1)).unwrap();
    assert!(out.backward().is_err());
}
