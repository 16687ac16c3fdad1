#![allow(clippy::unwrap_used)]
use super::*;
use crate::ops::float::{bf16_to_f32, f32_to_bf16};
use candle_core::Device;

fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut s = seed | 1;
    move || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut r = random(seed);
    (0..n).map(|_| r()).collect()
}

fn has(isa: Isa) -> bool {
    tile::select(Kind::Bf16, isa).is_some() && tile::select(Kind::F32, isa).is_some()
}

fn both(w: &[f32], n: usize, k: usize, isa: Isa) -> [Packed; 2] {
    let half: Vec<half::bf16> = w.iter().map(|v| half::bf16::from_f32(*v)).collect();
    [Packed::f32(w, n, k, isa), Packed::bf16(&half, n, k, isa)]
}

fn run(p: &Packed, x: &[f32], m: usize, pool: &Pool) -> Vec<u32> {
    let mut y = vec![f32::NAN; m * p.n()];
    p.forward(x, m, &mut y, &mut Scratch::default(), pool);
    y.iter().map(|v| v.to_bits()).collect()
}

const SHAPES: [(usize, usize); 6] = [(1, 1), (31, 33), (33, 127), (64, 256), (97, 896), (40, 2050)];

/// Any row of any batch has the bits of the row alone, with 1, 2 and 3 threads.
#[test]
fn bits_do_not_depend_on_rows_or_threads() {
    const M: usize = 40;
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    for (n, k) in SHAPES {
        let (w, x) = (values(n * k, 7), values(M * k, 9));
        for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|i| has(*i)) {
            for p in both(&w, n, k, isa) {
                let alone: Vec<u32> = (0..M).flat_map(|i| run(&p, &x[i * k..][..k], 1, &pools[0])).collect();
                for m in [1, 2, 3, 5, 12, 13, 24, 25, 31, M] {
                    let start = (m * 13) % (M - m + 1); // other neighbours, other positions
                    for pool in &pools {
                        let got = run(&p, &x[start * k..(start + m) * k], m, pool);
                        assert!(got == alone[start * n..(start + m) * n], "{:?} {isa:?} {n}x{k} m={m}", p.kind());
                    }
                }
            }
        }
    }
}

/// Against f64: f32 within rounding of the sum, bf16 likewise once its inputs are rounded.
#[test]
fn agrees_with_f64() {
    let (m, n, k) = (13, 65, 2050);
    let (w, x) = (values(n * k, 3), values(m * k, 4));
    let round = |v: &[f32]| -> Vec<f32> { v.iter().map(|v| bf16_to_f32(f32_to_bf16(*v))).collect() };
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|i| has(*i)) {
        for p in both(&w, n, k, isa) {
            let (w, x2) = if p.kind() == Kind::F32 { (w.clone(), x.clone()) } else { (round(&w), round(&x)) };
            let y = run(&p, &x, m, &Pool::new(2));
            let (mut error, mut norm) = (0f64, 0f64);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|l| f64::from(x2[i * k + l]) * f64::from(w[j * k + l])).sum();
                    error += (f64::from(f32::from_bits(y[i * n + j])) - want).powi(2);
                    norm += want * want;
                }
            }
            let relative = (error / norm).sqrt();
            assert!(relative < 2e-6, "{:?} {isa:?}: {relative}", p.kind());
        }
    }
}

#[test]
fn rows_come_back_as_packed() {
    let (n, k) = (70, 35);
    let w = values(n * k, 5);
    for p in both(&w, n, k, Isa::Auto) {
        let mut row = vec![0f32; k];
        for j in [0, 31, 32, 69] {
            p.row(j, &mut row);
            let want = |v: &f32| if p.kind() == Kind::F32 { *v } else { bf16_to_f32(f32_to_bf16(*v)) };
            assert!(row.iter().zip(&w[j * k..]).all(|(a, b)| *a == want(b)));
        }
    }
}

#[test]
fn nan_reaches_its_own_row_only() {
    let (n, k) = (40, 256);
    let mut x = vec![1f32; 2 * k];
    x[k + 3] = f32::NAN;
    for p in both(&vec![0.5; n * k], n, k, Isa::Auto) {
        let y: Vec<f32> = run(&p, &x, 2, &Pool::new(1)).into_iter().map(f32::from_bits).collect();
        assert!(y[..n].iter().all(|v| *v == 128.0) && y[n..].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn bias_and_residual_are_added() {
    let t = |v: &[f32], shape: (usize, usize)| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
    let cpu = Cpu::new(1);
    let b = Tensor::new(&[10f32], &Device::Cpu).unwrap();
    let weights = [t(&[1., 2.], (1, 2)), t(&[3., 4.], (1, 2))];
    let linear = Linear::new(&weights, &[None, Some(b)], &cpu).unwrap();
    let x = t(&[1., 1.], (1, 2));
    assert_eq!(linear.forward(&x).unwrap().to_vec2::<f32>().unwrap(), [[3., 17.]]);
    assert_eq!(linear.forward_add(&x, &t(&[100., 200.], (1, 2))).unwrap().to_vec2::<f32>().unwrap(), [[103., 217.]]);
    let e = linear.forward(&t(&[1.; 3], (1, 3))).unwrap_err().to_string();
    assert!(e.contains("[1, 3]") && e.contains("[2, 2]"), "{e}");
}
