//! Products of matrices on the device: cuBLAS, and plain loops in the emulation. Sums are f32.
use super::{Buffer, Fresh, Gpu, View};
use candle_core::{DType, Result};

/// C `[m, n]` = A `[m, k]` B + beta C, row-major. B is `[k, n]`, or the transpose of a `[n, k]`.
pub struct Gemm {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A.
    pub k: usize,
    /// What is added before: 0 for nothing, 1 for what C holds.
    pub beta: f32,
    /// Type of A and B.
    pub dtype: DType,
    /// Type of C.
    pub out: DType,
    /// Where A starts.
    pub a: u64,
    /// Where B starts.
    pub b: u64,
    /// How B lies.
    pub side: Side,
    /// Where C starts.
    pub c: u64,
}

/// How the right factor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `[k, n]`.
    Plain,
    /// `[n, k]`: a layer's weight, which is used transposed.
    Transposed,
}

/// The same product, column-major: what cuBLAS takes. A row-major C = A B is the column-major C^T = B^T A^T.
pub(super) struct Columns {
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub a: Operand,
    pub b: Operand,
    pub c: Operand,
    pub beta: f32,
    pub dtype: DType,
    pub out: DType,
}

pub(super) struct Operand {
    pub pointer: u64,
    pub stride: i32,
    pub turned: bool,
}

impl Gemm {
    /// `[m, n, k]`; the left factor, the right one with its type and how it lies; C and its type.
    pub fn new(
        [m, n, k]: [usize; 3],
        (a, b, dtype, side): (&View<'_>, &Buffer, DType, Side),
        c: &mut Fresh,
        out: DType,
        beta: f32,
    ) -> Self {
        Gemm { m, n, k, beta, dtype, out, a: a.pointer(), b: b.pointer(), side, c: c.pointer() }
    }

    /// # Errors
    /// What the library says; a size beyond `int`.
    ///
    /// # Safety
    /// The addresses span matrices of these sizes and types on `gpu`, and C overlaps neither A nor B.
    pub unsafe fn run(&self, gpu: &Gpu) -> Result<()> {
        if self.m == 0 || self.n == 0 {
            return Ok(());
        }
        let columns = self.columns()?;
        match *gpu {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's.
            Gpu::Cuda(ref cuda) => unsafe { cuda.gemm(&columns) },
            // SAFETY: the caller's.
            Gpu::Emulated(_) => unsafe { emulated::gemm(&columns) },
        }
    }

    fn columns(&self) -> Result<Columns> {
        let int = |v: usize| {
            i32::try_from(v).map_err(|_| candle_core::Error::Msg(format!("a matrix of {v} rows or columns")))
        };
        let (m, n, k) = (int(self.m)?, int(self.n)?, int(self.k)?);
        let (stride, turned) = match self.side {
            Side::Plain => (n, false),
            Side::Transposed => (k, true),
        };
        Ok(Columns {
            m: n,
            n: m,
            k,
            a: Operand { pointer: self.b, stride, turned },
            b: Operand { pointer: self.a, stride: k, turned: false },
            c: Operand { pointer: self.c, stride: n, turned: false },
            beta: self.beta,
            dtype: self.dtype,
            out: self.out,
        })
    }
}

mod emulated {
    //! cuBLAS's formula, read from its manual and not from [`super::Gemm`], so that a wrong translation shows.
    use super::{Columns, Operand};
    use candle_core::{DType, Result, bail};
    use half::{bf16, f16};

    pub unsafe fn gemm(g: &Columns) -> Result<()> {
        let at = |o: &Operand, row: i32, column: i32| {
            let (row, column) = if o.turned { (column, row) } else { (row, column) };
            (column * o.stride + row) as usize
        };
        for i in 0..g.m {
            for j in 0..g.n {
                let mut sum = 0f32;
                for l in 0..g.k {
                    // SAFETY: the caller's addresses span the matrices.
                    unsafe {
                        sum += load(g.dtype, g.a.pointer, at(&g.a, i, l))? * load(g.dtype, g.b.pointer, at(&g.b, l, j))?
                    };
                }
                let to = at(&g.c, i, j);
                // SAFETY: as above. With beta 0 what C holds is not read, NaN or not.
                unsafe {
                    if g.beta != 0.0 {
                        sum += g.beta * load(g.out, g.c.pointer, to)?;
                    }
                    store(g.out, g.c.pointer, to, sum)?;
                }
            }
        }
        Ok(())
    }

    unsafe fn load(dtype: DType, pointer: u64, at: usize) -> Result<f32> {
        // SAFETY: the caller's.
        unsafe {
            Ok(match dtype {
                DType::F32 => *(pointer as *const f32).add(at),
                DType::BF16 => (*(pointer as *const bf16).add(at)).to_f32(),
                DType::F16 => (*(pointer as *const f16).add(at)).to_f32(),
                other => bail!("no product of {other:?}"),
            })
        }
    }

    unsafe fn store(dtype: DType, pointer: u64, at: usize, value: f32) -> Result<()> {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => *(pointer as *mut f32).add(at) = value,
                DType::BF16 => *(pointer as *mut bf16).add(at) = bf16::from_f32(value),
                DType::F16 => *(pointer as *mut f16).add(at) = f16::from_f32(value),
                other => bail!("no product to {other:?}"),
            }
        }
        Ok(())
    }
}
