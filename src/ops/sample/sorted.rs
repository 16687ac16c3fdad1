//! One draw, which is defined on the candidates in their order: what each weighs is added up, and taken off again, from the
//! best on, in f64.
use super::best::{best, id, logit};
use super::{Filter, argmax, bins};
use std::cell::RefCell;

thread_local! {
    /// Candidates in their order. Kept: there may be as many as tokens.
    static KEYS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Draws a token; `u` is uniform in [0, 1). `logits` have their penalties applied already.
pub fn draw(logits: &[f32], filter: &Filter, u: f64) -> usize {
    let greedy = argmax(logits);
    let Some(&max) = logits.get(greedy) else { return 0 };
    if filter.temperature <= 0.0 || !max.is_finite() {
        return greedy;
    }
    let weigh = Weigh { max, temperature: filter.temperature };
    let all = filter.top_k == 0 || filter.top_k >= logits.len();
    KEYS.with_borrow_mut(|keys| {
        if all && let Some(token) = bins::draw(logits, filter, &weigh, u, keys) {
            return token;
        }
        best(logits, if all { logits.len() } else { filter.top_k }, keys);
        // Nothing is unsure here.
        in_order(keys, filter, &weigh, u).unwrap_or(greedy)
    })
}

/// The definition, on all candidates; `None` only without any.
fn in_order(keys: &[u64], filter: &Filter, weigh: &Weigh, u: f64) -> Option<usize> {
    // Only top-p asks for it.
    let total = if filter.top_p < 1.0 { keys.iter().map(|key| weigh.of(logit(*key))).sum() } else { 0.0 };
    let mut mass = Bounds::exactly(0.0);
    let kept = cut(keys, filter, weigh, &mut mass, Bounds::exactly(total), false)?;
    pick(&keys[..kept], weigh, mass.times(u))
}

/// What a token weighs: 1 for the best.
pub struct Weigh {
    pub max: f32,
    pub temperature: f32,
}

impl Weigh {
    /// Of a token with this logit. The larger of NaN and 0 is 0.
    pub fn of(&self, x: f32) -> f64 {
        f64::from((x - self.max) / self.temperature).exp().max(0.0)
    }
}

/// Between what a sum of the definition lies, both included. Roundings keep it there: they are monotone.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub low: f64,
    pub high: f64,
}

impl Bounds {
    pub fn exactly(v: f64) -> Self {
        Bounds { low: v, high: v }
    }

    /// By a factor that is not negative.
    pub fn times(self, factor: f64) -> Self {
        Bounds { low: self.low * factor, high: self.high * factor }
    }

    fn add(&mut self, v: f64) {
        self.low += v;
        self.high += v;
    }
}

/// How many of these candidates the filters keep; `any`: of those before, some were. `mass` is that of the kept, before and
/// after. `None`: unsure.
pub fn cut(
    keys: &[u64],
    filter: &Filter,
    weigh: &Weigh,
    mass: &mut Bounds,
    total: Bounds,
    mut any: bool,
) -> Option<usize> {
    // top_p keeps the token that crosses the line; min_p is relative to the best, whose weight is 1.
    let enough = total.times(f64::from(filter.top_p));
    for (i, key) in keys.iter().enumerate() {
        let p = weigh.of(logit(*key));
        if any && p < f64::from(filter.min_p) {
            return Some(i);
        }
        if any && filter.top_p < 1.0 && mass.high >= enough.low {
            return if mass.low >= enough.high { Some(i) } else { None };
        }
        mass.add(p);
        any = true;
    }
    Some(keys.len())
}

/// The token at which nothing is `left`, else the last. `None`: unsure.
pub fn pick(keys: &[u64], weigh: &Weigh, mut left: Bounds) -> Option<usize> {
    for key in keys {
        left.add(-weigh.of(logit(*key)));
        if left.low < 0.0 {
            return if left.high < 0.0 { Some(id(*key)) } else { None };
        }
    }
    keys.last().map(|key| id(*key))
}

#[cfg(test)]
mod tests;
