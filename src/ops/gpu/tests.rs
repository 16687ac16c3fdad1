#![allow(clippy::unwrap_used)]
pub mod rows;

use super::*;
use candle_core::Tensor;

#[test]
fn a_buffer_keeps_to_its_size() {
    let gpu = Gpu::emulated(0);
    let buffer = Buffer::new(&gpu, &[1u32, 2, 3]).unwrap();
    assert_eq!(buffer.read::<u32>(1, 2).unwrap(), [2, 3]);
    buffer.write(2, &[7u32]).unwrap();
    assert_eq!(buffer.read::<u32>(0, 3).unwrap(), [1, 2, 7]);
    assert!(buffer.read::<u32>(2, 2).is_err() && buffer.write(3, &[1u32]).is_err());
    assert!(buffer.write(usize::MAX, &[1u32]).is_err());
    let poison = Buffer::poisoned(&gpu, 8).unwrap().read::<f32>(0, 2).unwrap();
    assert!(poison.iter().all(|v| v.is_nan()), "debug builds start with NaN");
}

/// What a kernel does not say is an error with its name, and a call without blocks is none.
#[test]
fn errors_name_the_kernel() {
    let gpu = Gpu::emulated(0);
    let grid = Grid { blocks: [1, 1, 1], threads: 32, shared: 0 };
    let call = |kernel, dtype, grid| {
        // SAFETY: there is no such kernel.
        unsafe { gpu.call(kernel, dtype).launch(grid) }.err().map(|e| e.to_string())
    };
    let e = call("missing", DType::F32, grid).unwrap();
    assert!(e.contains("missing_f32") && e.contains("no such kernel"), "{e}");
    let e = call("missing", DType::I64, grid).unwrap();
    assert!(e.contains("missing") && e.contains("I64"), "{e}");
    assert_eq!(call("missing", DType::F32, Grid { blocks: [0, 1, 1], ..grid }), None);
    // SAFETY: never launched.
    let e = unsafe { gpu.call("missing", DType::BF16).pointer(24).aligned().launch(grid) }.unwrap_err().to_string();
    assert!(e.contains("argument 0 is not aligned"), "{e}");
}

/// cuBLAS's column-major formula against a plain row-major product.
#[test]
fn products_of_rows() {
    let gpu = Gpu::emulated(0);
    let (m, n, k) = (2, 3, 4);
    let a: Vec<f32> = (0..m * k).map(|i| i as f32 - 3.0).collect();
    let b: Vec<f32> = (0..n * k).map(|i| (i * i % 7) as f32).collect();
    for side in [Side::Transposed, Side::Plain] {
        for beta in [0.0, 1.0] {
            let at = |l: usize, j: usize| if side == Side::Transposed { b[j * k + l] } else { b[l * n + j] };
            let start = if beta == 0.0 { f32::NAN } else { 0.5 };
            let (x, w) = (Buffer::new(&gpu, &a).unwrap(), Buffer::new(&gpu, &b).unwrap());
            let y = Buffer::new(&gpu, &vec![start; m * n]).unwrap();
            let product = Gemm {
                m,
                n,
                k,
                beta,
                dtype: DType::F32,
                out: DType::F32,
                a: x.pointer(),
                b: w.pointer(),
                side,
                c: y.pointer(),
            };
            // SAFETY: the buffers have these sizes.
            unsafe { product.run(&gpu) }.unwrap();
            let want: Vec<f32> = (0..m * n)
                .map(|i| {
                    (0..k).map(|l| a[i / n * k + l] * at(l, i % n)).sum::<f32>()
                        + beta * if beta == 0.0 { 0.0 } else { start }
                })
                .collect();
            assert_eq!(y.read::<f32>(0, m * n).unwrap(), want, "{side:?} {beta}");
        }
    }
}

struct Normed(Buffer);

impl KernelOp for Normed {
    const NAME: &'static str = "normed";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, candle_core::Shape)> {
        let x = &inputs[0];
        let (rows, width) = x.dims2()?;
        let mut y = gpu.fresh(x.dtype(), rows * width)?;
        let grid = Grid { blocks: [rows as u32, 1, 1], threads: 32, shared: 4 * width as u32 };
        let call = gpu.call("norm", x.dtype()).view(x).buffer(&self.0, 0, 4).pointer(0).fresh(&mut y);
        // SAFETY: the kernel's arguments.
        unsafe { call.int(width).float(1e-6).launch(grid)? };
        Ok((y, (rows, width).into()))
    }
}

#[test]
fn an_op_without_gradient_says_so() {
    let gpu = Gpu::emulated(0);
    let x = candle_core::Var::new(&[[3f32, 4.0]], &Device::Cpu).unwrap();
    let weight = Buffer::new(&gpu, &[1f32, 2.0]).unwrap();
    let y = gpu.apply1(Normed(weight), &x).unwrap();
    let scale = 1.0 / 12.5f32.sqrt();
    let y_values = y.to_vec2::<f32>().unwrap();
    assert!((y_values[0][0] - 3.0 * scale).abs() < 1e-6 && (y_values[0][1] - 8.0 * scale).abs() < 1e-6, "{y_values:?}");
    assert!(y.sum_all().unwrap().backward().unwrap_err().to_string().contains("normed"));
    let turned = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap().t().unwrap();
    let weight = Buffer::new(&gpu, &[1f32, 2.0]).unwrap();
    let e = gpu.apply1(Normed(weight), &turned).unwrap_err().to_string();
    assert!(e.contains("normed") && e.contains("contiguous"), "{e}");
}
