//! Where in the order of the choice a sum is reached, without sorting the vocabulary.
//!
//! What tokens weigh is added up by intervals of logits. That tells the interval in which a sum of the definition is reached, and
//! only its tokens are sorted. The definition adds up in another order and so rounds otherwise, but both sums are near the exact
//! one. So the definition's has bounds, and what it decides is known unless they disagree; then it has to be computed.
use super::super::float;
use super::Filter;
use super::best::gather;
use super::sorted::{Bounds, Weigh, cut, pick};
use std::ops::Range;

/// Intervals.
const BINS: usize = 1024;
/// The last one, which has no end.
const LAST: usize = BINS - 1;
/// Place of the first one: 2^23, from where on floats are whole.
const FIRST: f32 = 8_388_608.0;
/// What weighs less than e^-12 is in the last one, if sums are rough;
const ROUGH: f32 = 12.0;
/// less than e^-60 if they are fine.
const FINE: f32 = 60.0;
/// So few tokens are taken from the best on: what is not skipped needs no bounds.
const FEW: u32 = 512;
/// Of more tokens the last interval is too wide.
const MANY: u32 = 8192;
/// Logits at once.
const CHUNK: usize = 64;

/// [`draw`](super::draw) without top-k, of logits whose best is finite; `None`: unsure.
pub fn draw(logits: &[f32], filter: &Filter, weigh: &Weigh, u: f64, keys: &mut Vec<u64>) -> Option<usize> {
    if logits.len() < BINS {
        return None;
    }
    // Where few tokens stand out, rough sums are made in a third of the time and nearly always say enough.
    let near = depths(logits, weigh).filter(|depth| *depth < ROUGH * weigh.temperature).count();
    let rough = if near <= 4 { choose(logits, filter, weigh, u, false, keys) } else { None };
    rough.or_else(|| choose(logits, filter, weigh, u, true, keys))
}

/// The same by `fine` sums or rough ones.
pub fn choose(
    logits: &[f32],
    filter: &Filter,
    weigh: &Weigh,
    u: f64,
    fine: bool,
    keys: &mut Vec<u64>,
) -> Option<usize> {
    // Bounds are in parts of a sum that is 1 at least.
    if weigh.temperature.is_nan() { None } else { Bins::new(logits, weigh, fine).choose(filter, u, keys) }
}

/// How far below the best some 256 logits are.
fn depths(logits: &[f32], weigh: &Weigh) -> impl Iterator<Item = f32> {
    let some = logits.iter().step_by((logits.len() / 256).max(1));
    some.map(|x| weigh.max - x).filter(|depth| depth.is_finite())
}

/// How logits are shared out, and what they weigh.
struct Scale {
    max: f32,
    temperature: f32,
    /// Intervals to a logit.
    density: f32,
}

impl Scale {
    /// [`FIRST`] and the number of its interval. A larger logit's is never a later one, since roundings are monotone. NaN and
    /// -inf are in the last.
    #[inline(always)]
    fn place(&self, x: f32) -> f32 {
        let place = (self.max - x) * self.density;
        FIRST + if place < LAST as f32 { place } else { LAST as f32 }
    }

    /// The logarithm of its weight, as [`Weigh::of`] has it.
    #[inline(always)]
    fn exponent(&self, x: f32) -> f32 {
        (x - self.max) / self.temperature
    }
}

struct Bins<'a> {
    logits: &'a [f32],
    weigh: &'a Weigh,
    scale: Scale,
    /// Weights, and numbers of tokens, before each interval; then of all.
    mass: [f64; BINS + 1],
    count: [u32; BINS + 1],
    /// By how much the definition's sums can differ from these.
    slack: f64,
}

impl<'a> Bins<'a> {
    fn new(logits: &'a [f32], weigh: &'a Weigh, fine: bool) -> Self {
        // No further than some logits are.
        let spread = depths(logits, weigh).fold(0.0, f32::max);
        let wide = weigh.temperature * if fine { FINE } else { ROUGH };
        let density = LAST as f32 / if spread > 0.0 && spread < wide { spread } else { wide };
        let scale = Scale { max: weigh.max, temperature: weigh.temperature, density };
        let (mut mass, mut count) = ([0f64; BINS + 1], [0u32; BINS + 1]);
        add_up(logits, &scale, fine, &mut mass, &mut count);
        for i in 1..=BINS {
            mass[i] += mass[i - 1];
            count[i] += count[i - 1];
        }
        // In parts of the sum of all: n additions, or subtractions, are off by less than n 2^-53 there, and here n + BINS by as
        // much each; a weight by 2^-50 there, and here by 2^-46 or, if rough, 2^-21. The rest of the last term is for roundings
        // of the bounds.
        let weights = if fine { (-42f64).exp2() } else { (-20f64).exp2() };
        let slack = mass[BINS] * (logits.len() as f64 * (-52f64).exp2() + weights);
        Bins { logits, weigh, scale, mass, count, slack }
    }

    fn choose(&self, filter: &Filter, u: f64, keys: &mut Vec<u64>) -> Option<usize> {
        let mut part = 0..0;
        // What is kept: up to this interval, and before this key.
        let (mut mass, mut limit, mut end) = (self.before(BINS), LAST, u64::MAX);
        if filter.top_p < 1.0 || filter.min_p > 0.0 {
            let total = mass;
            let enough = total.times(if filter.top_p < 1.0 { f64::from(filter.top_p) } else { f64::INFINITY });
            let (likely, unlikely) = self.beside(filter.min_p);
            let kept = |i: usize| i < likely && self.before(i + 1).high < enough.low;
            let over = |i: usize| i >= unlikely || self.before(i + 1).low >= enough.high;
            let from = (0..LAST).find(|i| !kept(*i)).unwrap_or(LAST);
            limit = (from..LAST).find(|i| over(*i)).unwrap_or(LAST);
            self.sort(from..limit + 1, &mut part, keys)?;
            mass = self.before(part.start);
            let kept = cut(keys, filter, self.weigh, &mut mass, total, self.count[part.start] > 0)?;
            end = keys.get(kept).copied().unwrap_or(u64::MAX);
        }
        let left = mass.times(u);
        let from = (0..limit).find(|i| left.low < self.before(i + 1).high).unwrap_or(limit);
        let to = (from..limit).find(|i| left.high < self.before(i + 1).low).unwrap_or(limit);
        self.sort(from..to + 1, &mut part, keys)?;
        let before = self.before(part.start);
        let left = Bounds { low: left.low - before.high, high: left.high - before.low };
        let kept = &keys[..keys.partition_point(|key| *key < end)];
        pick(kept, self.weigh, left)
    }

    /// The definition's sum of the weights before an interval.
    fn before(&self, i: usize) -> Bounds {
        let slack = if self.count[i] > 0 { self.slack } else { 0.0 };
        Bounds { low: self.mass[i] - slack, high: self.mass[i] + slack }
    }

    /// Before the first of these intervals no token weighs less than `min_p`, behind the second all do.
    fn beside(&self, min_p: f32) -> (usize, usize) {
        if min_p.is_nan() || min_p <= 0.0 {
            return (LAST, LAST);
        }
        // Exponents and places were rounded to f32, weights to f64.
        let exponent = (-f64::from(min_p).ln()).max(0.0);
        let scale = f64::from(self.scale.temperature) * f64::from(self.scale.density);
        let place = |exponent: f64| ((exponent * scale).round() as usize).min(LAST);
        (place(exponent * (1.0 - 1e-5)), place(exponent * (1.0 + 1e-5) + (-40f64).exp2()))
    }

    /// Has the tokens of at least the `wanted` intervals in `keys`, sorted: those of `part`.
    fn sort(&self, wanted: Range<usize>, part: &mut Range<usize>, keys: &mut Vec<u64>) -> Option<()> {
        if part.start <= wanted.start && wanted.end <= part.end {
            return Some(());
        }
        if wanted.end == BINS && self.count[BINS] - self.count[LAST] > MANY {
            return None;
        }
        *part = if self.count[wanted.end] <= FEW { 0..wanted.end } else { wanted };
        keys.clear();
        find(self.logits, &self.scale, part, keys);
        keys.sort_unstable();
        Some(())
    }
}

simd! {
    /// Adds weights and numbers to the place behind that of their interval.
    fn add_up(logits: &[f32], scale: &Scale, fine: bool, mass: &mut [f64; BINS + 1], count: &mut [u32; BINS + 1]) {
        let (mut rest, mut others) = ([0f64; 16], 0);
        for x in logits.chunks(CHUNK) {
            let len = x.len();
            let mut padded = [f32::NEG_INFINITY; CHUNK];
            let x = x.first_chunk().unwrap_or_else(|| {
                padded[..len].copy_from_slice(x);
                &padded
            });
            let (mut place, mut weight) = ([0f32; CHUNK], [0f64; CHUNK]);
            place.iter_mut().zip(x).for_each(|(p, x)| *p = scale.place(*x));
            if fine {
                weight.iter_mut().zip(x).for_each(|(w, x)| *w = exp(f64::from(scale.exponent(*x))));
            } else {
                let mut rough = [0f32; CHUNK];
                rough.iter_mut().zip(x).for_each(|(w, x)| *w = float::exp(scale.exponent(*x)).max(0.0));
                let last: u32 = place.iter().map(|p| u32::from(*p == FIRST + LAST as f32)).sum();
                if last == CHUNK as u32 {
                    let mut sums = [0f32; 16];
                    for part in rough.chunks_exact(16) {
                        sums.iter_mut().zip(part).for_each(|(s, w)| *s += w);
                    }
                    rest.iter_mut().zip(&sums).for_each(|(r, s)| *r += f64::from(*s));
                    others += len as u32;
                    continue;
                }
                weight.iter_mut().zip(&rough).for_each(|(w, rough)| *w = f64::from(*rough));
            }
            for (place, w) in place[..len].iter().zip(&weight[..len]) {
                // The place's low bits are the interval's number.
                let behind = place.to_bits() as usize % BINS + 1;
                mass[behind] += w;
                count[behind] += 1;
            }
        }
        mass[BINS] += rest.iter().sum::<f64>();
        count[BINS] += others;
    }
}

simd! {
    fn find(logits: &[f32], scale: &Scale, part: &Range<usize>, keys: &mut Vec<u64>) {
        let (start, end) = (FIRST + part.start as f32, FIRST + part.end as f32);
        gather(logits, |x| (start..end).contains(&scale.place(x)), keys);
    }
}

/// e^x for x <= 0 within 2^-46 of it; 0 below -700, and for NaN. As [`float::exp`], with Taylor's polynomial.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it rounds to an integer
    let clamped = if x > -700.0 { x } else { -700.0 };
    let shifted = clamped * std::f64::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = clamped - n * 0.693_147_180_369_123_8 - n * 1.908_214_929_270_587_7e-10;
    let mut p = 1.0 / 39_916_800.0;
    p = p * r + 1.0 / 3_628_800.0;
    p = p * r + 1.0 / 362_880.0;
    p = p * r + 1.0 / 40_320.0;
    p = p * r + 1.0 / 5_040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let two_n = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > -700.0 { p * two_n } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_as_close_as_the_slack_has_it() {
        for i in 0..700_000 {
            let x = f64::from(i) * -1e-3 - f64::from(i % 7) * 1e-5;
            assert!(x <= -700.0 || (exp(x) / x.exp() - 1.0).abs() < (-46f64).exp2(), "{x}");
        }
        assert_eq!((exp(0.0), exp(-700.0), exp(f64::NEG_INFINITY), exp(f64::NAN)), (1.0, 0.0, 0.0, 0.0));
    }
}
