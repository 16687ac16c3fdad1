//! Gradients against central differences, through candle's own graph.
#![allow(clippy::unwrap_used)]
use super::activation::{Activation, Function};
use super::embed::{Embedding, RowSource, embed};
use super::feed_forward::feed_forward;
use super::float::{bf16_to_f32, f32_to_bf16};
use super::linear::{Arena, Isa, Kind, Linear, Packed, Scratch};
use super::lstm::lstm;
use super::norm::{HeadNorm, Norm};
use super::rope::{Frequencies, Heads, rope};
use super::{Machine, Vector};
use candle_core::{Device, Result, Tensor, Var};
use std::sync::Arc;

fn noise(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 31 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32 * 1.5).collect()
}

/// Checks d sum(r * op(x)) / dx at every element. The op runs in f32: with a step of 2^-6 its rounding stays below a
/// thousandth of what is measured, and so does the third derivative's share.
fn check(what: &str, shape: (usize, usize), op: impl Fn(&Tensor) -> Result<Tensor>) {
    let x = noise(1, shape.0 * shape.1);
    let tensor = |x: &[f32]| Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
    let var = Var::from_tensor(&tensor(&x)).unwrap();
    let y = op(&var).unwrap();
    let r = Tensor::from_vec(noise(2, y.elem_count()), y.shape(), &Device::Cpu).unwrap();
    let loss = |x: &[f32]| -> f64 {
        let y = op(&tensor(x)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let r = r.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        y.iter().zip(r).map(|(y, r)| f64::from(*y) * f64::from(r)).sum()
    };
    let gradients = (y * &r).unwrap().sum_all().unwrap().backward().unwrap();
    let got = gradients.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let h = 1.0 / 64.0;
    for i in 0..x.len() {
        let at = |by: f32| {
            let mut moved = x.clone();
            moved[i] += by;
            loss(&moved)
        };
        // Richardson's extrapolation takes the third derivative out.
        let (near, far) = ((at(h) - at(-h)) / f64::from(2.0 * h), (at(2.0 * h) - at(-2.0 * h)) / f64::from(4.0 * h));
        let want = (4.0 * near - far) / 3.0;
        assert!((f64::from(got[i]) - want).abs() < 2e-3 * want.abs().max(1.0), "{what} at {i}: {} {want}", got[i]);
    }
}

fn weight(n: usize, k: usize) -> Tensor {
    Tensor::from_vec(noise(3, n * k), (n, k), &Device::Cpu).unwrap()
}

#[test]
fn linear() {
    for (m, k, n) in [(1, 5, 3), (3, 70, 33), (9, 130, 40)] {
        let machine = Machine::new(2);
        let bias = Tensor::from_vec(noise(5, n), n, &Device::Cpu).unwrap();
        let f32 = Linear::new(&[weight(n, k)], &[Some(bias)], &machine).unwrap();
        check("linear", (m, k), |x| f32.forward(x));
        let residual = Tensor::from_vec(noise(4, m * n), (m, n), &Device::Cpu).unwrap();
        check("linear's x beside a residual", (m, k), |x| f32.forward_add(x, &residual));
        let x = Tensor::from_vec(noise(4, m * k), (m, k), &Device::Cpu).unwrap();
        check("the residual", (m, n), |r| f32.forward_add(&x, r));
    }
}

/// bf16 and int8 round x in the forward pass, which differences would see as steps: dy W is checked itself, with dy and W as
/// they are multiplied, and bit for bit across rows and threads.
#[test]
fn linear_input_gradient() {
    let round = |v: &f32| bf16_to_f32(f32_to_bf16(*v));
    for (m, k, n) in [(7, 131, 45), (30, 70, 2100), (1, 5, 3), (14, 600, 64)] {
        let (w, dy) = (noise(3, n * k), noise(6, m * n));
        let (half, arena): (Vec<_>, _) = (w.iter().map(|v| half::bf16::from_f32(*v)).collect(), Arena::default());
        let packed = [
            Packed::f32(&w, n, k, Isa::Auto, &arena),
            Packed::bf16(&half, n, k, Isa::Auto, &arena),
            Packed::int8(&w, n, k, Isa::Auto, &arena),
        ];
        for packed in packed {
            let mut rows = vec![0f32; n * k];
            rows.chunks_exact_mut(k).enumerate().for_each(|(j, row)| packed.row(j, row));
            let mut rounded = dy.clone();
            if packed.kind() != Kind::F32 {
                rows.iter_mut().for_each(|w| *w = round(w));
                rounded.iter_mut().for_each(|d| *d = round(d));
            }
            let run = |dy: &[f32], threads| {
                packed.backward(dy, dy.len() / n, &mut Scratch::default(), &Machine::new(threads).pool)
            };
            let all = run(&dy, 2);
            for r in 0..m {
                for c in 0..k {
                    let want: f64 = (0..n).map(|j| f64::from(rounded[r * n + j]) * f64::from(rows[j * k + c])).sum();
                    let got = f64::from(all[r * k + c]);
                    assert!((got - want).abs() < 1e-6 * n as f64, "{:?} {r} {c}: {got} {want}", packed.kind());
                }
                assert_eq!(run(&dy[r * n..(r + 1) * n], 1), all[r * k..(r + 1) * k], "{:?} row {r}", packed.kind());
            }
        }
    }
}

#[test]
fn activations() {
    for function in [Function::Silu, Function::Gelu, Function::GeluTanh] {
        for gated in [false, true] {
            let op = Activation::new(function, gated, &Machine::new(2));
            check(&format!("{function:?} {gated}"), (3, 22), |x| op.forward(x));
        }
    }
    // Differences are no judge at relu's corner: away from it.
    let op = Activation::new(Function::Relu, false, &Machine::new(1));
    check("relu", (2, 9), |x| op.forward(&((x * 100.0)? + 0.5)?));
}

/// As one op: the gradient, and the bits of its parts.
#[test]
fn feed_forwards() {
    let machine = Machine::new(2);
    let (m, hidden, inner) = (3, 20, 35);
    let residual = Tensor::from_vec(noise(4, m * hidden), (m, hidden), &Device::Cpu).unwrap();
    for gated in [false, true] {
        let between = if gated { 2 * inner } else { inner };
        let small = |t: Tensor| (t * 0.2).unwrap();
        let up = Linear::new(&[small(weight(between, hidden))], &[None], &machine).unwrap();
        let down = Linear::new(&[small(weight(hidden, inner))], &[None], &machine).unwrap();
        let activation = Activation::new(Function::Silu, gated, &machine);
        let of = |x: &Tensor, residual: Option<&Tensor>| feed_forward(x, residual, &up, &activation, &down);
        check("feed forward", (m, hidden), |x| of(x, None));
        check("feed forward beside a residual", (m, hidden), |x| of(x, Some(&residual)));
        check("feed forward's residual", (m, hidden), |r| of(&residual, Some(r)));
        let parts = activation.forward(&up.forward(&residual).unwrap()).unwrap();
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(of(&residual, None).unwrap()), flat(down.forward(&parts).unwrap()));
        assert_eq!(flat(of(&residual, Some(&residual)).unwrap()), flat(down.forward_add(&parts, &residual).unwrap()));
    }
}

/// Rows go through in blocks of 256, there and back: each has the bits of a batch of its own.
#[test]
fn feed_forwards_in_blocks() {
    let machine = Machine::new(2);
    let (m, hidden, inner) = (600, 20, 35);
    let up = Linear::new(&[weight(2 * inner, hidden)], &[None], &machine).unwrap();
    let down = Linear::new(&[weight(hidden, inner)], &[None], &machine).unwrap();
    let activation = Activation::new(Function::Silu, true, &machine);
    let both = |x: &Tensor, weights: &Tensor| {
        let x = Var::from_tensor(x).unwrap();
        let y = feed_forward(&x, Some(&x), &up, &activation, &down).unwrap();
        let dx = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
        Tensor::cat(&[&y.detach(), &dx.detach()], 1).unwrap().to_vec2::<f32>().unwrap()
    };
    let rows = |seed| Tensor::from_vec(noise(seed, m * hidden), (m, hidden), &Device::Cpu).unwrap();
    let (x, weights) = (rows(5), rows(6));
    let all = both(&x, &weights);
    for i in [0, 199, 200, 400, m - 1] {
        let row = |t: &Tensor| t.narrow(0, i, 1).unwrap().copy().unwrap();
        assert_eq!(both(&row(&x), &row(&weights))[0], all[i], "row {i}");
    }
}

/// Both ways through the rows, and rows by the thousand: the graph has one node of them.
#[test]
fn lstms() {
    let (n, h) = (5, 3);
    let (gates, state) = (weight(n, 4 * h), weight(4 * h, h));
    for back in [false, true] {
        check("lstm's gates", (n, 4 * h), |x| lstm(x, &state, back));
        check("lstm's weight", (4 * h, h), |w| lstm(&gates, w, back));
        // The other way is this one of rows turned around.
        let turned = |t: &Tensor| Tensor::cat(&(0..n).rev().map(|i| t.narrow(0, i, 1).unwrap()).collect::<Vec<_>>(), 0);
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let there = lstm(&gates, &state, back).unwrap();
        let again = turned(&lstm(&turned(&gates).unwrap(), &state, !back).unwrap()).unwrap();
        assert_eq!(flat(there), flat(again));
    }
    let long = Var::from_tensor(&weight(30_000, 4 * h)).unwrap();
    let gradients = lstm(&long, &state, false).unwrap().sum_all().unwrap().backward().unwrap();
    let all = gradients.get(&long).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(all.iter().all(|d| d.is_finite()));
    // A gate that is shut for good passes nothing on, and no NaN.
    let shut = Var::from_tensor(&(gates * -1000.0).unwrap()).unwrap();
    let gradients = lstm(&shut, &state, false).unwrap().sum_all().unwrap().backward().unwrap();
    let all = gradients.get(&shut).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(all.iter().all(|d| d.is_finite()), "{all:?}");
}

#[test]
fn norms() {
    let (w, b) = (noise(7, 19), noise(8, 19));
    let (rms, layer) =
        (Norm::rms(w.clone(), 1e-3, &Machine::new(2)).unwrap(), Norm::layer(w, b, 1e-3, &Machine::new(2)).unwrap());
    check("rms norm", (3, 19), |x| rms.forward(x));
    check("layer norm", (3, 19), |x| layer.forward(x));
    // 2 query heads, 1 key head, 1 value head of 6.
    let heads = HeadNorm::new(noise(9, 6), noise(10, 6), 1e-3, [2, 1], &Machine::new(2)).unwrap();
    check("head norm", (3, 24), |x| heads.forward(x));
}

#[test]
fn rotations() {
    let inv_freq = Vector::new(vec![1.0, 0.3], &Machine::new(1)).unwrap();
    let turns = Frequencies { inv_freq, scale: 1.2 }.at(&[0, 7, 39]);
    // Two heads of 6 turn in their first 4 elements; the rest of a row stays.
    check("rope", (3, 17), |x| rope(x, &turns, Heads { count: 2, dim: 6 }, &Machine::new(2)));
}

#[test]
fn embeddings() {
    let table =
        Linear::new(&[Tensor::from_vec(noise(11, 5 * 7), (5, 7), &Device::Cpu).unwrap()], &[None], &Machine::new(1))
            .unwrap();
    let embedding =
        Embedding { table, scale: 3.0, positions: Some(Vector::new(noise(12, 6 * 7), &Machine::new(1)).unwrap()) };
    // Row 1 is used twice, row 2 never.
    let rows = [RowSource::Soft(1), RowSource::Token(4), RowSource::Soft(0), RowSource::Soft(1)];
    let positions: Arc<[u32]> = vec![0, 1, 2, 5].into();
    check("embed", (3, 7), |soft| embed(&embedding, soft, rows.to_vec(), &positions, &Machine::new(2)));
}
