//! The tiles for AVX-512.
use super::{COLUMNS, LINE, Tile, TileFn};
use core::arch::x86_64::*;
use std::hint::black_box;

#[inline(always)]
fn masks(columns: usize) -> (u16, u16) {
    let m = if columns >= 32 { u32::MAX } else { (1u32 << columns) - 1 };
    (m as u16, (m >> 16) as u16)
}

/// Rows of a tile whose element of x is read as an operand of both its products, and not once into a register: two loads, and one
/// instruction less. A core that decodes for two threads, one of them a stranger's, has fewer of these to give than products.
/// More would wait for loads.
const FOLDED: usize = 4;

/// Rows that multiply less than the memory gives: what is prefetched for them ends in L2. On its way to L1 it would take the few places there that
/// loads wait in (one row on an Emerald Rapids: 21 GB/s so, 24 by L2, where reading alone makes 25).
const STREAMED: usize = 4;

// One line: 16 steps of two loads of W, M broadcasts and 2 M multiply-adds; twice that where a dword of W is taken in halves. `again` is x,
// which the compiler must not know, or it would read only once.
macro_rules! line {
    ($acc:ident, $w:ident, $x:ident, $again:ident, $ahead:ident, $step:expr, $halves:expr, $load:expr, $broadcast:expr, $multiply_add:expr) => {
        for j in 0..LINE {
            if M <= STREAMED {
                _mm_prefetch::<{ _MM_HINT_T1 }>($ahead.cast());
                _mm_prefetch::<{ _MM_HINT_T1 }>($ahead.wrapping_add(64).cast());
            } else {
                _mm_prefetch::<{ _MM_HINT_T0 }>($ahead.cast());
                _mm_prefetch::<{ _MM_HINT_T0 }>($ahead.wrapping_add(64).cast());
            }
            $ahead = $ahead.wrapping_add($step);
            for half in 0..$halves {
                let w0 = $load($w.add(j * COLUMNS), half);
                let w1 = $load($w.add(j * COLUMNS + 16), half);
                for (r, acc) in $acc.iter_mut().enumerate() {
                    let at = (r * LINE + j) * $halves + half;
                    let b = $broadcast($x.add(at));
                    acc[0] = $multiply_add(acc[0], b, w0);
                    let b = if r < FOLDED { $broadcast($again.add(at)) } else { b };
                    acc[1] = $multiply_add(acc[1], b, w1);
                }
            }
        }
    };
}

// M x 32: at 12 rows 24 accumulators, two loads of W and one broadcast fit the 32 registers.
macro_rules! tile {
    ($name:ident, $features:literal, $halves:literal, $load:expr, $broadcast:expr, $multiply_add:expr) => {
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
                let (mut w, mut x, mut again, mut ahead) = (t.w, t.x, black_box(t.x), t.prefetch);
                for _ in 0..t.lines {
                    line!(acc, w, x, again, ahead, t.prefetch_step, $halves, $load, $broadcast, $multiply_add);
                    w = w.add(LINE * COLUMNS);
                    x = x.add(M * LINE * $halves);
                    again = again.add(M * LINE * $halves);
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
    1,
    |p: *const u32, _| _mm512_load_ps(p.cast()),
    |p: *const u32| _mm512_set1_ps(*p.cast::<f32>()),
    |c, b, w| _mm512_fmadd_ps(b, w, c)
);
tile!(
    bf16_tile,
    "avx512f,avx512bf16",
    1,
    |p: *const u32, _| core::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(p.cast())),
    |p: *const u32| core::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*p.cast::<i32>())),
    |c, b, w| _mm512_dpbf16_ps(c, b, w)
);
// bf16 as f32, the odd element first: the bits of `vdpbf16ps`, denormals apart.
tile!(
    widened_tile,
    "avx512f",
    2,
    |p: *const u32, half| {
        let pairs = _mm512_load_si512(p.cast());
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        _mm512_castsi512_ps(if half == 0 { odd } else { _mm512_slli_epi32::<16>(pairs) })
    },
    |p: *const u32| _mm512_set1_ps(*p.cast::<f32>()),
    |c, b, w| _mm512_fmadd_ps(b, w, c)
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
        let (mut w, mut x, mut again, mut ahead, mut scales) = (t.w, t.x, black_box(t.x), t.prefetch, t.scales);
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
                    again,
                    ahead,
                    t.prefetch_step,
                    1,
                    |p: *const u32, _| _mm512_load_si512(p.cast()),
                    |p: *const u32| _mm512_set1_epi32(*p.cast::<i32>()),
                    |c, b, w| _mm512_dpbusd_epi32(c, w, b)
                );
                w = w.add(LINE * COLUMNS);
                x = x.add(M * LINE);
                again = again.add(M * LINE);
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
pub static WIDENED: &[TileFn] = table!(widened_tile: 1 2 3 4 5 6 7 8 9 10 11 12);
pub static BF16: &[TileFn] = table!(bf16_tile: 1 2 3 4 5 6 7 8 9 10 11 12);
