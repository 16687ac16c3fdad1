#![allow(clippy::unwrap_used)]
use super::*;
use crate::ops::Machine;
use crate::ops::gpu::Buffer;
use crate::ops::gpu::tests::rows::{ORDERS, TYPES, agree, flat, noise, rounded, tolerance};
use crate::ops::seed::backward_from;
use candle_core::{DType, Device, Tensor, Var};
use std::sync::Arc;

/// dx of `op` over x and dy on the CPU in f32, and on the device in `dtype`: the same rounded values.
fn compare(
    what: &str,
    dtype: DType,
    (m, width): (usize, usize),
    op: impl Fn(&Arc<Machine>, &Tensor) -> Result<Tensor>,
) {
    let values: Vec<f32> = noise(m + width, m * width).iter().map(|x| x * 3.0 + 0.5).collect();
    let (x, narrow) = rounded(values, (m, width), dtype);
    let (dy, narrow_dy) = rounded(noise(5, m * width), (m, width), dtype);
    let run = |x: &Tensor, dy: &Tensor, machine: &Arc<Machine>| {
        let x = Var::from_tensor(x).unwrap();
        let y = op(machine, &x).unwrap();
        let dx = backward_from(&y, dy).unwrap().get(&x).unwrap().clone();
        assert_eq!(dx.dtype(), x.dtype());
        flat(&dx)
    };
    let want = run(&x, &dy, &Machine::new(1));
    let mut first = None;
    for order in ORDERS {
        let got = run(&narrow, &narrow_dy, &Machine::with_gpu(1, Gpu::emulated(order)));
        agree(&format!("{what} [{m}, {width}] {dtype:?}"), &got, &want, 3.0 * tolerance(dtype), &mut first);
    }
}

#[test]
fn norms_agree_with_the_cpu() {
    for (m, hidden) in [(1, 2), (3, 31), (2, 64), (3, 257), (2, 1200), (1, 2056)] {
        for dtype in TYPES {
            let (w, b) = (noise(7, hidden), noise(8, hidden));
            compare("rms", dtype, (m, hidden), |machine, x| Norm::rms(w.clone(), 1e-3, machine)?.forward(x));
            compare("layer", dtype, (m, hidden), |machine, x| {
                Norm::layer(w.clone(), b.clone(), 1e-3, machine)?.forward(x)
            });
        }
    }
}

#[test]
fn head_norms_agree_with_the_cpu() {
    for (m, dim, heads, kv_heads) in [(1, 6, 1, 1), (3, 64, 4, 2), (2, 72, 7, 1), (2, 256, 2, 1)] {
        for dtype in TYPES {
            let (q, k) = (noise(7, dim), noise(8, dim));
            compare("heads", dtype, (m, (heads + 2 * kv_heads) * dim), |machine, x| {
                HeadNorm::new(q.clone(), k.clone(), 1e-3, [heads, kv_heads], machine)?.forward(x)
            });
        }
    }
}

/// f32 on the device against differences in f64.
#[test]
fn gradients_agree_with_differences() {
    let n = 37;
    let (w, b, values, dy) = (noise(7, n), noise(8, n), noise(9, n), noise(10, n));
    let machine = Machine::with_gpu(1, Gpu::emulated(0));
    let row = |v: &[f32]| Tensor::from_slice(v, (1, n), &Device::Cpu).unwrap();
    for centred in [false, true] {
        let norm = if centred {
            Norm::layer(w.clone(), b.clone(), 1e-3, &machine)
        } else {
            Norm::rms(w.clone(), 1e-3, &machine)
        };
        let x = Var::from_tensor(&row(&values)).unwrap();
        let y = norm.unwrap().forward(&x).unwrap();
        let dx = flat(backward_from(&y, &row(&dy)).unwrap().get(&x).unwrap());
        let loss = |at: usize, by: f64| -> f64 {
            let x: Vec<f64> =
                values.iter().enumerate().map(|(i, v)| f64::from(*v) + if i == at { by } else { 0.0 }).collect();
            let mean = if centred { x.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let scale = 1.0 / (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64 + 1e-3).sqrt();
            let term = |i: usize| (x[i] - mean) * scale * f64::from(w[i]) * f64::from(dy[i]);
            (0..n).map(term).sum()
        };
        for (i, dx) in dx.iter().enumerate() {
            let want = (loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5;
            assert!((f64::from(*dx) - want).abs() < 3e-6 * want.abs().max(1.0), "{centred} {i}: {dx} {want}");
        }
    }
}

/// Rows that are parts of longer ones, and a gradient that comes by the residual, in the place of the result: what lies
/// between the rows stays.
#[test]
fn strides_and_residual() {
    let (m, width, [xs, dys, dxs]) = (3, 21, [30, 25, 23]);
    let gpu = Gpu::emulated(2);
    let (w, x, dy, add) = (noise(1, width), noise(2, m * xs), noise(3, m * dys), noise(4, m * dxs));
    let buffers = [&w, &x, &dy, &add].map(|v| Buffer::new(&gpu, v).unwrap());
    let [wb, xb, dyb, out] = &buffers;
    let call = gpu.call("norm_backward", DType::F32).buffer(xb, 0, 4).buffer(dyb, 0, 4).buffer(wb, 0, 4);
    let call = call.buffer(out, 0, 4).buffer(out, 0, 4).int(width).int(xs).int(dys).int(dxs).int(0).float(1e-3);
    // SAFETY: the kernel's arguments.
    unsafe { call.launch(Grid { blocks: [m as u32, 1, 1], threads: 64, shared: 0 }).unwrap() };
    let got = out.read::<f32>(0, m * dxs).unwrap();
    for r in 0..m {
        let row = |v: &[f32]| Tensor::from_slice(v, (1, width), &Device::Cpu).unwrap();
        let x = Var::from_tensor(&row(&x[r * xs..][..width])).unwrap();
        let y = Norm::rms(w.clone(), 1e-3, &Machine::new(1)).unwrap().forward(&x).unwrap();
        let dx = flat(backward_from(&y, &row(&dy[r * dys..][..width])).unwrap().get(&x).unwrap());
        let want: Vec<f32> = dx.iter().zip(&add[r * dxs..]).map(|(d, a)| d + a).collect();
        agree(&format!("row {r}"), &got[r * dxs..][..width], &want, 4e-6, &mut None);
        assert_eq!(got[r * dxs + width..(r + 1) * dxs], add[r * dxs + width..(r + 1) * dxs], "between rows");
    }
}
