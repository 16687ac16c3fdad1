//! Kernels whose unit is a row or a head, against the CPU ops: `embed`, `norm`, `rope`, `kv_write`, `add` with products.
use super::super::*;
use crate::ops::embed::{Embedding, RowSource, device, embed};
use crate::ops::kv_write::device::{Projection, Slabs, project};
use crate::ops::norm::{HeadNorm, Norm};
use crate::ops::prefix_attention::KvLayout;
use crate::ops::rope::{self, Frequencies, Heads};
use crate::ops::{Linear, Machine, Vector};
use candle_core::{Tensor, Var};
use std::sync::Arc;

/// Thread orders of a block; a kernel's bits must not depend on them.
pub const ORDERS: [u32; 3] = [0, 1, 20_261];
pub const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

pub fn noise(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 31 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32).collect()
}

/// Values that `dtype` holds, as the CPU sees them.
pub fn rounded(values: Vec<f32>, shape: (usize, usize), dtype: DType) -> (Tensor, Tensor) {
    let narrow = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    (narrow.to_dtype(DType::F32).unwrap(), narrow)
}

pub fn flat(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Rounding to the type of the result, and a few of f32.
pub fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

/// `got` has the bits of `first`, if that is there, and is within `tolerance` of `want`, relative to 1 and to itself.
pub fn agree(what: &str, got: &[f32], want: &[f32], tolerance: f32, first: &mut Option<Vec<f32>>) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * w.abs().max(1.0), "{what} [{i}]: {g}, the CPU has {w}");
    }
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let first = first.get_or_insert_with(|| got.to_vec());
    assert_eq!(bits(first), bits(got), "{what}: the order of the threads shows");
}

#[test]
fn norms() {
    for (m, hidden) in [(1, 1), (3, 31), (2, 64), (3, 257), (1, 1200)] {
        for dtype in TYPES {
            let (x, narrow) = rounded(noise(m, m * hidden), (m, hidden), dtype);
            for bias in [false, true] {
                let norm = |machine: &Arc<Machine>| {
                    let (w, b) = (noise(7, hidden), noise(8, hidden));
                    if bias { Norm::layer(w, b, 1e-5, machine).unwrap() } else { Norm::rms(w, 1e-5, machine).unwrap() }
                };
                let want = flat(&norm(&Machine::new(1)).forward(&x).unwrap());
                let mut first = None;
                for order in ORDERS {
                    let y = norm(&Machine::with_gpu(1, Gpu::emulated(order))).forward(&narrow).unwrap();
                    assert_eq!(y.dtype(), dtype);
                    agree(
                        &format!("norm {m} {hidden} {dtype:?}"),
                        &flat(&y),
                        &want,
                        2.0 * tolerance(dtype),
                        &mut first,
                    );
                }
            }
        }
    }
    let machine = Machine::with_gpu(1, Gpu::emulated(0));
    let x = Tensor::zeros((2, 5), DType::F32, &Device::Cpu).unwrap();
    assert!(Norm::rms(vec![1.0; 4], 1e-5, &machine).unwrap().forward(&x).is_err());
}

#[test]
fn products_with_bias_and_residual() {
    // Up to 16 rows the kernel for few, then the library's product.
    for (m, n, k) in [(1, 1, 1), (3, 33, 70), (16, 20, 9), (17, 300, 9), (20, 33, 70)] {
        for dtype in TYPES {
            let (x, narrow) = rounded(noise(1, m * k), (m, k), dtype);
            let (r, narrow_r) = rounded(noise(2, m * n), (m, n), dtype);
            let (_, w) = rounded(noise(3, n * k), (n, k), dtype);
            let bias = Tensor::from_vec(noise(4, n), n, &Device::Cpu).unwrap();
            let linear = |machine: &Arc<Machine>, bias: Option<&Tensor>| {
                Linear::new(
                    &[w.to_dtype(if machine.gpu().is_some() { dtype } else { DType::F32 }).unwrap()],
                    &[bias.cloned()],
                    machine,
                )
                .unwrap()
            };
            let (cpu, gpu) = (Machine::new(1), Machine::with_gpu(1, Gpu::emulated(1)));
            for bias in [None, Some(&bias)] {
                let (a, b) = (linear(&cpu, bias), linear(&gpu, bias));
                let what = format!("linear {m} {n} {k} {dtype:?} {}", bias.is_some());
                // The sum of bias and residual is rounded before the product is added.
                let within = 3.0 * tolerance(dtype) * (k as f32).sqrt();
                agree(&what, &flat(&b.forward(&narrow).unwrap()), &flat(&a.forward(&x).unwrap()), within, &mut None);
                let (got, want) = (b.forward_add(&narrow, &narrow_r).unwrap(), a.forward_add(&x, &r).unwrap());
                agree(&what, &flat(&got), &flat(&want), within, &mut None);
                let logits = b.forward_f32(&narrow).unwrap();
                assert_eq!(logits.dtype(), DType::F32);
                agree(&what, &flat(&logits), &flat(&a.forward(&x).unwrap()), 2e-6 * k as f32, &mut None);
                // The gradient is dy W; rounding differs, the bf16 panels of the CPU are not in this.
                let (got, want) = (b.input_gradient(&narrow_r).unwrap(), a.input_gradient(&r).unwrap());
                agree(&what, &flat(&got), &flat(&want), tolerance(dtype) * (n as f32).sqrt(), &mut None);
                let x = Var::from_tensor(&narrow).unwrap();
                let y = b.forward_add(&x, &narrow_r).unwrap();
                let all = crate::ops::seed::backward_from(&y, &narrow_r).unwrap();
                assert_eq!(flat(all.get(&x).unwrap()), flat(&got), "{what}: autograd takes the same way");
            }
        }
    }
}

#[test]
fn embeddings_and_their_gradient() {
    let (vocab, hidden, num_soft) = (11, 37, 3);
    let (soft, token) = (RowSource::Soft, RowSource::Token);
    let sources = [soft(1), token(4), soft(0), soft(1), token(10), token(0)];
    let positions: Arc<[u32]> = vec![0, 1, 2, 5, 3, 4].into();
    for dtype in TYPES {
        for learned in [false, true] {
            let (_, table) = rounded(noise(1, vocab * hidden), (vocab, hidden), dtype);
            let embedding = |machine: &Arc<Machine>| {
                let table = table.to_dtype(if machine.gpu().is_some() { dtype } else { DType::F32 }).unwrap();
                let positions = learned.then(|| Vector::new(noise(2, 6 * hidden), machine).unwrap());
                Embedding { table: Linear::new(&[table], &[None], machine).unwrap(), scale: 3.0, positions }
            };
            let soft = Var::from_vec(noise(3, num_soft * hidden), (num_soft, hidden), &Device::Cpu).unwrap();
            let (_, dy) = rounded(noise(4, 6 * hidden), (6, hidden), dtype);
            let cpu = Machine::new(1);
            let want = embed(&embedding(&cpu), &soft, sources.to_vec(), &positions, &cpu).unwrap();
            let want_d = crate::ops::seed::backward_from(&want, &dy.to_dtype(DType::F32).unwrap()).unwrap();
            let (mut first, mut first_d) = (None, None);
            for order in ORDERS {
                let gpu = Gpu::emulated(order);
                let machine = Machine::with_gpu(1, gpu.clone());
                let rows = Arc::new(DeviceRows::new(&gpu, &sources, &positions, &[]).unwrap());
                let got = device::embed(&gpu, &embedding(&machine), &soft, &rows).unwrap();
                agree("embed", &flat(&got), &flat(&want), tolerance(dtype), &mut first);
                let all = crate::ops::seed::backward_from(&got, &dy).unwrap();
                let (got, want) = (all.get(&soft).unwrap(), want_d.get(&soft).unwrap());
                agree("embed's gradient", &flat(got), &flat(want), 1e-6, &mut first_d);
            }
        }
    }
    // What lies outside of a table is refused before anything reads it.
    let gpu = Gpu::emulated(0);
    let machine = Machine::with_gpu(1, gpu.clone());
    let table = Tensor::from_vec(noise(5, vocab * hidden), (vocab, hidden), &Device::Cpu).unwrap();
    let learned = Some(Vector::new(vec![0.0; 2 * hidden], &machine).unwrap());
    let embedding =
        Embedding { table: Linear::new(&[table], &[None], &machine).unwrap(), scale: 1.0, positions: learned };
    let soft = Tensor::zeros((1, hidden), DType::F32, &Device::Cpu).unwrap();
    for (source, position, name) in [
        (RowSource::Token(11), 0, "Token(11)"),
        (RowSource::Soft(1), 0, "Soft(1)"),
        (RowSource::Sampled(0), 0, "Sampled(0)"),
        (RowSource::Token(0), 2, "position 2"),
    ] {
        let rows = Arc::new(DeviceRows::new(&gpu, &[source], &[position], &[]).unwrap());
        let e = device::embed(&gpu, &embedding, &soft, &rows).unwrap_err().to_string();
        assert!(e.contains(name), "{e}");
    }
    for row in [RowSource::Token(1 << 30), RowSource::Sampled(1 << 30), RowSource::Soft(1 << 31)] {
        assert!(DeviceRows::new(&gpu, &[row], &[0], &[]).is_err());
    }
    // Tokens that the step before chose are rows of the table.
    let sampled = Arc::new(Buffer::new(&gpu, &[3u32, 10]).unwrap());
    let at = |sources: &[RowSource]| {
        let positions = vec![1; sources.len()];
        let there = Arc::new(Buffer::new(&gpu, &DeviceRows::words(sources, &positions, &[]).unwrap()).unwrap());
        let rows = Arc::new(DeviceRows::within((&there, 0), Some(&sampled), sources, &positions, &[]));
        device::embed(&gpu, &embedding, &soft, &rows)
    };
    let got = at(&[RowSource::Sampled(1), token(4), RowSource::Sampled(0)]).unwrap();
    assert_eq!(flat(&got), flat(&at(&[token(10), token(4), token(3)]).unwrap()));
    assert!(at(&[RowSource::Sampled(2)]).unwrap_err().to_string().contains("Sampled(2)"));
    assert!(DeviceRows::new(&gpu, &[RowSource::Token(1)], &[0, 1], &[]).is_err());
}

/// Norm, turn and write in one launch, against the three CPU ops, for whole and partial rotation and none.
#[test]
fn projections_into_the_pool() {
    for (m, heads, kv_heads, head_dim, half) in
        [(1, 1, 1, 2, 1), (5, 4, 2, 8, 4), (3, 7, 1, 64, 32), (3, 2, 2, 80, 16), (2, 3, 1, 256, 128), (2, 2, 1, 6, 0)]
    {
        for dtype in TYPES {
            for normed in [false, true] {
                check_projection(m, heads, KvLayout { kv_heads, head_dim }, half, dtype, normed);
            }
        }
    }
}

fn check_projection(m: usize, heads: usize, layout: KvLayout, half: usize, dtype: DType, normed: bool) {
    let KvLayout { kv_heads, head_dim } = layout;
    let (width, kv_width) = ((heads + 2 * kv_heads) * head_dim, kv_heads * head_dim);
    let (x, narrow) = rounded(noise(m, m * width), (m, width), dtype);
    let positions: Vec<u32> = (0..m as u32).map(|i| 1000 * i + 7).collect();
    let slots: Vec<u32> = (0..m as u32).map(|i| 3 * i + 2).collect();
    let frequencies = |machine: &Arc<Machine>| {
        let inv_freq = (0..half).map(|i| 10f32.powf(-(i as f32) / 7.0)).collect();
        Arc::new(Frequencies { inv_freq: Vector::new(inv_freq, machine).unwrap(), scale: 1.1 })
    };
    let norm = |machine: &Arc<Machine>| {
        normed.then(|| HeadNorm::new(noise(7, head_dim), noise(8, head_dim), 1e-5, [heads, kv_heads], machine).unwrap())
    };
    let cpu = Machine::new(1);
    let mut want = x;
    if let Some(norm) = norm(&cpu) {
        want = norm.forward(&want).unwrap();
    }
    if half > 0 {
        let turned = Heads { count: heads + kv_heads, dim: head_dim };
        want = rope::rope(&want, &frequencies(&cpu).at(&positions), turned, &cpu).unwrap();
    }
    let want = flat(&want);
    let within = 3.0 * tolerance(dtype);
    let what = format!("{m} rows, {heads} heads, {layout:?}, {half} pairs, {dtype:?}, norm {normed}");
    let (mut first_q, mut first_kv, mut first_apart) = (None, None, None);
    for order in ORDERS {
        let gpu = Gpu::emulated(order);
        let machine = Machine::with_gpu(1, gpu.clone());
        let rows = Arc::new(DeviceRows::new(&gpu, &vec![RowSource::Token(0); m], &positions, &slots).unwrap());
        let slabs = Slabs::new(&gpu, dtype, 3 * m + 2, layout).unwrap();
        let rope = (half > 0).then(|| frequencies(&machine));
        let projection = Projection { heads, norm: norm(&machine), rope: rope.clone() };
        let q = project(&gpu, &narrow, &rows, &slabs, &projection).unwrap();
        let part = |from: usize, len: usize| -> Vec<f32> {
            want.chunks_exact(width).flat_map(|row| row[from..from + len].to_vec()).collect()
        };
        agree(&what, &flat(&q), &part(0, heads * head_dim), within, &mut first_q);
        let kv = slabs.read(&slots).unwrap();
        agree(&what, &kv, &part(heads * head_dim, 2 * kv_width), within, &mut first_kv);
        // Slots of nobody keep their poison.
        assert!(slabs.read(&[0, 1]).unwrap().iter().all(|v| v.is_nan()), "{what}");
        // The ops of training, one after the other.
        let mut apart = narrow.clone();
        if let Some(norm) = norm(&machine) {
            apart = norm.forward(&apart).unwrap();
        }
        if let Some(rope) = &rope {
            apart = rope::device::rope(&gpu, &apart, &rows, rope, heads, layout).unwrap();
        }
        agree(&what, &flat(&apart), &want, 2.0 * within, &mut first_apart);
    }
}

/// The turn back undoes the turn, and is its gradient.
#[test]
fn rope_turns_back() {
    let (gpu, layout) = (Gpu::emulated(0), KvLayout { kv_heads: 1, head_dim: 8 });
    let machine = Machine::with_gpu(1, gpu.clone());
    let frequencies = Frequencies { inv_freq: Vector::new(vec![1.0, 0.1, 0.01], &machine).unwrap(), scale: 1.0 };
    let rows = Arc::new(DeviceRows::new(&gpu, &[RowSource::Token(0); 3], &[0, 9, 4000], &[]).unwrap());
    let x = Var::from_vec(noise(5, 3 * 4 * 8), (3, 32), &Device::Cpu).unwrap();
    let y = rope::device::rope(&gpu, &x, &rows, &Arc::new(frequencies), 2, layout).unwrap();
    // Rotations are orthogonal: taking y itself back gives x.
    let all = crate::ops::seed::backward_from(&y, &y.detach()).unwrap();
    agree("rope back", &flat(all.get(&x).unwrap()), &flat(&x), 1e-6, &mut None);
}

#[test]
fn stored_rows_come_back_as_they_are() {
    let (gpu, layout) = (Gpu::emulated(1), KvLayout { kv_heads: 2, head_dim: 5 });
    for dtype in TYPES {
        let slabs = Slabs::new(&gpu, dtype, 9, layout).unwrap();
        let (stride, column) = (50, 20);
        let (rows, _) = rounded(noise(3, 3 * stride), (3, stride), dtype);
        let rows = flat(&rows);
        let buffer = Buffer::new(&gpu, &rows).unwrap();
        slabs.copy(&gpu, &buffer, column, stride, &[8, 0, 4]).unwrap();
        let want: Vec<f32> = rows.chunks_exact(stride).flat_map(|r| r[column..column + 20].to_vec()).collect();
        assert_eq!(slabs.read(&[8, 0, 4]).unwrap(), want);
        assert!(slabs.copy(&gpu, &buffer, column, stride, &[9]).is_err(), "a slot outside");
        assert!(slabs.copy(&gpu, &buffer, 31, stride, &[1]).is_err(), "columns outside");
        assert!(slabs.copy(&gpu, &buffer, column, stride, &[1, 2, 3, 5]).is_err(), "rows outside");
        slabs.poison(0, 4).unwrap();
        assert!(slabs.read(&[0]).unwrap().iter().all(|v| v.is_nan()));
        assert_eq!(slabs.read(&[4]).unwrap(), want[40..60]);
    }
}
