use super::super::{best, bins, top_n};
use super::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// All candidates by a plain sort.
fn sorted(logits: &[f32]) -> Vec<(u32, f32)> {
    let rank = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|a, b| rank(b.1).total_cmp(&rank(a.1)).then(a.0.cmp(&b.0)));
    all
}

/// What the filters keep, and what each weighs.
fn plain_cut(candidates: &[(u32, f32)], filter: &Filter) -> Vec<(u32, f64)> {
    let max = candidates[0].1;
    let weight = |x: f32| f64::from((x - max) / filter.temperature).exp().max(0.0);
    let total: f64 = candidates.iter().map(|c| weight(c.1)).sum();
    let (mut kept, mut mass) = (Vec::new(), 0f64);
    for &(id, x) in candidates {
        let p = weight(x);
        let enough = mass >= f64::from(filter.top_p) * total;
        if !kept.is_empty() && (enough && filter.top_p < 1.0 || p < f64::from(filter.min_p)) {
            break;
        }
        mass += p;
        kept.push((id, p));
    }
    kept
}

/// The draw as it is defined, without a bound or a shortcut.
fn plain(logits: &[f32], candidates: &[(u32, f32)], kept: &[(u32, f64)], filter: &Filter, u: f64) -> usize {
    if filter.temperature <= 0.0 || !candidates[0].1.is_finite() {
        return argmax(logits);
    }
    let mass = kept.iter().fold(0.0, |sum, k| sum + k.1);
    let mut left = u * mass;
    for (id, p) in kept {
        left -= p;
        if left < 0.0 {
            return *id as usize;
        }
    }
    kept[kept.len() - 1].0 as usize
}

fn pick_of<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

const KINDS: usize = 16;

/// A row of logits of a kind.
fn row(rng: &mut StdRng, kind: usize, vocab: usize) -> Vec<f32> {
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    let one = |rng: &mut StdRng, i: usize| {
        let normal = rng.sample::<f64, _>(rand_distr::StandardNormal) as f32;
        let odds: f32 = rng.random();
        let either = |share: f32, a: f32, b: f32| if odds < share { a } else { b };
        match kind {
            0 => normal * 3.0,
            1 => (normal * 3.0).round(),
            2 => 1.5,
            3 => either(0.3, -infinity, normal),
            4 => either(0.1, nan, either(0.2, -nan, normal * 2.0)),
            5 => either(0.5, 0.0, -0.0),
            6 => either(0.5, -infinity, nan),
            7 => normal * 1e-3 - 700.0,
            // As a model's: few stand out.
            8 if i % 61 == 7 => 20.0 - 3.0 * (1.0 + i as f32 / 61.0).ln(),
            8 => normal * 2.0,
            9 if i == vocab / 2 => 1e30,
            10 => normal * 1e38,
            11 => i as f32 * -1e-3,
            12 => either(0.001, infinity, normal),
            13 if i.is_multiple_of(5) => 7.0,
            13 => normal - 6.0,
            14 if i < vocab - 1 => -infinity,
            15 => f32::from_bits(rng.random()),
            _ => normal,
        }
    };
    (0..vocab).map(|i| one(rng, i)).collect()
}

/// Filters of all kinds; some cut at a token's own weight.
fn filter(rng: &mut StdRng, logits: &[f32]) -> Filter {
    let temperature = pick_of(
        rng,
        &[1.0, 1.0, 1.0, 0.7, 0.7, 2.0, 50.0, 100.0, 1e-4, 1e-30, 1e-45, f32::INFINITY, f32::NAN, 0.0, -1.0],
    );
    let max = logits[argmax(logits)];
    let own = Weigh { max, temperature }.of(logits[rng.random_range(0..logits.len())]) as f32;
    Filter {
        temperature,
        top_k: pick_of(rng, &[0, 0, 0, 0, 0, 1, 5, 40, 300, logits.len(), usize::MAX]),
        top_p: pick_of(rng, &[1.0, 1.0, 1.0, 0.9, 0.5, 0.25, 0.999, 1.0 - f32::EPSILON / 2.0, 1e-9, 0.0, -1.0, 2.0]),
        min_p: pick_of(rng, &[0.0, 0.0, 0.0, 0.05, 0.5, 1e-12, 1e-42, 1.0, 2.0, -1.0, own]),
    }
}

/// `count` filters for a row of each kind, several draws each, some at the very edges of shares. How many sums told the token, of
/// how many.
fn compare(rng: &mut StdRng, vocab: usize, kinds: impl Iterator<Item = usize>, count: usize) -> (usize, usize) {
    let (mut fast, mut of, mut keys) = (0, 0, Vec::new());
    for kind in kinds {
        let logits = row(rng, kind, vocab);
        let all = sorted(&logits);
        for _ in 0..count {
            let filter = filter(rng, &logits);
            let keep = if filter.top_k == 0 { vocab } else { filter.top_k.min(vocab) };
            let kept = plain_cut(&all[..keep], &filter);
            let mass: f64 = kept.iter().map(|k| k.1).sum();
            let edge = kept[..=rng.random_range(0..kept.len())].iter().map(|k| k.1).sum::<f64>() / mass;
            let edges = [edge, edge.next_up(), edge.next_down()].into_iter().filter(|u| (0.0..1.0).contains(u));
            let us = [0.0, 1.0 - f64::EPSILON / 2.0, rng.random(), rng.random(), rng.random::<f64>().powi(8)];
            for u in us.into_iter().chain(edges) {
                let want = plain(&logits, &all[..keep], &kept, &filter, u);
                assert_eq!(draw(&logits, &filter, u), want, "kind {kind} of {vocab}, {filter:?}, u {u}");
                let max = all[0].1;
                if keep == vocab && filter.temperature > 0.0 && max.is_finite() {
                    let weigh = Weigh { max, temperature: filter.temperature };
                    for fine in [false, true] {
                        let token = bins::choose(&logits, &filter, &weigh, u, fine, &mut keys);
                        assert!(
                            token.is_none_or(|token| token == want),
                            "kind {kind} of {vocab}, {filter:?}, u {u}, {fine}"
                        );
                        (fast, of) = (fast + usize::from(token.is_some()), of + 1);
                    }
                }
            }
        }
    }
    (fast, of)
}

#[test]
fn draws_are_those_of_a_full_sort() {
    let mut rng = StdRng::seed_from_u64(1);
    for (vocab, count) in
        [(1, 20), (2, 20), (3, 20), (31, 20), (300, 20), (1023, 8), (1024, 30), (1500, 30), (4099, 20)]
    {
        let (fast, of) = compare(&mut rng, vocab, 0..KINDS, count);
        // Many are at edges on purpose, where only the definition tells.
        assert!(fast * 2 > of, "{vocab}: {fast} of {of}");
    }
}

#[test]
fn draws_from_a_large_vocabulary_are_those_of_a_full_sort() {
    let (fast, of) = compare(&mut StdRng::seed_from_u64(2), 151_936, [0, 1, 8, 13].into_iter(), 5);
    assert!(fast * 2 > of, "{fast} of {of}");
}

/// What a server is asked for needs no full sort.
#[test]
fn ordinary_draws_are_sure() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut keys = Vec::new();
    let mut unsure = 0;
    for kind in [0, 8, 13] {
        let logits = row(&mut rng, kind, 20_000);
        let max = logits[argmax(&logits)];
        for (temperature, top_p, min_p) in [(1.0, 1.0, 0.0), (0.7, 0.9, 0.0), (1.0, 0.95, 0.05), (1.5, 1.0, 0.1)] {
            let filter = Filter { temperature, top_k: 0, top_p, min_p };
            let weigh = Weigh { max, temperature };
            unsure +=
                (0..50).filter(|_| bins::draw(&logits, &filter, &weigh, rng.random(), &mut keys).is_none()).count();
        }
    }
    assert!(unsure < 6, "{unsure} of 600");
    // Only tokens of few intervals were looked at.
    assert!(keys.capacity() < 10_000);
}

#[test]
fn the_best_are_those_of_a_full_sort() {
    let mut rng = StdRng::seed_from_u64(4);
    for vocab in [0, 1, 5, 64, 1000, 5003] {
        for kind in 0..KINDS {
            let logits = if vocab == 0 { Vec::new() } else { row(&mut rng, kind, vocab) };
            let all = sorted(&logits);
            for n in [0, 1, 2, 20, 40, 300, 1250, 5002, 5003, usize::MAX] {
                let bits = |top: &[(u32, f32)]| top.iter().map(|(id, x)| (*id, x.to_bits())).collect::<Vec<_>>();
                assert_eq!(bits(&top_n(&logits, n)), bits(&all[..n.min(vocab)]), "{n} of {vocab}, kind {kind}");
            }
        }
    }
    for x in [0.0, -0.0, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 2.0] {
        let key = best::key(7, x);
        assert_eq!((best::id(key), best::logit(key).to_bits()), (7, x.to_bits()));
    }
}
