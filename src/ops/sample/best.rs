//! Logits in the order of the choice: larger ones first, smaller ids first among equals, NaN among the -inf.
use super::LANES;

/// A logit and its id as one integer: ascending ones are in the order of the choice, and no two are the same, so it does
/// not matter how they are sorted.
pub fn key(id: usize, x: f32) -> u64 {
    let bits = if x.is_nan() { f32::NEG_INFINITY.to_bits() } else { x.to_bits() };
    let descending = if bits >> 31 == 0 { !bits & 0x7fff_ffff } else { bits };
    u64::from(descending) << 32 | id as u64
}

/// Whose it is.
pub fn id(key: u64) -> usize {
    key as u32 as usize
}

/// Its logit; -inf for NaN.
pub fn logit(key: u64) -> f32 {
    let descending = (key >> 32) as u32;
    f32::from_bits(if descending >> 31 == 0 { !descending & 0x7fff_ffff } else { descending })
}

/// The `n` best as keys, in their order.
pub fn best(logits: &[f32], n: usize, keys: &mut Vec<u64>) {
    keys.clear();
    if n == 0 {
        return;
    }
    // The n-th largest of many parts' largest is not above the n-th of all. With four parts for each that is wanted, few others
    // are as large, and what lies below is only compared.
    let rows = (logits.len() / 4 / n).min(64);
    if rows >= 4 {
        maxima(logits, rows, keys);
        keys.select_nth_unstable(n - 1);
        let floor = logit(keys[n - 1]);
        keys.clear();
        // NaN would be missed.
        if floor > f32::NEG_INFINITY {
            at_least(logits, floor, keys);
        }
    }
    if keys.is_empty() {
        keys.extend(logits.iter().enumerate().map(|(id, x)| key(id, *x)));
    }
    if n < keys.len() {
        keys.select_nth_unstable(n - 1);
        keys.truncate(n);
    }
    keys.sort_unstable();
}

lanes! {
    /// Keys, without ids, of the largest logits of parts: each is one lane of `rows` chunks.
    fn maxima<V>(logits: &[f32], rows: usize, keys: &mut Vec<u64>) {
        for block in logits.chunks(rows * LANES) {
            let (mut largest, mut each) = (V::splat(f32::NEG_INFINITY), [0f32; LANES]);
            let chunks = block.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                largest = V::load(chunk).larger_or(largest);
            }
            largest.store(&mut each);
            each.iter_mut().zip(rest).for_each(|(m, x)| *m = if *x > *m { *x } else { *m });
            keys.extend(each.map(|x| key(0, x)));
        }
    }
}

simd! {
    fn at_least(logits: &[f32], floor: f32, keys: &mut Vec<u64>) {
        gather(logits, |x| x >= floor, keys);
    }
}

/// Keys of the logits that are `wanted`, which should be few: 64 are passed over at once. To be compiled by `simd!`.
#[inline(always)]
pub fn gather(logits: &[f32], wanted: impl Fn(f32) -> bool, keys: &mut Vec<u64>) {
    for (block, first) in logits.chunks(64).zip((0..).step_by(64)) {
        let mut hits = [0u32; 64];
        hits.iter_mut().zip(block).for_each(|(hit, x)| *hit = u32::from(wanted(*x)));
        if hits.iter().sum::<u32>() == 0 {
            continue;
        }
        // Without branches that nobody can foresee.
        let (mut at, mut n) = ([0; 64], 0);
        for (i, hit) in hits.iter().enumerate() {
            at[n] = i;
            n += *hit as usize;
        }
        keys.extend(at[..n].iter().map(|i| key(first + i, block[*i])));
    }
}

/// The `n` largest as `(index, logit)`, best first, smaller indices first among equals; NaN among the -inf.
pub fn top_n(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut keys = Vec::new();
    best(logits, n, &mut keys);
    keys.into_iter().map(|key| (id(key) as u32, logits[id(key)])).collect()
}
