//! Micro-kernels: M rows of x times one panel of 32 columns of W.
//!
//! k is counted in dwords: one f32, two bf16 or four int8.
//!
//! | operand | layout |
//! |---|---|
//! | W panel | `[k_dwords][32]`: two 512-bit registers per step of k; int8: 32 scales before each group, weights plus 128 |
//! | x tile | `[k_dwords / 16][M][16]`: one cache line per row and 16 steps |
//!
//! Each y element has one accumulator, updated in ascending k. That order is the same for every M, instruction
//! set, k block and thread: a row's bits do not depend on its batch. In a bf16 pair the odd element comes first, then
//! the even one, which is what `vdpbf16ps` does. int8 sums a group exactly, in integers; groups add up in f32, in order:
//! y += (sum * scale of W) * scale of x.

use super::pack::RowScale;

/// Columns of a panel.
pub(super) const COLUMNS: usize = 32;
/// Dwords of k in one line of x.
pub(super) const LINE: usize = 16;

/// One call of a micro-kernel.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub w: *const u32,
    pub x: *const u32,
    /// x lines (16 dwords of k) to run.
    pub lines: usize,
    pub y: *mut f32,
    /// Elements from one row of y to the next.
    pub y_stride: usize,
    /// Valid columns, 1..=32.
    pub columns: usize,
    /// False: continue from the partial sums in y (f32, hence exact).
    pub first: bool,
    /// What to prefetch, from here on so many bytes further with each step of k.
    pub prefetch: *const u8,
    pub prefetch_step: usize,
    /// int8: lines that share a scale.
    pub group_lines: usize,
    /// int8: of each group and row, `[groups][M]`.
    pub scales: *const RowScale,
}

pub(super) type TileFn = unsafe fn(&Tile);

/// Kernels for 1..=len rows: `rows[m - 1]`.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub rows: &'static [TileFn],
    pub name: &'static str,
}

/// Type of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One f32 a dword.
    F32,
    /// Two bf16 a dword.
    Bf16,
    /// Four int8 a dword, with scales.
    Int8,
}

impl Kind {
    /// Elements of a dword.
    pub(super) fn per_dword(self) -> usize {
        match self {
            Kind::F32 => 1,
            Kind::Bf16 => 2,
            Kind::Int8 => 4,
        }
    }
}

/// Instruction set of the kernels. `Auto` takes the best that the CPU has, when a weight is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Isa {
    Auto,
    Avx512,
    Avx2,
    Portable,
}

/// `None` if the CPU lacks what `isa` needs for `kind`.
pub(super) fn select(kind: Kind, isa: Isa) -> Option<Kernels> {
    #[cfg(target_arch = "x86_64")]
    {
        let (found, rows) = match kind {
            Kind::F32 => (is_x86_feature_detected!("avx512f"), avx512::F32),
            Kind::Bf16 => (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"), avx512::BF16),
            Kind::Int8 => (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni"), avx512::INT8),
        };
        if found && matches!(isa, Isa::Auto | Isa::Avx512) {
            return Some(Kernels { rows, name: "avx512" });
        }
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if found && matches!(isa, Isa::Auto | Isa::Avx2) {
            let rows = match kind {
                Kind::F32 => portable::avx2::F32,
                Kind::Bf16 => portable::avx2::BF16,
                Kind::Int8 => portable::avx2::INT8,
            };
            return Some(Kernels { rows, name: "avx2" });
        }
    }
    let rows = match kind {
        Kind::F32 => portable::F32,
        Kind::Bf16 => portable::BF16,
        Kind::Int8 => portable::INT8,
    };
    matches!(isa, Isa::Auto | Isa::Portable).then_some(Kernels { rows, name: "portable" })
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{COLUMNS, LINE, Tile, TileFn};
    use core::arch::x86_64::*;

    #[inline(always)]
    fn masks(columns: usize) -> (u16, u16) {
        let m = if columns >= 32 { u32::MAX } else { (1u32 << columns) - 1 };
        (m as u16, (m >> 16) as u16)
    }

    // One line: 16 steps of two loads of W, M broadcasts and 2 M multiply-adds.
    macro_rules! line {
        ($acc:ident, $w:ident, $x:ident, $ahead:ident, $step:expr, $load:expr, $broadcast:expr, $multiply_add:expr) => {
            for j in 0..LINE {
                let w0 = $load($w.add(j * COLUMNS));
                let w1 = $load($w.add(j * COLUMNS + 16));
                _mm_prefetch::<{ _MM_HINT_T0 }>($ahead.cast());
                _mm_prefetch::<{ _MM_HINT_T0 }>($ahead.wrapping_add(64).cast());
                $ahead = $ahead.wrapping_add($step);
                for (r, acc) in $acc.iter_mut().enumerate() {
                    let b = $broadcast($x.add(r * LINE + j));
                    acc[0] = $multiply_add(acc[0], b, w0);
                    acc[1] = $multiply_add(acc[1], b, w1);
                }
            }
        };
    }

    // M x 32: at 12 rows 24 accumulators, two loads of W and one broadcast fit the 32 registers.
    macro_rules! tile {
        ($name:ident, $features:literal, $load:expr, $broadcast:expr, $multiply_add:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const M: usize>(t: &Tile) {
                // SAFETY: the caller gives `lines` whole lines of W and x, and M rows of `columns` in y; masks keep
                // loads and stores of y inside them, and prefetches never fault.
                unsafe {
                    let (m0, m1) = masks(t.columns);
                    let mut acc = [[_mm512_setzero_ps(); 2]; M];
                    if !t.first {
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let y = t.y.add(r * t.y_stride);
                            acc[0] = _mm512_maskz_loadu_ps(m0, y);
                            acc[1] = _mm512_maskz_loadu_ps(m1, y.wrapping_add(16));
                        }
                    }
                    let (mut w, mut x, mut ahead) = (t.w, t.x, t.prefetch);
                    for _ in 0..t.lines {
                        line!(acc, w, x, ahead, t.prefetch_step, $load, $broadcast, $multiply_add);
                        w = w.add(LINE * COLUMNS);
                        x = x.add(M * LINE);
                    }
                    for (r, acc) in acc.iter().enumerate() {
                        let y = t.y.add(r * t.y_stride);
                        _mm512_mask_storeu_ps(y, m0, acc[0]);
                        _mm512_mask_storeu_ps(y.wrapping_add(16), m1, acc[1]);
                    }
                }
            }
        };
    }

    tile!(
        f32_tile,
        "avx512f",
        |p: *const u32| _mm512_load_ps(p.cast()),
        |p: *const u32| _mm512_set1_ps(*p.cast::<f32>()),
        |c, b, w| _mm512_fmadd_ps(b, w, c)
    );
    tile!(
        bf16_tile,
        "avx512f,avx512bf16",
        |p: *const u32| core::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(p.cast())),
        |p: *const u32| core::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*p.cast::<i32>())),
        |c, b, w| _mm512_dpbf16_ps(c, b, w)
    );

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn int8_tile<const M: usize>(t: &Tile) {
        // SAFETY: as for the others; each group has 32 scales before its lines, and `scales` has M for each group.
        unsafe {
            let (m0, m1) = masks(t.columns);
            // f32 sums are on the stack: in y, whose rows are often a multiple of 4096 bytes apart, they would push each other
            // out of L1.
            let mut sum = [[_mm512_setzero_ps(); 2]; M];
            if !t.first {
                for (r, sum) in sum.iter_mut().enumerate() {
                    let y = t.y.add(r * t.y_stride);
                    sum[0] = _mm512_maskz_loadu_ps(m0, y);
                    sum[1] = _mm512_maskz_loadu_ps(m1, y.wrapping_add(16));
                }
            }
            let (mut w, mut x, mut ahead, mut scales) = (t.w, t.x, t.prefetch, t.scales);
            let mut line = 0;
            while line < t.lines {
                let end = t.lines.min(line + t.group_lines);
                let (s0, s1) = (_mm512_load_ps(w.cast()), _mm512_load_ps(w.add(16).cast()));
                w = w.add(COLUMNS);
                let mut acc = [[_mm512_setzero_si512(); 2]; M];
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = [_mm512_set1_epi32((*scales.add(r)).1); 2];
                }
                while line < end {
                    line!(
                        acc,
                        w,
                        x,
                        ahead,
                        t.prefetch_step,
                        |p: *const u32| _mm512_load_si512(p.cast()),
                        |p: *const u32| _mm512_set1_epi32(*p.cast::<i32>()),
                        |c, b, w| _mm512_dpbusd_epi32(c, w, b)
                    );
                    w = w.add(LINE * COLUMNS);
                    x = x.add(M * LINE);
                    line += 1;
                }
                for (r, (sum, acc)) in sum.iter_mut().zip(&acc).enumerate() {
                    let of_x = _mm512_set1_ps((*scales.add(r)).0);
                    let scaled = |acc, s| _mm512_mul_ps(_mm512_cvtepi32_ps(acc), s);
                    sum[0] = _mm512_fmadd_ps(scaled(acc[0], s0), of_x, sum[0]);
                    sum[1] = _mm512_fmadd_ps(scaled(acc[1], s1), of_x, sum[1]);
                }
                scales = scales.add(M);
            }
            for (r, sum) in sum.iter().enumerate() {
                let y = t.y.add(r * t.y_stride);
                _mm512_mask_storeu_ps(y, m0, sum[0]);
                _mm512_mask_storeu_ps(y.wrapping_add(16), m1, sum[1]);
            }
        }
    }

    macro_rules! table {
        ($f:ident: $($m:literal)*) => { &[$($f::<$m> as TileFn),*] };
    }
    pub static INT8: &[TileFn] = table!(int8_tile: 1 2 3 4 5 6 7 8 9 10 11 12);
    pub static F32: &[TileFn] = table!(f32_tile: 1 2 3 4 5 6 7 8 9 10 11 12);
    pub static BF16: &[TileFn] = table!(bf16_tile: 1 2 3 4 5 6 7 8 9 10 11 12);
}

/// The same layouts in plain Rust; its body is also compiled for AVX2 + FMA.
mod portable {
    use super::{COLUMNS, LINE, Tile, TileFn};
    use crate::ops::float::{BASELINE_FMA, multiply_add};

    #[inline(always)]
    unsafe fn tile<const M: usize, const FMA: bool, const BF16: bool>(t: &Tile) {
        // SAFETY: as for the AVX-512 tiles: whole lines of W and x, M rows of `columns` in y.
        unsafe {
            let mut acc = [[0f32; COLUMNS]; M];
            if !t.first {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let y = std::slice::from_raw_parts(t.y.add(r * t.y_stride), t.columns);
                    acc[..t.columns].copy_from_slice(y);
                }
            }
            for i in 0..t.lines * LINE {
                let w = &*t.w.add(i * COLUMNS).cast::<[u32; COLUMNS]>();
                for (r, acc) in acc.iter_mut().enumerate() {
                    let b = *t.x.add((i / LINE * M + r) * LINE + i % LINE);
                    let float = f32::from_bits;
                    for (acc, &w) in acc.iter_mut().zip(w) {
                        *acc = if BF16 {
                            let odd = multiply_add::<FMA>(float(b & 0xffff_0000), float(w & 0xffff_0000), *acc);
                            multiply_add::<FMA>(float(b << 16), float(w << 16), odd)
                        } else {
                            multiply_add::<FMA>(float(b), float(w), *acc)
                        };
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                let y = std::slice::from_raw_parts_mut(t.y.add(r * t.y_stride), t.columns);
                y.copy_from_slice(&acc[..t.columns]);
            }
        }
    }

    #[inline(always)]
    unsafe fn int8<const M: usize, const FMA: bool>(t: &Tile) {
        // SAFETY: as for the AVX-512 tiles.
        unsafe {
            let (mut w, mut x, mut scales) = (t.w, t.x, t.scales);
            let mut sum = [[0f32; COLUMNS]; M];
            if !t.first {
                for (r, sum) in sum.iter_mut().enumerate() {
                    let y = std::slice::from_raw_parts(t.y.add(r * t.y_stride), t.columns);
                    sum[..t.columns].copy_from_slice(y);
                }
            }
            let mut line = 0;
            while line < t.lines {
                let lines = t.group_lines.min(t.lines - line);
                let of_w = &*w.cast::<[f32; COLUMNS]>();
                w = w.add(COLUMNS);
                let mut acc: [[i32; COLUMNS]; M] = std::array::from_fn(|r| [(*scales.add(r)).1; COLUMNS]);
                for i in 0..lines * LINE {
                    let w = &*w.add(i * COLUMNS).cast::<[u32; COLUMNS]>();
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let b =
                            (*x.add((i / LINE * M + r) * LINE + i % LINE)).to_le_bytes().map(|b| i32::from(b as i8));
                        for (acc, &w) in acc.iter_mut().zip(w) {
                            let byte = |i: u32| (w >> (8 * i) & 255) as i32;
                            *acc += byte(0) * b[0] + byte(1) * b[1] + byte(2) * b[2] + byte(3) * b[3];
                        }
                    }
                }
                w = w.add(lines * LINE * COLUMNS);
                x = x.add(lines * LINE * M);
                for (r, (sum, acc)) in sum.iter_mut().zip(&acc).enumerate() {
                    let of_x = (*scales.add(r)).0;
                    for ((sum, acc), of_w) in sum.iter_mut().zip(acc).zip(of_w) {
                        *sum = multiply_add::<FMA>(*acc as f32 * of_w, of_x, *sum);
                    }
                }
                scales = scales.add(M);
                line += lines;
            }
            for (r, sum) in sum.iter().enumerate() {
                let y = std::slice::from_raw_parts_mut(t.y.add(r * t.y_stride), t.columns);
                y.copy_from_slice(&sum[..t.columns]);
            }
        }
    }

    macro_rules! tables {
        ($fma:expr $(, $features:literal)?) => {
            $(#[target_feature(enable = $features)])?
            unsafe fn f32_tile<const M: usize>(t: &Tile) {
                // SAFETY: the caller's.
                unsafe { tile::<M, $fma, false>(t) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn bf16_tile<const M: usize>(t: &Tile) {
                // SAFETY: the caller's.
                unsafe { tile::<M, $fma, true>(t) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn int8_tile<const M: usize>(t: &Tile) {
                // SAFETY: the caller's.
                unsafe { int8::<M, $fma>(t) }
            }
            pub static INT8: &[TileFn] = &[int8_tile::<1>, int8_tile::<2>, int8_tile::<3>];
            pub static F32: &[TileFn] = &[f32_tile::<1>, f32_tile::<2>, f32_tile::<3>];
            pub static BF16: &[TileFn] = &[bf16_tile::<1>, bf16_tile::<2>, bf16_tile::<3>];
        };
    }

    tables!(BASELINE_FMA);

    #[cfg(target_arch = "x86_64")]
    pub mod avx2 {
        use super::*;
        tables!(true, "avx2,fma");
    }
}
