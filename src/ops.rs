//! Every tensor op that the decoder needs beyond candle's, one file an op: CPU code, gradient, and the only
//! `unsafe` of the crate.
//!
//! # Rules
//! * A row of the result depends on that row's input alone: sums run in one fixed order whatever the number of
//!   rows, the threads or the neighbours. That is what makes a request's bits independent of its batch.
//! * Activations on the CPU are f32 whatever the type of the weights.
//! * An op without a gradient says so: candle's default `bwd` of a custom op is an error, and none of ours
//!   returns `None` in its place.
/// Compiles one straight-line body for AVX-512, AVX2 and the baseline, and picks at run time. No contraction
/// happens, so all three give the same bits.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                use crate::ops::float;
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) {
                    body($($arg),*)
                }
                match float::isa() {
                    // SAFETY: the features were found.
                    float::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    float::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    float::Isa::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}

#[macro_use]
mod lanes;

pub mod activation;
pub mod cross_entropy;
pub mod dense;
pub mod embed;
pub mod feed_forward;
pub mod float;
pub mod gpu;
#[cfg(test)]
mod gradient;
pub mod kv_write;
pub mod limits;
pub mod linear;
pub mod lstm;
mod machine;
pub mod mapped;
pub mod memory;
pub mod norm;
pub mod pool;
pub mod prefix_attention;
pub mod rope;
pub mod sample;
pub mod seed;

pub use linear::Linear;
pub use machine::{Machine, Vector};
pub use pool::Pool;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};

/// The contiguous elements of a CPU tensor of type `T`, or an error that names the op.
fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [T]> {
    let Ok(all) = storage.as_slice() else {
        bail!("{op}: the tensor must be {:?}, it is {:?}", T::DTYPE, storage.dtype());
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => bail!("{op}: the tensor must be contiguous, it is {layout:?}"),
    }
}

/// Rows in one unit of work of an elementwise op.
const ROWS: usize = 8;
/// Elements below which one thread does it all: waking another costs more.
const FEW: usize = 1 << 14;

/// `[m, width]`, made by `f(first row, rows)` for blocks of rows, over the threads where there are many.
///
/// Nothing is zeroed before: `f` must write every element, and read none that it has not written.
fn make_rows(pool: &Pool, m: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut all = Vec::<f32>::with_capacity(m * width);
    let out = Shared(all.as_mut_ptr());
    let block = |from: usize, to: usize| {
        // SAFETY: blocks are disjoint and within the capacity; `f` only writes to what has no value yet.
        let rows = unsafe { std::slice::from_raw_parts_mut(out.get().add(from * width), (to - from) * width) };
        f(from, rows);
    };
    if m * width < FEW {
        block(0, m);
    } else {
        pool.for_each(m.div_ceil(ROWS), |i| block(i * ROWS, m.min((i + 1) * ROWS)));
    }
    // SAFETY: every block has been written.
    unsafe { all.set_len(m * width) };
    all
}

/// A raw pointer that threads of one [`Pool::run`] share to write disjoint ranges.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: the holder writes disjoint ranges only; each use says which.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(self) -> *mut T {
        self.0
    }
}
