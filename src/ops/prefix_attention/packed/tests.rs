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

/// Widths of rows of q and of K, and the rows: stored ones, then own ones.
const QW: usize = 24;
const KW: usize = 12;
const STORED: usize = 24;
const OWN: usize = 31;

/// `[q | k | v]` and stored `[k | v]` as q, K and V.
fn apart([qkv, stored]: [&[f32]; 2]) -> [Vec<f32>; 3] {
    let own = |from: usize, to: usize| qkv.chunks(QW + 2 * KW).flat_map(move |row| row[from..to].to_vec());
    let kv = |part: usize| {
        let stored = stored.chunks(2 * KW).flat_map(|row| row[part * KW..(part + 1) * KW].to_vec());
        stored.chain(own(QW + part * KW, QW + (part + 1) * KW)).collect()
    };
    [own(0, QW).collect(), kv(0), kv(1)]
}

#[test]
fn gradients_agree_with_finite_differences() {
    let plan = plan();
    let data = [noise(1, OWN * (QW + 2 * KW)), noise(2, STORED * 2 * KW)];
    let r = noise(4, OWN * QW);
    let loss = |attention, [qkv, stored]: [&[f32]; 2]| {
        let [q, k, v] = apart([qkv, stored]);
        loss(&plan, attention, [&q, &k, &v, &r])
    };
    for attention in attentions() {
        let var = |i: usize, rows: usize| {
            let shape = (rows, data[i].len() / rows);
            Var::from_tensor(&Tensor::from_slice(&data[i], shape, &Device::Cpu).unwrap()).unwrap()
        };
        let (qkv, stored) = (var(0, OWN), var(1, STORED));
        let out = packed_attention(&qkv, Some(&stored), &plan, attention, &Machine::new(2)).unwrap();
        let r = Tensor::from_slice(&r, (OWN, QW), &Device::Cpu).unwrap();
        let total = (out * r).unwrap().sum_all().unwrap();
        let want = loss(attention, [&data[0], &data[1]]);
        assert!((f64::from(total.to_scalar::<f32>().unwrap()) - want).abs() < 1e-3 * want.abs().max(1.0));
        let gradients = total.backward().unwrap();
        for (which, var) in [&qkv, &stored].into_iter().enumerate() {
            let got = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // Every element is too many; a stride that shares no factor with the shapes meets all of them.
            for i in (0..got.len()).step_by(7) {
                let mut moved = data.clone();
                let h = 1e-3f32;
                moved[which][i] = data[which][i] + h;
                let above = loss(attention, [&moved[0], &moved[1]]);
                let up = f64::from(moved[which][i]);
                moved[which][i] = data[which][i] - h;
                let below = loss(attention, [&moved[0], &moved[1]]);
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
    let width = QW + 2 * KW;
    let (qkv, stored, r) = (noise(1, OWN * width), noise(2, STORED * 2 * KW), noise(4, OWN * QW));
    let run = |plan: &Arc<PackedPlan>, qkv: &[f32], r: &[f32], threads| {
        let var = |x: &[f32], w: usize| {
            Var::from_tensor(&Tensor::from_slice(x, (x.len() / w, w), &Device::Cpu).unwrap()).unwrap()
        };
        let (qkv, stored) = (var(qkv, width), var(&stored, 2 * KW));
        let out = packed_attention(&qkv, Some(&stored), plan, attentions()[0], &Machine::new(threads)).unwrap();
        let r = Tensor::from_slice(r, (r.len() / QW, QW), &Device::Cpu).unwrap();
        let gradients = (out * r).unwrap().sum_all().unwrap().backward().unwrap();
        [&qkv, &stored].map(|x| gradients.get(x).unwrap().to_vec2::<f32>().unwrap())
    };
    let together = run(&all, &qkv, &r, 2);
    let s = all.sequences[2].clone();
    let rows = |x: &[f32], w: usize| x[s.queries.start * w..s.queries.end * w].to_vec();
    let one = PackedSequence { queries: 0..s.queries.len(), prefix: s.prefix.clone(), own: 24..24 + s.queries.len() };
    let alone = PackedPlan { sequences: vec![one], layout: LAYOUT, heads: 4 };
    let alone = run(&Arc::new(alone), &rows(&qkv, width), &rows(&r, QW), 1);
    assert_eq!(together[0][s.queries.clone()], alone[0][..]);
    assert_eq!(together[1][s.prefix.clone()], alone[1][s.prefix.clone()]);
    assert!(alone[1][..5].iter().flatten().all(|x| *x == 0.0), "rows that nobody sees");
}

/// Rows of one sequence as the prefix of another, and no stored rows at all: what virtual tokens are.
#[test]
fn own_rows_may_be_a_prefix() {
    let first = PackedSequence { queries: 0..5, prefix: 0..0, own: 0..5 };
    let second = PackedSequence { queries: 5..9, prefix: 0..5, own: 5..9 };
    let whole = PackedSequence { queries: 0..9, prefix: 0..0, own: 0..9 };
    let rows = noise(1, 9 * (QW + 2 * KW));
    let run = |sequences: Vec<PackedSequence>| {
        let plan = Arc::new(PackedPlan { sequences, layout: LAYOUT, heads: 4 });
        let qkv = Var::from_tensor(&Tensor::from_slice(&rows, (9, QW + 2 * KW), &Device::Cpu).unwrap()).unwrap();
        let out = packed_attention(&qkv, None, &plan, attentions()[0], &Machine::new(2))?;
        let r = Tensor::from_slice(&noise(4, 9 * QW), (9, QW), &Device::Cpu)?;
        let gradients = (&out * r)?.sum_all()?.backward()?;
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        Ok::<_, candle_core::Error>((flat(&out), flat(gradients.get(&qkv).unwrap())))
    };
    let (out, gradient) = run(vec![first.clone(), second.clone()]).unwrap();
    let (want_out, want) = run(vec![whole]).unwrap();
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs().max(1.0));
    assert!(close(&out, &want_out) && close(&gradient, &want));
    let e = run(vec![first, PackedSequence { own: 4..8, ..second }]).unwrap_err().to_string();
    assert!(e.contains("own: 4..8"), "{e}");
}
