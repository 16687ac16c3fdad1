#![allow(clippy::unwrap_used)]
use super::super::{Loss, of_row};
use super::*;
use crate::ops::Machine;
use crate::ops::gpu::tests::rows::{ORDERS, TYPES, agree, flat, noise, rounded, tolerance};
use candle_core::Device;

fn logits(n: usize, vocab: usize) -> Vec<f32> {
    noise(n + vocab, n * vocab).iter().map(|z| z * 12.0).collect()
}

fn tensor(values: &[f32], width: usize) -> Tensor {
    Tensor::from_slice(values, (values.len() / width, width), &Device::Cpu).unwrap()
}

/// Losses, hits and gradient of each row by the CPU's op.
fn reference(
    logits: &[f32],
    targets: &[u32],
    factors: Option<&[f32]>,
    cap: Option<f64>,
) -> (Vec<f32>, Vec<bool>, Vec<f32>) {
    let (mut nll, mut greedy, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
    for (r, (row, target)) in logits.chunks(logits.len() / targets.len()).zip(targets).enumerate() {
        let (mut row, mut loss) = (row.to_vec(), Loss::default());
        of_row(&mut row, *target as usize, cap.map(|c| c as f32), true, &mut loss);
        nll.push(loss.nll as f32);
        greedy.push(loss.greedy);
        gradient.extend(row.iter().map(|d| d * factors.map_or(1.0, |f| f[r])));
    }
    (nll, greedy, gradient)
}

/// Vocabularies below, at and beyond what a block takes at once, with whole packs and without.
#[test]
fn agrees_with_the_cpu() {
    for (n, vocab) in [(2, 1), (3, 2), (5, 31), (3, 1000), (2, 8192), (2, 20_005)] {
        let z = logits(n, vocab);
        let most = |row: &[f32]| (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32;
        // The likeliest, the last, and something between.
        let targets: Vec<u32> = z
            .chunks(vocab)
            .enumerate()
            .map(|(r, row)| [most(row), vocab as u32 - 1, vocab as u32 / 3][r % 3])
            .collect();
        let factors = noise(9, n);
        for (cap, factors) in [(None, None), (Some(5.0), Some(&factors[..]))] {
            let (nll, greedy, gradient) = reference(&z, &targets, factors, cap);
            assert!(greedy[0]);
            for dtype in TYPES {
                let (mut first, mut first_back) = (None, None);
                for order in ORDERS {
                    let gpu = Gpu::emulated(order);
                    let got = losses(&gpu, &tensor(&z, vocab), &targets, factors, cap, Some(dtype)).unwrap();
                    let what = format!("[{n}, {vocab}] {cap:?} {dtype:?}");
                    agree(&what, &got.nll, &nll, 2e-6, &mut first);
                    assert_eq!(got.greedy, greedy, "{what}");
                    let (made, within) =
                        (got.gradient.unwrap(), if dtype == DType::F32 { 1e-6 } else { tolerance(dtype) });
                    assert_eq!(made.dtype(), dtype);
                    // Of most logits the gradient is small: relative to itself, down to where f16 has no more bits.
                    for (i, (g, w)) in flat(&made).iter().zip(&gradient).enumerate() {
                        let least = if dtype == DType::F16 { 6e-8 } else { 1e-9 };
                        assert!((g - w).abs() <= 20.0 * within * w.abs() + least, "{what} [{i}]: {g}, the CPU has {w}");
                    }
                    agree(&what, &flat(&made), &gradient, within, &mut first_back);
                    let alone = losses(&gpu, &tensor(&z, vocab), &targets, factors, cap, None).unwrap();
                    assert!(alone.gradient.is_none() && alone.nll == got.nll && alone.greedy == greedy);
                }
            }
        }
    }
}

#[test]
fn the_lower_id_wins_a_tie() {
    let mut z = vec![0f32; 9000];
    for i in [5, 700, 8999] {
        z[i] = 3.0;
    }
    let rows: Vec<f32> = [&z[..], &z, &z, &z].concat();
    let gpu = Gpu::emulated(5);
    let got = losses(&gpu, &tensor(&rows, 9000), &[5, 700, 8999, 4], None, None, None).unwrap();
    assert_eq!(got.greedy, [true, false, false, false]);
    // A cap that saturates makes ties of what was none, as it does for the CPU.
    let z = [400f32, 500.0, 1.0];
    let got = losses(&gpu, &tensor(&[z, z].concat(), 3), &[0, 1], None, Some(2.0), None).unwrap();
    assert_eq!(got.greedy, reference(&[z, z].concat(), &[0, 1], None, Some(2.0)).1);
    assert_eq!(got.greedy, [true, false]);
}

/// The gradient of f32 on the device against differences in f64.
#[test]
fn gradients_agree_with_differences() {
    let vocab = 23;
    let z = logits(1, vocab);
    for cap in [None, Some(4.0)] {
        let got = losses(&Gpu::emulated(0), &tensor(&z, vocab), &[7], Some(&[0.25]), cap, Some(DType::F32)).unwrap();
        let got = flat(&got.gradient.unwrap());
        let loss = |at: usize, by: f64| {
            let z = |i: usize| {
                let z = f64::from(z[i]) + if i == at { by } else { 0.0 };
                cap.map_or(z, |c: f64| c * (z / c).tanh())
            };
            0.25 * ((0..vocab).map(|i| z(i).exp()).sum::<f64>().ln() - z(7))
        };
        for (i, got) in got.iter().enumerate() {
            let want = (loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5;
            assert!((f64::from(*got) - want).abs() < 1e-6, "{cap:?} {i}: {got} {want}");
        }
    }
}

/// The gradient may take the place of the logits, each row that of its own: the kernel reads ahead of what it writes.
#[test]
fn in_place() {
    let (n, vocab) = (2, 17_000);
    let (z, targets) = (logits(n, vocab), [16_999u32, 3]);
    let gradient = reference(&z, &targets, None, None).2;
    for dtype in TYPES {
        let size = dtype.size_in_bytes();
        for order in ORDERS {
            let gpu = Gpu::emulated(order);
            let (logits, targets) = (Buffer::new(&gpu, &z).unwrap(), Buffer::new(&gpu, &targets).unwrap());
            let results = Buffer::poisoned(&gpu, 8 * n).unwrap();
            let call = gpu.call("cross_entropy", dtype).buffer(&logits, 0, 4).buffer(&targets, 0, 4).pointer(0);
            let call = call.buffer(&results, 0, 4).buffer(&results, n, 4).buffer(&logits, 0, 4);
            let call = call.int(vocab).int(vocab * 4 / size).float(0.0);
            // SAFETY: the kernel's arguments.
            unsafe { call.launch(Grid { blocks: [n as u32, 1, 1], threads: 1024, shared: 0 }).unwrap() };
            let row = |r: usize| -> Vec<f32> {
                let at = r * vocab * 4 / size;
                match dtype {
                    DType::F32 => logits.read::<f32>(at, vocab).unwrap(),
                    DType::BF16 => logits.read::<half::bf16>(at, vocab).unwrap().iter().map(|v| v.to_f32()).collect(),
                    _ => logits.read::<half::f16>(at, vocab).unwrap().iter().map(|v| v.to_f32()).collect(),
                }
            };
            let got = [row(0), row(1)].concat();
            agree(&format!("{dtype:?} {order}"), &got, &gradient, tolerance(dtype), &mut None);
        }
    }
}

#[test]
fn what_is_no_number_shows() {
    let gpu = Gpu::emulated(0);
    let got = losses(&gpu, &tensor(&[1.0, f32::NAN, 0.0, 1.0, 2.0, 3.0], 3), &[0, 2], None, None, None).unwrap();
    assert!(got.nll[0].is_nan() && !got.greedy[0] && got.greedy[1] && got.nll[1].is_finite());
    let e = losses(&gpu, &tensor(&[1.0, 2.0], 2), &[2], None, None, None).err().unwrap().to_string();
    assert!(e.contains("target 2"), "{e}");
}

/// The whole op, over more rows than a chunk, with the head's products.
#[test]
fn over_a_head() {
    let (n, width, vocab) = (CHUNK + 3, 5, 11);
    let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % vocab as u32).collect();
    let (x, _) = rounded(noise(1, n * width), (n, width), DType::F32);
    let w = tensor(&noise(2, vocab * width), width);
    let run = |machine| {
        let head = Linear::new(std::slice::from_ref(&w), &[None], &machine).unwrap();
        super::super::cross_entropy(&x, &targets, &head, Some(1.5), true).unwrap()
    };
    let (want, got) = (run(Machine::new(1)), run(Machine::with_gpu(1, Gpu::emulated(0))));
    assert_eq!(want.greedy, got.greedy);
    let narrow = |v: &[f64]| v.iter().map(|x| *x as f32).collect::<Vec<_>>();
    agree("losses", &narrow(&got.nll), &narrow(&want.nll), 2e-6, &mut None);
    agree("gradient", &flat(&got.gradient.unwrap()), &flat(&want.gradient.unwrap()), 2e-6, &mut None);
}
