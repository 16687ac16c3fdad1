//! The tiles in plain Rust; their bodies are also compiled for AVX2 + FMA.
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
                    let b = (*x.add((i / LINE * M + r) * LINE + i % LINE)).to_le_bytes().map(|b| i32::from(b as i8));
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
