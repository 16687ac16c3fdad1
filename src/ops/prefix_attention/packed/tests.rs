#![allow(clippy::unwrap_used)]
use super::*;
use candle_core::Var;

const LAYOUT: KvLayout = KvLayout { kv_heads: 2, head_dim: 6 };

fn noise(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((((i + 31 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32) * 1.5).collect()
}

/// Two jobs: sequences 0 and 1 share a prefix of 5, sequence 2 has one of 19, sequence 3 none.
fn plan() -> Arc<PackedPlan> {
    let lengths = [(0..5, 3), (0..5, 18), (5..24, 4), (24..24, 6)];
    let (mut q, mut own, mut sequences) = (0, 24, Vec::new());
    for (prefix, n) in lengths {
        sequences.push(PackedSequence { queries: q..q + n, prefix, own: own..own + n });
        (q, own) = (q + n, own + n);
    }
    Arc::new(PackedPlan { sequences, layout: LAYOUT, heads: 4 })
}

/// sum(r * attention) in f64, straight from the formula.
pub(super) fn loss(plan: &PackedPlan, a: Attention, [q, k, v, r]: [&[f32]; 4]) -> f64 {
    let (dim, group) = (plan.layout.head_dim, plan.heads / plan.layout.kv_heads);
    let at = |x: &[f32], row: usize, heads: usize, head: usize| -> Vec<f64> {
        x[(row * heads + head) * dim..][..dim].iter().map(|v| f64::from(*v)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut total = 0.0;
    for s in &plan.sequences {
        let rows: Vec<usize> = s.prefix.clone().chain(s.own.clone()).collect();
        for i in 0..s.own.len() {
            for head in 0..plan.heads {
                let query = at(q, s.queries.start + i, plan.heads, head);
                let position = s.prefix.len() + i;
                let weight = |j: usize| {
                    let x = dot(&query, &at(k, rows[j], plan.layout.kv_heads, head / group)) * f64::from(a.scale);
                    let x = a.soft_cap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh());
                    let seen = (!a.causal || j <= position) && a.window.is_none_or(|w| j + w > position);
                    if seen { x.exp() } else { 0.0 }
                };
                let e: Vec<f64> = (0..rows.len()).map(weight).collect();
                let sum: f64 = e.iter().sum();
                let r = at(r, s.queries.start + i, plan.heads, head);
                for (j, e) in e.iter().enumerate() {
                    total += e / sum * dot(&r, &at(v, rows[j], plan.layout.kv_heads, head / group));
                }
            }
        }
    }
    total
}

fn attentions() -> [Attention; 4] {
    let plain = Attention { scale: 0.4, soft_cap: None, window: None, causal: true };
    [
        plain,
        Attention { soft_cap: Some(0.9), ..plain },
        Attention { window: Some(7), ..plain },
        Attention { causal: false, ..plain },
    ]
}

#[test]
fn gradients_agree_with_finite_differences() {
    let plan = plan();
    let (m, n) = (31, 55);
    let (qw, kw) = (plan.heads * LAYOUT.head_dim, LAYOUT.kv_heads * LAYOUT.head_dim);
    let data = [noise(1, m * qw), noise(2, n * kw), noise(3, n * kw), noise(4, m * qw)];
    for attention in attentions() {
        let var = |i: usize, rows: usize, width: usize| {
            Var::from_tensor(&Tensor::from_slice(&data[i], (rows, width), &Device::Cpu).unwrap()).unwrap()
        };
        let (q, k, v) = (var(0, m, qw), var(1, n, kw), var(2, n, kw));
        let out = packed_attention(&q, &k, &v, &plan, attention, &Machine::new(2)).unwrap();
        let r = Tensor::from_slice(&data[3], (m, qw), &Device::Cpu).unwrap();
        let total = (out * r).unwrap().sum_all().unwrap();
        let want = loss(&plan, attention, [&data[0], &data[1], &data[2], &data[3]]);
        assert!((f64::from(total.to_scalar::<f32>().unwrap()) - want).abs() < 1e-3 * want.abs().max(1.0));
        let gradients = total.backward().unwrap();
        for (which, var) in [&q, &k, &v].into_iter().enumerate() {
            let got = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // Every element is too many; a stride that shares no factor with the shapes meets all of them.
            for i in (0..got.len()).step_by(7) {
                let mut moved = data.clone();
                let h = 1e-3f32;
                moved[which][i] = data[which][i] + h;
                let above = loss(&plan, attention, [&moved[0], &moved[1], &moved[2], &moved[3]]);
                let up = f64::from(moved[which][i]);
                moved[which][i] = data[which][i] - h;
                let below = loss(&plan, attention, [&moved[0], &moved[1], &moved[2], &moved[3]]);
                let want = (above - below) / (up - f64::from(moved[which][i]));
                let got = f64::from(got[i]);
                assert!((got - want).abs() < 2e-4 * want.abs().max(1.0), "{attention:?} {which} {i}: {got} {want}");
            }
        }
    }
}

/// A sequence's gradient does not depend on its neighbours, but for the prefix that it shares.
#[test]
fn a_sequence_alone_has_the_same_gradient() {
    let all = plan();
    let (m, n) = (31, 55);
    let (qw, kw) = (all.heads * LAYOUT.head_dim, LAYOUT.kv_heads * LAYOUT.head_dim);
    let (q, k, v, r) = (noise(1, m * qw), noise(2, n * kw), noise(3, n * kw), noise(4, m * qw));
    let run = |plan: &Arc<PackedPlan>, q: &[f32], r: &[f32], threads| {
        let rows = q.len() / qw;
        let var = |x: &[f32], w: usize| {
            Var::from_tensor(&Tensor::from_slice(x, (x.len() / w, w), &Device::Cpu).unwrap()).unwrap()
        };
        let (q, k, v) = (var(q, qw), var(&k, kw), var(&v, kw));
        let out = packed_attention(&q, &k, &v, plan, attentions()[0], &Machine::new(threads)).unwrap();
        let r = Tensor::from_slice(r, (rows, qw), &Device::Cpu).unwrap();
        let gradients = (out * r).unwrap().sum_all().unwrap().backward().unwrap();
        [&q, &k, &v].map(|x| gradients.get(x).unwrap().to_vec2::<f32>().unwrap())
    };
    let together = run(&all, &q, &r, 2);
    let s = all.sequences[2].clone();
    let part = s.queries.start * qw..s.queries.end * qw;
    let one = PackedSequence { queries: 0..s.queries.len(), ..s.clone() };
    let alone = PackedPlan { sequences: vec![one], layout: LAYOUT, heads: 4 };
    let alone = run(&Arc::new(alone), &q[part.clone()], &r[part], 1);
    assert_eq!(together[0][s.queries.clone()], alone[0][..]);
    for i in [1, 2] {
        assert_eq!(together[i][s.own.clone()], alone[i][s.own.clone()]);
        assert_eq!(together[i][s.prefix.clone()], alone[i][s.prefix.clone()]);
    }
}
