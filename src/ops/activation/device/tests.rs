#![allow(clippy::unwrap_used)]
use super::super::Function;
use super::*;
use crate::ops::Machine;
use crate::ops::gpu::tests::rows::{ORDERS, TYPES, agree, flat, noise, rounded, tolerance};
use crate::ops::seed::backward_from;
use candle_core::{Device, Var};

const FUNCTIONS: [Function; 4] = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::Relu];

/// Forward and back against the CPU's op: widths without, with and beyond whole packs and blocks.
#[test]
fn agrees_with_the_cpu() {
    for (m, width) in [(1, 1), (3, 7), (2, 64), (3, 2056), (1, 4101)] {
        for (dtype, gated) in TYPES.into_iter().flat_map(|t| [(t, false), (t, true)]) {
            let wide = if gated { 2 * width } else { width };
            let values: Vec<f32> = noise(m + width, m * wide).iter().map(|x| x * 9.0).collect();
            let (x, narrow) = rounded(values, (m, wide), dtype);
            let (dy, narrow_dy) = rounded(noise(5, m * width), (m, width), dtype);
            for function in FUNCTIONS {
                let run = |x: &Tensor, dy: &Tensor, machine| {
                    let x = Var::from_tensor(x).unwrap();
                    let y = Activation::new(function, gated, &machine).forward(&x).unwrap();
                    let gradients = backward_from(&y, dy).unwrap();
                    let dx = gradients.get(&x).unwrap();
                    assert_eq!((y.dtype(), dx.dtype()), (x.dtype(), x.dtype()));
                    (flat(&y), flat(dx))
                };
                let want = run(&x, &dy, Machine::new(1));
                let (mut first, mut first_back) = (None, None);
                for order in ORDERS {
                    let (y, dx) = run(&narrow, &narrow_dy, Machine::with_gpu(1, Gpu::emulated(order)));
                    let what = format!("{function:?} [{m}, {width}] {dtype:?} gated {gated}");
                    agree(&what, &y, &want.0, 2.0 * tolerance(dtype), &mut first);
                    // Far below 0 the CPU's slope is a difference of two numbers near 1, here times 9.
                    let within = (2.0 * tolerance(dtype)).max(4e-5);
                    agree(&format!("{what}, back"), &dx, &want.1, within, &mut first_back);
                }
            }
        }
    }
}

/// f32 on the device against differences in f64.
#[test]
fn gradients_agree_with_differences() {
    let erf = |x: f64| Tensor::new(x, &Device::Cpu).unwrap().gelu_erf().unwrap().to_scalar::<f64>().unwrap();
    let f = |function, x: f64| match function {
        Function::Silu => x / (1.0 + (-x).exp()),
        Function::Gelu => erf(x),
        Function::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Function::Relu => x.max(0.0),
    };
    let (m, n) = (2, 37);
    let values: Vec<f32> = noise(3, m * 2 * n).iter().map(|x| x * 6.0).collect();
    let dy = noise(4, m * n);
    let machine = Machine::with_gpu(1, Gpu::emulated(0));
    let tensor = |v: &[f32], width| Tensor::from_slice(v, (m, width), &Device::Cpu).unwrap();
    for function in FUNCTIONS {
        let x = Var::from_tensor(&tensor(&values, 2 * n)).unwrap();
        let y = Activation::new(function, true, &machine).forward(&x).unwrap();
        let dx = flat(backward_from(&y, &tensor(&dy, n)).unwrap().get(&x).unwrap());
        for (i, dx) in dx.iter().enumerate() {
            let (r, c) = (i / (2 * n), i % (2 * n));
            let loss = |moved: f64| {
                let at = |j: usize| f64::from(values[r * 2 * n + j]) + if j == c { moved } else { 0.0 };
                f(function, at(c % n)) * at(n + c % n) * f64::from(dy[r * n + c % n])
            };
            let h = 1e-5;
            let want = (loss(h) - loss(-h)) / (2.0 * h);
            assert!((f64::from(*dx) - want).abs() < 2e-6 * want.abs().max(1.0), "{function:?} {i}: {dx} {want}");
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let machine = Machine::with_gpu(1, Gpu::emulated(0));
    let x = Tensor::zeros((2, 5), DType::F32, &Device::Cpu).unwrap();
    let e = Activation::new(Function::Silu, true, &machine).forward(&x).unwrap_err().to_string();
    assert!(e.contains("activation") && e.contains("even"), "{e}");
    let op = Activation::new(Function::Silu, false, &machine);
    let dy = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    assert!(machine.gpu().unwrap().apply2(Back(op), &x, &dy).is_err());
}
