#![allow(clippy::unwrap_used)]
use super::*;
use crate::ops::Pool;
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
    [Kind::F32, Kind::Bf16, Kind::Int8].into_iter().all(|kind| tile::select(kind, isa).is_some())
}

fn kinds(w: &[f32], n: usize, k: usize, isa: Isa) -> [Packed; 3] {
    let half: Vec<half::bf16> = w.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let arena = Arena::default();
    [Packed::f32(w, n, k, isa, &arena), Packed::bf16(&half, n, k, isa, &arena), Packed::int8(w, n, k, isa, &arena)]
}

/// The weights that a packed one stands for.
fn rows(p: &Packed) -> Vec<f32> {
    let mut w = vec![0f32; p.n() * p.k()];
    w.chunks_exact_mut(p.k()).enumerate().for_each(|(j, row)| p.row(j, row));
    w
}

/// x as a product rounds it.
fn rounded(kind: Kind, x: &[f32], k: usize) -> Vec<f32> {
    match kind {
        Kind::F32 => x.to_vec(),
        Kind::Bf16 => x.iter().map(|v| bf16_to_f32(f32_to_bf16(*v))).collect(),
        Kind::Int8 => x.chunks(k).flat_map(|row| row.chunks(256)).flat_map(int8).collect(),
    }
}

/// A group of values as int8 with one scale, by division and libm's rounding.
fn int8(values: &[f32]) -> Vec<f32> {
    let scale = f64::from(values.iter().fold(0f32, |most, v| most.max(v.abs()))) / 127.0;
    values.iter().map(|v| ((f64::from(*v) / scale).round_ties_even() * scale) as f32).collect()
}

fn run(p: &Packed, x: &[f32], m: usize, pool: &Pool) -> Vec<u32> {
    let y = p.forward(x, m, Addends::default(), &mut Scratch::default(), pool);
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
        for isa in [Isa::Avx512, Isa::Avx512Widened, Isa::Avx2, Isa::Portable].into_iter().filter(|i| has(*i)) {
            for p in kinds(&w, n, k, isa) {
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

/// x beyond L2 goes by blocks of k and of rows, dy too, and by several units of panels: each row's bits are those alone.
#[test]
fn blocks_change_no_bits() {
    let (m, n, k) = (137, 500, 5000);
    let pool = Pool::new(2);
    let (w, x) = (values(n * k, 11), values(m * k, 12));
    for p in kinds(&w, n, k, Isa::Auto) {
        let all = run(&p, &x, m, &pool);
        for i in [0, 63, m - 1] {
            assert!(run(&p, &x[i * k..][..k], 1, &pool) == all[i * n..][..n], "{:?} row {i}", p.kind());
        }
    }
    let (w, dy) = (values(n * k, 13), values(m * k, 14));
    for p in kinds(&w, k, n, Isa::Auto) {
        let back = |dy: &[f32], m| p.backward(dy, m, &mut Scratch::default(), &pool);
        let all = back(&dy, m);
        for i in [0, 63, m - 1] {
            assert!(back(&dy[i * k..][..k], 1) == all[i * n..][..n], "{:?} row {i} of dy", p.kind());
        }
    }
}

/// Against f64, of the rounded inputs and weights: what is left is the rounding of the sum, and for int8, where a value lies
/// between two steps almost evenly, a step.
#[test]
fn agrees_with_f64() {
    let (m, n, k) = (13, 65, 2050);
    let (w, x) = (values(n * k, 3), values(m * k, 4));
    for isa in [Isa::Avx512, Isa::Avx512Widened, Isa::Avx2, Isa::Portable].into_iter().filter(|i| has(*i)) {
        for p in kinds(&w, n, k, isa) {
            let (w, x) = (rows(&p), rounded(p.kind(), &x, k));
            let y = run(&p, &x, m, &Pool::new(2));
            let (mut error, mut norm) = (0f64, 0f64);
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l])).sum();
                    error += (f64::from(f32::from_bits(y[i * n + j])) - want).powi(2);
                    norm += want * want;
                }
            }
            let relative = (error / norm).sqrt();
            assert!(relative < 2e-6, "{:?} {isa:?}: {relative}", p.kind());
        }
    }
}

/// One bit pattern on every instruction set that multiplies and adds in one rounding.
#[test]
fn instruction_sets_agree() {
    let found: Vec<Isa> = [Isa::Avx512, Isa::Avx512Widened, Isa::Avx2].into_iter().filter(|i| has(*i)).collect();
    if found.len() < 2 {
        return eprintln!("skipped: this CPU has only {found:?} of AVX-512 with VNNI, with and without bf16, and AVX2");
    }
    let (m, n, k) = (7, 65, 700);
    let (w, x) = (values(n * k, 3), values(m * k, 4));
    let first = kinds(&w, n, k, found[0]);
    for isa in &found[1..] {
        for (a, b) in first.iter().zip(&kinds(&w, n, k, *isa)) {
            assert!(run(a, &x, m, &Pool::new(2)) == run(b, &x, m, &Pool::new(2)), "{:?} {isa:?}", a.kind());
        }
    }
}

#[test]
fn rows_come_back_as_packed() {
    let (n, k) = (70, 335);
    let w = values(n * k, 5);
    for p in kinds(&w, n, k, Isa::Auto) {
        let want = rounded(p.kind(), &w, k);
        let most = rows(&p).iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(most <= if p.kind() == Kind::Int8 { 1e-6 } else { 0.0 }, "{:?}: {most}", p.kind());
    }
}

/// A weight is off by half a step of its group at most: 1/254 of the largest.
#[test]
fn the_error_of_int8_is_half_a_step() {
    let (n, k) = (33, 700);
    let w = values(n * k, 8);
    let p = Packed::int8(&w, n, k, Isa::Auto, &Arena::default());
    for (got, want) in rows(&p).chunks(k).zip(w.chunks(k)) {
        for (got, want) in got.chunks(256).zip(want.chunks(256)) {
            let most = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(off <= most / 254.0 * 1.0001 && off > most / 300.0, "{off} {most}");
        }
    }
}

#[test]
fn nan_reaches_its_own_row_only() {
    let (n, k) = (40, 256);
    let mut x = vec![1f32; 2 * k];
    x[k + 3] = f32::NAN;
    for p in kinds(&vec![0.5; n * k], n, k, Isa::Auto) {
        let y: Vec<f32> = run(&p, &x, 2, &Pool::new(1)).into_iter().map(f32::from_bits).collect();
        assert!(y[..n].iter().all(|v| (v - 128.0).abs() < 1e-3) && y[n..].iter().all(|v| v.is_nan()));
    }
}

#[test]
fn bias_and_residual_are_added() {
    let t = |v: &[f32], shape: (usize, usize)| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
    let machine = Machine::new(1);
    let b = Tensor::new(&[10f32], &Device::Cpu).unwrap();
    let weights = [t(&[1., 2.], (1, 2)), t(&[3., 4.], (1, 2))];
    let linear = Linear::new(&weights, &[None, Some(b)], &machine).unwrap();
    let x = t(&[1., 1.], (1, 2));
    assert_eq!(linear.forward(&x).unwrap().to_vec2::<f32>().unwrap(), [[3., 17.]]);
    assert_eq!(linear.forward_add(&x, &t(&[100., 200.], (1, 2))).unwrap().to_vec2::<f32>().unwrap(), [[103., 217.]]);
    let e = linear.forward(&t(&[1.; 3], (1, 3))).unwrap_err().to_string();
    assert!(e.contains("[1, 3]") && e.contains("[2, 2]"), "{e}");
}
