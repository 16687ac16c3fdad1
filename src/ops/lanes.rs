//! 16 floats that the CPU handles at once: for kernels whose sums must stay in registers.
//!
//! `simd!` leaves vectors to the compiler, which takes arrays of sums apart into single floats. A body of `lanes!` is written
//! over these types instead, and is compiled for AVX-512, AVX2 and the baseline. The first two give the same bits.
use super::float::{BASELINE_FMA, multiply_add};
use half::{bf16, f16};

/// How many.
pub const LANES: usize = 16;

/// 16 floats.
pub trait Lanes: Copy {
    /// All 0.
    fn zero() -> Self;
    /// All `x`.
    fn splat(x: f32) -> Self;
    /// The first 16 of `from`.
    fn load(from: &[f32]) -> Self;
    /// The same from bfloat16; exact.
    fn load_bf16(from: &[bf16]) -> Self;
    /// The same from IEEE half; exact.
    fn load_f16(from: &[f16]) -> Self;
    /// Into the first 16 of `to`.
    fn store(self, to: &mut [f32]);
    /// self * b + c, in one rounding where the CPU can.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// self * b.
    fn mul(self, b: Self) -> Self;
    /// self where it is larger, else b: a NaN in self is passed over.
    fn larger_or(self, b: Self) -> Self;
}

/// A body `<V>` over [`Lanes`], and over the type `S` where there is one, compiled for each instruction set and picked at run time.
macro_rules! lanes {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$v:ident $(, $s:ident: $bound:path)?>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name$(<$s: $bound>)?($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$v: crate::ops::lanes::Lanes $(, $s: $bound)?>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                use crate::ops::{float, lanes};
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512$(<$s: $bound>)?($($arg: $ty),*) {
                    body::<lanes::Avx512 $(, $s)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2$(<$s: $bound>)?($($arg: $ty),*) {
                    body::<lanes::Avx2 $(, $s)?>($($arg),*)
                }
                match float::isa() {
                    // SAFETY: the features were found.
                    float::Isa::Avx512 => return unsafe { avx512$(::<$s>)?($($arg),*) },
                    // SAFETY: as above.
                    float::Isa::Avx2 => return unsafe { avx2$(::<$s>)?($($arg),*) },
                    float::Isa::Baseline => {}
                }
            }
            body::<crate::ops::lanes::Plain $(, $s)?>($($arg),*)
        }
    };
}

/// Plain floats.
#[derive(Clone, Copy)]
pub struct Plain([f32; LANES]);

impl Lanes for Plain {
    #[inline(always)]
    fn zero() -> Self {
        Plain([0.0; LANES])
    }
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Plain([x; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Plain(*from.first_chunk().expect("16 floats"))
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16]) -> Self {
        Plain(from.first_chunk::<LANES>().expect("16 halves").map(bf16::to_f32))
    }
    #[inline(always)]
    fn load_f16(from: &[f16]) -> Self {
        Plain(from.first_chunk::<LANES>().expect("16 halves").map(f16::to_f32))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        to[..LANES].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Plain(std::array::from_fn(|i| multiply_add::<BASELINE_FMA>(self.0[i], b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn larger_or(self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| if self.0[i] > b.0[i] { self.0[i] } else { b.0[i] }))
    }
}

#[cfg(target_arch = "x86_64")]
pub use wide::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod wide {
    use super::{LANES, Lanes};
    use core::arch::x86_64::*;
    use half::{bf16, f16};

    /// A register of AVX-512.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    /// Two registers of AVX2.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY of each call below: these types are used in bodies of `lanes!` alone, in functions that have the features; loads
    // and stores are within slices of 16.
    impl Lanes for Avx512 {
        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_setzero_ps() })
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_loadu_ps(from[..LANES].as_ptr()) })
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            // SAFETY: above.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from[..LANES].as_ptr().cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from[..LANES].as_ptr().cast())) })
        }
        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            // SAFETY: above.
            unsafe { _mm512_storeu_ps(to[..LANES].as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: above.
            Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn larger_or(self, b: Self) -> Self {
            // SAFETY: above. With a NaN the instruction gives its second operand.
            Avx512(unsafe { _mm512_max_ps(self.0, b.0) })
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: above.
            unsafe { Avx2(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: above.
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        fn load(from: &[f32]) -> Self {
            let from = &from[..LANES];
            // SAFETY: above.
            unsafe { Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())) }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16]) -> Self {
            let from = &from[..LANES];
            // SAFETY: above.
            let half = |at: usize| unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from[at..].as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            Avx2(half(0), half(8))
        }
        #[inline(always)]
        fn load_f16(from: &[f16]) -> Self {
            let from = &from[..LANES];
            // SAFETY: above; so has f16c.
            let half = |at: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from[at..].as_ptr().cast())) };
            Avx2(half(0), half(8))
        }
        #[inline(always)]
        fn store(self, to: &mut [f32]) {
            let to = &mut to[..LANES];
            // SAFETY: above.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to[8..].as_mut_ptr(), self.1);
            }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: above.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            // SAFETY: above.
            unsafe { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn larger_or(self, b: Self) -> Self {
            // SAFETY: above; with a NaN as above.
            unsafe { Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
        }
    }
}
