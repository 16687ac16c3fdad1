//! `sample`: from one row of logits to a token, and log-probabilities of the model's own distribution.
//!
//! CPU reference. Order of the steps: penalties (by the caller, who knows the counts), temperature, top-k, top-p,
//! min-p, one draw. Greedy takes the smallest id among equals, as `argmax` does. NaN counts as -inf: it is never chosen.
//! A draw is defined on the sorted vocabulary (`sorted.rs`); nearly all are made without sorting it (`bins.rs`).
mod best;
mod bins;
pub mod device;
mod sorted;

pub use best::top_n;
pub use sorted::draw;

use super::float;
use super::lanes::LANES;

/// The filters of one request.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
}

/// log(sum(exp(logits))): `logits[i] - log_sum_exp` is the log-probability of i. NaN if a logit is.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let mut sums = ([f32::NEG_INFINITY; 16], [0f32; 16]);
    lanes(logits, &mut sums.0, &mut sums.1);
    let max = sums.0.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    // Lanes share the maximum already, so their sums add up.
    max + sums.1.iter().map(|s| f64::from(*s)).sum::<f64>().ln() as f32
}

simd! {
    fn lanes(logits: &[f32], max: &mut [f32; 16], sum: &mut [f32; 16]) {
        for chunk in logits.chunks(16) {
            max.iter_mut().zip(chunk).for_each(|(m, x)| *m = if *x > *m { *x } else { *m });
        }
        let top = max.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        for chunk in logits.chunks(16) {
            sum.iter_mut().zip(chunk).for_each(|(s, x)| *s += float::exp(x - top));
        }
    }
}

/// The largest logit's index, the first among equals; NaN is none of them.
pub fn argmax(logits: &[f32]) -> usize {
    let mut max = [f32::NEG_INFINITY; LANES];
    most(logits, &mut max);
    let max = max.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut at = 0;
    find(logits, max, &mut at);
    if at < logits.len() { at } else { 0 }
}

lanes! {
    fn most<V>(logits: &[f32], max: &mut [f32; LANES]) {
        let mut lanes = [V::splat(f32::NEG_INFINITY); 4];
        let mut blocks = logits.chunks_exact(4 * LANES);
        for block in &mut blocks {
            for (lanes, chunk) in lanes.iter_mut().zip(block.chunks_exact(LANES)) {
                *lanes = V::load(chunk).larger_or(*lanes);
            }
        }
        let [a, b, c, d] = lanes;
        a.larger_or(b).larger_or(c.larger_or(d)).store(max);
        for chunk in blocks.remainder().chunks(LANES) {
            max.iter_mut().zip(chunk).for_each(|(m, x)| *m = if *x > *m { *x } else { *m });
        }
    }
}

simd! {
    /// The first index of `value`, or the number of logits.
    fn find(logits: &[f32], value: f32, at: &mut usize) {
        let blocks = logits.chunks_exact(64);
        let mut start = 0;
        for block in blocks {
            let hits: u32 = block.iter().map(|x| u32::from(*x == value)).sum();
            if hits > 0 {
                break;
            }
            start += 64;
        }
        *at = start + logits[start..].iter().position(|x| *x == value).unwrap_or(logits.len() - start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Filter = Filter { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.73).sin() * 20.0).collect();
        let want = x.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        assert!((f64::from(log_sum_exp(&x)) - want).abs() < 3e-6);
    }

    #[test]
    fn filters_cut_where_they_say() {
        // probabilities 0.5, 0.25, 0.125, 0.125
        let logits = [0.125f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln()];
        let seen = |f: Filter| {
            let mut ids: Vec<usize> = (0..1000).map(|i| draw(&logits, &f, i as f64 / 1000.0)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(seen(OPEN), [0, 1, 2, 3]);
        assert_eq!(seen(Filter { temperature: 0.0, ..OPEN }), [1]);
        assert_eq!(seen(Filter { top_k: 2, ..OPEN }), [1, 2]);
        assert_eq!(seen(Filter { top_p: 0.5, ..OPEN }), [1]);
        assert_eq!(seen(Filter { top_p: 0.51, ..OPEN }), [1, 2]);
        assert_eq!(seen(Filter { min_p: 0.3, ..OPEN }), [1, 2]);
        assert_eq!(seen(Filter { top_p: 1e-9, ..OPEN }), [1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let count = |id| (0..10_000).filter(|i| draw(&logits, &OPEN, *i as f64 / 1e4) == id).count();
        assert!(count(0).abs_diff(7000) < 3 && count(1).abs_diff(2000) < 3);
        // Half the temperature squares the odds: 49 : 4 : 1.
        let cold = Filter { temperature: 0.5, ..OPEN };
        let zeros = (0..10_000).filter(|i| draw(&logits, &cold, *i as f64 / 1e4) == 0).count();
        assert!(zeros.abs_diff(9074) < 3, "{zeros}");
    }

    #[test]
    fn ties_and_nan_are_settled() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, 1.0]), 1);
        // In every lane of blocks and remainders, beside NaN, and the first of two.
        for i in 0..150 {
            let mut wide: Vec<f32> = (0..150).map(|j| if j % 3 == 0 { f32::NAN } else { -(j as f32) }).collect();
            (wide[i], wide[149]) = (1.0, 1.0);
            assert_eq!(argmax(&wide), i);
        }
        assert_eq!(top_n(&[1.0, 3.0, 3.0, 2.0], 3), [(1, 3.0), (2, 3.0), (3, 2.0)]);
        let (nan, infinity) = (f32::NAN, f32::INFINITY);
        for u in [0.0, 0.5, 0.999_999] {
            assert_eq!(draw(&[nan, 1.0, -nan], &OPEN, u), 1);
            assert_eq!(draw(&[nan, -infinity, -infinity], &OPEN, u), 1);
            assert_eq!(draw(&[1.0, infinity, infinity], &OPEN, u), 1);
            assert_eq!(draw(&[nan, nan], &OPEN, u), 0);
        }
    }
}
