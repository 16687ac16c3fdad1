#![allow(clippy::unwrap_used)]
use super::*;
use crate::ops::gpu::KernelOp;
use candle_core::{Device, Shape, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::Arc;

#[derive(Clone)]
struct Op {
    w: Arc<Buffer>,
    bias: Option<Arc<Buffer>>,
    n: usize,
    out: DType,
    tiles: usize,
}

impl KernelOp for Op {
    const NAME: &'static str = "rows";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (m, k) = inputs[0].dims2()?;
        let mut y = gpu.fresh(self.out, m * self.n)?;
        let rows = Rows {
            x: &inputs[0],
            w: &self.w,
            bias: self.bias.as_deref(),
            residual: inputs.get(1),
            shape: [m, self.n, k],
        };
        // SAFETY: the shapes are those of the case.
        unsafe { rows.launch_tiles(gpu, &mut y, self.out, self.tiles)? };
        Ok((y, (m, self.n).into()))
    }
}

/// x `[m, k]`, W `[n, k]`, a bias `[n]` and a residual `[m, n]`, rounded to a type.
struct Case {
    dtype: DType,
    x: Tensor,
    w: Tensor,
    bias: Vec<f32>,
    residual: Tensor,
}

impl Case {
    fn new(rng: &mut StdRng, [m, n, k]: [usize; 3], dtype: DType) -> Self {
        let mut tensor = |rows: usize, columns: usize| {
            let values: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let (x, w, residual) = (tensor(m, k), tensor(n, k), tensor(m, n));
        Case { dtype, x, w, residual, bias: (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() }
    }

    fn op(&self, gpu: &Gpu, add: bool, out: DType, tiles: usize) -> Op {
        let w = self.w.flatten_all().unwrap();
        let w = match self.dtype {
            DType::F32 => Buffer::new(gpu, &w.to_vec1::<f32>().unwrap()),
            DType::BF16 => Buffer::new(gpu, &w.to_vec1::<half::bf16>().unwrap()),
            _ => Buffer::new(gpu, &w.to_vec1::<half::f16>().unwrap()),
        };
        let bias = add.then(|| Arc::new(Buffer::new(gpu, &self.bias).unwrap()));
        Op { w: Arc::new(w.unwrap()), bias, n: self.bias.len(), out, tiles }
    }

    /// The first `m` rows, as f32.
    fn run(&self, m: usize, order: u32, add: bool, out: DType, tiles: usize) -> Vec<f32> {
        let gpu = Gpu::emulated(order);
        let (op, x) = (self.op(&gpu, add, out, tiles), self.x.narrow(0, 0, m).unwrap());
        let y = match add {
            true => gpu.apply2(op, &x, &self.residual.narrow(0, 0, m).unwrap()).unwrap(),
            false => gpu.apply1(op, &x).unwrap(),
        };
        assert_eq!(y.dtype(), out);
        y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// In f64, with the error that sums in f32 can have.
    fn reference(&self, add: bool) -> Vec<(f64, f64)> {
        let host = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let (x, w, residual) = (host(&self.x), host(&self.w), host(&self.residual));
        let mut all = Vec::new();
        for (x, residual) in x.iter().zip(&residual) {
            for ((w, bias), residual) in w.iter().zip(&self.bias).zip(residual) {
                let (mut sum, mut size) = if add { (f64::from(*bias) + residual, 2.0) } else { (0.0, 0.0) };
                for (x, w) in x.iter().zip(w) {
                    sum += x * w;
                    size += (x * w).abs();
                }
                // Sums of signs that go both ways: far below the worst case of k roundings.
                all.push((sum, size * 1e-6 + 1e-12));
            }
        }
        all
    }

    /// All rows against the reference, in three orders of threads and in both widths of a block; then fewer rows.
    fn check(&self, add: bool, out: DType) {
        let (m, n) = self.residual.dims2().unwrap();
        let y = self.run(m, 0, add, out, 1);
        let ulp = match out {
            DType::F32 => 0.0,
            DType::BF16 => 1.0 / 256.0,
            _ => 1.0 / 2048.0,
        };
        for (i, (y, (want, error))) in y.iter().zip(self.reference(add)).enumerate() {
            let off = (f64::from(*y) - want).abs();
            assert!(off <= error + want.abs() * ulp, "{:?} -> {out:?}, {i} of [{m}, {n}]: {y}, not {want}", self.x);
        }
        for (order, tiles) in [(1, 1), (7, 1), (0, 4), (7, 4)] {
            assert_eq!(self.run(m, order, add, out, tiles), y, "order {order}, tiles {tiles}");
        }
        for fewer in [1, 2, 3, 5, 9].into_iter().filter(|fewer| *fewer < m) {
            assert_eq!(self.run(fewer, 1, add, out, 1), y[..fewer * n], "{fewer} of {m} rows");
        }
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
fn agree_with_f64_and_rows_keep_their_bits() {
    let mut rng = StdRng::seed_from_u64(1);
    for (i, k) in [1, 2, 7, 8, 31, 32, 63, 64, 96, 257, 896].into_iter().enumerate() {
        for (j, n) in [1, 7, 64].into_iter().enumerate() {
            for (t, dtype) in TYPES.into_iter().enumerate() {
                let m = [1, 16, 2, 10, 5, 8, 9][(i + 2 * j + 3 * t) % 7];
                let out = if (i + j) % 2 == 0 { dtype } else { DType::F32 };
                Case::new(&mut rng, [m, n, k], dtype).check(i % 3 != 1, out);
            }
        }
    }
}

#[test]
fn a_long_k() {
    let mut rng = StdRng::seed_from_u64(2);
    for dtype in TYPES {
        Case::new(&mut rng, [6, 9, 4864], dtype).check(true, dtype);
    }
}

/// As many columns as a vocabulary has tokens, and an odd number of them.
#[test]
fn a_large_n() {
    let mut rng = StdRng::seed_from_u64(3);
    for dtype in TYPES {
        let case = Case::new(&mut rng, [2, 151_937, 8], dtype);
        let y = case.run(2, 7, false, DType::F32, 4);
        for (i, (y, (want, error))) in y.iter().zip(case.reference(false)).enumerate() {
            assert!((f64::from(*y) - want).abs() <= error, "{dtype:?} {i}: {y}, not {want}");
        }
    }
}

/// Where x starts at an odd address, elements are loaded one by one, and the bits are the same.
#[test]
fn alignment_changes_no_bits() {
    let mut rng = StdRng::seed_from_u64(4);
    for dtype in TYPES {
        let case = Case::new(&mut rng, [5, 11, 72], dtype);
        let flat =
            Tensor::cat(&[Tensor::zeros(1, dtype, &Device::Cpu).unwrap(), case.x.flatten_all().unwrap()], 0).unwrap();
        let x = flat.narrow(0, 1, 5 * 72).unwrap().reshape((5, 72)).unwrap();
        let odd = Case { x, w: case.w.clone(), bias: case.bias.clone(), residual: case.residual.clone(), dtype };
        assert_eq!(odd.run(5, 0, true, dtype, 1), case.run(5, 0, true, dtype, 1));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut rng = StdRng::seed_from_u64(5);
    let gpu = Gpu::emulated(0);
    let case = Case::new(&mut rng, [17, 3, 8], DType::BF16);
    let run = |op: Op, x: &Tensor| gpu.apply1(op, x).unwrap_err().to_string();
    assert!(run(case.op(&gpu, false, DType::BF16, 1), &case.x).contains("17 rows"));
    let few = case.x.narrow(0, 0, 2).unwrap();
    assert!(run(case.op(&gpu, false, DType::F16, 1), &few).contains("F16"));
    // None at all are no error.
    let none = gpu.apply1(case.op(&gpu, false, DType::BF16, 1), &case.x.narrow(0, 0, 0).unwrap()).unwrap();
    assert_eq!(none.dims(), [0, 3]);
}
