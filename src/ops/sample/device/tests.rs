#![allow(clippy::unwrap_used)]
use super::super::{Filter, draw, log_sum_exp, top_n};
use super::*;
use candle_core::{DType, Device};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::BTreeMap;

/// One choice, and the CPU's answer.
struct Case {
    filter: Filter,
    u: f64,
    penalties: Penalties,
    seen: BTreeMap<u32, u32>,
    banned: Vec<u32>,
    /// Chosen in the step before and seen once more, in a place of its own.
    unread: Option<u32>,
}

impl Case {
    fn random(rng: &mut StdRng, logits: &[f32]) -> Self {
        let vocab = logits.len() as u32;
        let filter = Filter {
            temperature: pick(rng, &[0.0, 1.0, 1.0, 0.7, 2.0, 50.0, 1e-4, 1e-30]),
            top_k: pick(rng, &[0, 0, 1, 5, 40, 300, vocab as usize, usize::MAX]),
            top_p: pick(rng, &[1.0, 1.0, 0.9, 0.5, 0.999, 1e-9, 0.0]),
            min_p: pick(rng, &[0.0, 0.0, 0.05, 0.5, 1e-12, 1.0, 2.0]),
        };
        let penalties = Penalties {
            repetition: pick(rng, &[1.0, 1.3, 0.8]),
            presence: pick(rng, &[0.0, 0.5, -0.3]),
            frequency: pick(rng, &[0.0, 0.25]),
            pending: None,
        };
        let few = pick(rng, &[0, 3, 20, 2000]).min(vocab);
        let mut seen: BTreeMap<u32, u32> =
            (0..few).map(|_| (rng.random_range(0..vocab), rng.random_range(0..4))).collect();
        let mut banned: Vec<u32> = (0..few / 4).map(|_| rng.random_range(0..vocab)).collect();
        // What changes the best token matters most.
        match rng.random_range(0..3) {
            0 => drop(seen.insert(super::super::argmax(logits) as u32, 2)),
            1 => banned.push(super::super::argmax(logits) as u32),
            _ => (),
        }
        let listed = seen.keys().chain(&banned).next().copied();
        let best = super::super::argmax(logits) as u32;
        let unread = pick(rng, &[None, listed, Some(best), Some(rng.clone().random_range(0..vocab))]);
        Case {
            unread,
            filter,
            u: pick(rng, &[0.0, 0.9, 1.0 - f64::EPSILON / 2.0, rng.clone().random()]),
            penalties,
            seen,
            banned,
        }
    }

    fn push(&self, choices: &mut Choices, row: usize) {
        let seen = self.seen.iter().map(|(id, count)| (*id, *count));
        let penalties = Penalties { pending: self.unread.map(|_| row as u32), ..self.penalties };
        choices.push(row, &self.filter, self.u, &penalties, seen, &self.banned);
    }

    /// As the engine's sampler penalises.
    fn penalised(&self, logits: &[f32]) -> Vec<f32> {
        let mut changed = logits.to_vec();
        let (p, mut seen) = (&self.penalties, self.seen.clone());
        self.unread.into_iter().for_each(|id| *seen.entry(id).or_insert(0) += 1);
        for (id, count) in &seen {
            let x = &mut changed[*id as usize];
            *x = if *x > 0.0 { *x / p.repetition } else { *x * p.repetition };
            if *count > 0 {
                *x -= p.presence + p.frequency * *count as f32;
            }
        }
        self.banned.iter().for_each(|id| changed[*id as usize] = f32::NEG_INFINITY);
        changed
    }
}

fn pick<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

/// How far, in weights, the target of the draw and the cuts of top-p and min-p are from an edge of a token's share.
fn margin(logits: &[f32], filter: &Filter, u: f64) -> f64 {
    let candidates = top_n(logits, if filter.top_k == 0 { logits.len() } else { filter.top_k });
    let weight = |x: f32| f64::from((x - candidates[0].1) / filter.temperature).exp().max(0.0);
    let total: f64 = candidates.iter().map(|c| weight(c.1)).sum();
    let cut = f64::from(filter.top_p) * total;
    let (mut mass, mut edges, mut nearest) = (0f64, Vec::new(), f64::INFINITY);
    for (_, x) in &candidates {
        if mass > 0.0 && (mass >= cut && filter.top_p < 1.0 || weight(*x) < f64::from(filter.min_p)) {
            break;
        }
        mass += weight(*x);
        nearest = nearest.min((weight(*x) - f64::from(filter.min_p)).abs()).min((mass - cut).abs());
        edges.push(mass);
    }
    edges.iter().map(|edge| (edge - u * mass).abs()).fold(nearest, f64::min)
}

/// Rows of logits of all kinds, the kind by the row.
fn rows(rng: &mut StdRng, count: usize, vocab: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(count * vocab);
    for i in 0..count * vocab {
        let normal: f32 = rng.sample::<f64, _>(rand_distr::StandardNormal) as f32 * 3.0;
        let odds: f32 = rng.random();
        all.push(match i / vocab % 9 {
            0 | 1 => normal,
            2 => normal.round(),
            3 => 1.5,
            4 => {
                if odds < 0.3 {
                    f32::NEG_INFINITY
                } else {
                    normal
                }
            }
            5 => {
                if odds < 0.1 {
                    f32::NAN
                } else {
                    normal
                }
            }
            6 => {
                if odds < 0.5 {
                    0.0
                } else {
                    -0.0
                }
            }
            7 => {
                if odds < 0.5 {
                    f32::NEG_INFINITY
                } else {
                    f32::NAN
                }
            }
            _ => normal * 1e-3 - 700.0,
        });
    }
    all
}

/// With `before` from the step before, and room for 64 tokens.
fn sampling(order: u32, before: &[u32]) -> Sampling {
    let gpu = Gpu::emulated(order);
    let there = Buffer::poisoned(&gpu, 4 * 64).unwrap();
    there.write(0, before).unwrap();
    Sampling::new(&gpu, &Arc::new(there)).unwrap()
}

/// Plans and chooses the blocks of a step in one.
fn choose(sampling: &mut Sampling, logits: &[&Tensor], blocks: &[Block]) -> Result<Chosen> {
    // Behind other words.
    let mut words = Words::default();
    words.add(&[7u32; 5]);
    let plan = sampling.plan(blocks, &mut words)?;
    let carried = words.carry(&sampling.gpu)?;
    logits.iter().enumerate().try_for_each(|(i, logits)| sampling.choose(&plan, i, logits, &carried))?;
    sampling.end(&plan)?;
    sampling.read(plan)
}

fn block(first: usize, logits: &Tensor, choices: &Choices, wanted: &[Wanted]) -> Block {
    let choices = Choices { rows: choices.rows.clone(), changes: choices.changes.clone() };
    Block { rows: first..first + logits.dims()[0], choices, wanted: wanted.to_vec() }
}

/// Tokens in each order of threads, which must be the same; `before` is what the step before chose.
fn tokens(logits: &Tensor, choices: &Choices, before: &[u32], orders: &[u32]) -> Vec<u32> {
    let run = |order: u32| {
        let mut sampling = sampling(order, before);
        let chosen = choose(&mut sampling, &[logits], &[block(0, logits, choices, &[])]).unwrap();
        // The next step finds them, and what is chosen then does not disturb what is on its way.
        assert_eq!(
            sampling.before.read::<u32>(0, choices.len()).unwrap(),
            sampling.tokens.read::<u32>(0, choices.len()).unwrap()
        );
        sampling.tokens.fill(0xff).unwrap();
        let (tokens, scores) = chosen.wait().unwrap();
        assert!(scores.is_empty());
        tokens
    };
    let first = run(orders[0]);
    orders[1..].iter().for_each(|order| assert_eq!(run(*order), first, "order {order}"));
    first
}

/// The kernel's tokens against the CPU's. They may only differ where the margin is within the fixed point.
fn compare(rng: &mut StdRng, count: usize, vocab: usize, dtype: DType, orders: &[u32]) {
    let logits = Tensor::from_vec(rows(rng, count, vocab), (count, vocab), &Device::Cpu).unwrap();
    let logits = logits.to_dtype(dtype).unwrap();
    let values = logits.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    let cases: Vec<Case> = values.iter().map(|row| Case::random(rng, row)).collect();
    let mut choices = Choices::default();
    // In another order than the logits.
    (0..count).rev().for_each(|row| cases[row].push(&mut choices, row));
    // A token that nobody names stands for none.
    let before: Vec<u32> = cases.iter().map(|case| case.unread.unwrap_or(0)).collect();
    let got = tokens(&logits, &choices, &before, orders);
    for (row, token) in (0..count).rev().zip(got) {
        let case = &cases[row];
        let changed = case.penalised(&values[row]);
        let want = draw(&changed, &case.filter, case.u) as u32;
        let bound = vocab as f64 * (-44.9f64).exp2();
        let near = || case.filter.temperature > 0.0 && margin(&changed, &case.filter, case.u) < bound;
        assert!(
            token == want || near(),
            "{dtype:?}, vocabulary {vocab}, row {row}: {token}, on the CPU {want}; {:?} u {} {:?}, {} seen, {} banned",
            case.filter,
            case.u,
            case.penalties,
            case.seen.len(),
            case.banned.len()
        );
    }
}

#[test]
fn tokens_are_the_cpus() {
    let mut rng = StdRng::seed_from_u64(1);
    for vocab in [1, 2, 31, 257, 5000] {
        compare(&mut rng, 45, vocab, DType::F32, &[0, 1, 7]);
    }
}

#[test]
fn tokens_of_a_large_vocabulary_are_the_cpus() {
    compare(&mut StdRng::seed_from_u64(2), 9, 151_936, DType::F32, &[0, 7]);
}

#[test]
fn tokens_of_narrow_logits_are_the_cpus() {
    let mut rng = StdRng::seed_from_u64(3);
    compare(&mut rng, 27, 3001, DType::BF16, &[1]);
    compare(&mut rng, 27, 3001, DType::F16, &[1]);
}

/// A draw at the start, in the middle and at the end of a share; shares of equals in the order of ids.
#[test]
fn shares_follow_one_another() {
    let logits = Tensor::new(&[[0f32, 2.0, 0.0, 2.0, -1.0]], &Device::Cpu).unwrap();
    let weights = [1f64, 1.0, (-2f64).exp(), (-2f64).exp(), (-3f64).exp()];
    let total: f64 = weights.iter().sum();
    let filter = Filter { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let (mut choices, mut want, mut start) = (Choices::default(), Vec::new(), 0.0);
    for (id, w) in [1u32, 3, 0, 2, 4].into_iter().zip(weights) {
        for at in [1e-6, 0.5, 1.0 - 1e-6] {
            choices.push(0, &filter, (start + at * w) / total, &Penalties::NONE, [], &[]);
            want.push(id);
        }
        start += w;
    }
    assert_eq!(tokens(&logits, &choices, &[], &[0, 1, 7]), want);
}

#[test]
fn changes_are_sorted_and_bans_outweigh() {
    let mut choices = Choices::default();
    let greedy = Filter { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    choices.push(0, &greedy, 0.0, &Penalties { presence: 1.0, ..Penalties::NONE }, [(3, 1), (1, 9)], &[1, 3, 1, 900]);
    choices.push(0, &greedy, 0.0, &Penalties { presence: 1.0, ..Penalties::NONE }, [(3, 1)], &[]);
    let ids: Vec<(u32, u32)> = choices.changes.iter().map(|c| (c.id, c.count)).collect();
    assert_eq!(ids, [(1, NONE), (3, NONE), (900, NONE), (3, 1)]);
    assert_eq!((choices.rows[0].begin, choices.rows[0].end, choices.rows[1].end, choices.len()), (0, 3, 4, 2));
    // Ids beyond the vocabulary are nobody's.
    let logits = Tensor::new(&[[0f32, 2.0, 1.0, 1.5]], &Device::Cpu).unwrap();
    assert_eq!(tokens(&logits, &choices, &[], &[0]), [2, 1]);
    choices = Choices::default();
    assert!(choices.is_empty() && tokens(&logits, &choices, &[], &[0]).is_empty());
}

#[test]
fn log_probabilities_are_the_cpus() {
    let mut rng = StdRng::seed_from_u64(4);
    for (vocab, dtype) in [(1, DType::F32), (31, DType::F32), (5000, DType::F32), (700, DType::BF16), (700, DType::F16)]
    {
        let logits =
            Tensor::from_vec(rows(&mut rng, 9, vocab), (9, vocab), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let values = logits.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        // Nearly any token.
        let (hot, mut choices) = (Filter { temperature: 1e3, top_k: 0, top_p: 1.0, min_p: 0.0 }, Choices::default());
        (0..9).for_each(|row| choices.push(row, &hot, rng.random(), &Penalties::NONE, [], &[]));
        let chosen = tokens(&logits, &choices, &[], &[0]);
        let wanted: Vec<Wanted> = (0..18)
            .map(|i| Wanted {
                row: i % 9,
                of: if i < 9 { Of::Choice(i) } else { Of::Token(rng.random_range(0..vocab as u32)) },
                top: [0, 1, 5, 20][i % 4],
            })
            .collect();
        let run = |order| {
            let block = block(0, &logits, &choices, &wanted);
            choose(&mut sampling(order, &[]), &[&logits], &[block]).unwrap().wait().unwrap().1
        };
        let got = run(0);
        for order in [1, 7] {
            assert_eq!(format!("{:?}", run(order)), format!("{got:?}"), "order {order}");
        }
        for (w, got) in wanted.iter().zip(got) {
            let row = &values[w.row];
            let token = match w.of {
                Of::Token(token) => token,
                Of::Choice(i) => chosen[i],
            };
            let norm = log_sum_exp(row);
            let same = |a: f32, x: f32| {
                a == x - norm || a.is_nan() && norm.is_nan() || (a - (x - norm)).abs() < 2e-6 * norm.abs().max(1.0)
            };
            assert!(same(got.logprob, row[token as usize]), "{w:?} {got:?} {norm}");
            let want = top_n(row, w.top);
            assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), want.iter().map(|t| t.0).collect::<Vec<_>>());
            assert!(got.top.iter().zip(want).all(|(a, b)| same(a.1, b.1)), "{got:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut sampling = sampling(0, &[]);
    let logits = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    let filter = Filter { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut choices = Choices::default();
    choices.push(2, &filter, 0.0, &Penalties::NONE, [], &[]);
    let mut try_with = |logits: &Tensor, choices: &Choices, wanted: &[Wanted]| {
        choose(&mut sampling, &[logits], &[block(0, logits, choices, wanted)]).map(drop)
    };
    assert!(try_with(&logits, &choices, &[]).unwrap_err().to_string().contains("row 2 of 2"));
    let wide = Tensor::zeros((3, MOST_TOKENS + 1), DType::F16, &Device::Cpu).unwrap();
    assert!(try_with(&wide, &choices, &[]).unwrap_err().to_string().contains("524289"));
    assert!(try_with(&Tensor::zeros((3, 0), DType::F32, &Device::Cpu).unwrap(), &choices, &[]).is_err());
    let three = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    (0..64).for_each(|_| choices.push(0, &filter, 0.0, &Penalties::NONE, [], &[]));
    assert!(try_with(&three, &choices, &[]).unwrap_err().to_string().contains("65 tokens in a step"));
    choices = Choices::default();
    choices.push(0, &filter, 0.0, &Penalties { pending: Some(64), ..Penalties::NONE }, [], &[]);
    assert!(try_with(&three, &choices, &[]).unwrap_err().to_string().contains("place 64 of 64"));
    choices = Choices::default();
    choices.push(0, &filter, 0.0, &Penalties::NONE, [], &[]);
    for (row, of, top) in [(2, Of::Token(0), 0), (0, Of::Choice(1), 0), (0, Of::Token(0), MOST_TOP + 1)] {
        assert!(try_with(&logits, &choices, &[Wanted { row, of, top }]).is_err());
    }
    let beyond = block(0, &logits, &choices, &[Wanted { row: 1, of: Of::Token(4), top: 0 }]);
    let (_, scores) = choose(&mut sampling, &[&logits], &[beyond]).unwrap().wait().unwrap();
    assert!(scores[0].logprob.is_nan());
    // A plan is for as many rows and blocks as it says.
    let mut words = Words::default();
    let plan = sampling.plan(&[block(0, &three, &choices, &[])], &mut words).unwrap();
    let carried = words.carry(&sampling.gpu).unwrap();
    let refused = |block, logits: &Tensor, carried: &Carried| {
        sampling.choose(&plan, block, logits, carried).unwrap_err().to_string()
    };
    assert!(refused(0, &logits, &carried).contains("2 rows of logits, planned for 3"));
    assert!(refused(1, &three, &carried).contains("block 1 of 1"));
    let none = Words::default().carry(&sampling.gpu).unwrap();
    assert!(refused(0, &three, &none).contains("0 words were carried"));
}

/// Blocks of rows, each with changes and wanted log-probabilities, in one copy.
#[test]
fn blocks_of_a_step_go_over_together() {
    let mut rng = StdRng::seed_from_u64(5);
    let blocks = [3, 2, 4].map(|count| {
        let (values, mut choices) = (rows(&mut rng, count, 300), Choices::default());
        for (row, values) in values.chunks(300).enumerate() {
            Case { unread: None, ..Case::random(&mut rng, values) }.push(&mut choices, row);
        }
        let wanted = Wanted { row: 1, of: Of::Choice(1), top: count };
        (Tensor::from_vec(values, (count, 300), &Device::Cpu).unwrap(), choices, vec![wanted; count - 2])
    });
    let (mut alone, mut scores) = (Vec::new(), Vec::new());
    for (logits, choices, wanted) in &blocks {
        let block = block(0, logits, choices, wanted);
        let (tokens, own) = choose(&mut sampling(0, &[]), &[logits], &[block]).unwrap().wait().unwrap();
        alone.extend(tokens);
        scores.extend(own);
    }
    let mut first = 0;
    let together = blocks.each_ref().map(|(logits, choices, wanted)| {
        let block = block(first, logits, choices, wanted);
        first = block.rows.end;
        block
    });
    let logits = blocks.each_ref().map(|(logits, ..)| logits);
    let got = choose(&mut sampling(0, &[]), &logits, &together).unwrap().wait().unwrap();
    assert_eq!(format!("{got:?}"), format!("{:?}", (alone, scores)));
    // How many tokens were seen moves nothing that a graph reads, until they are twice as many.
    let mut changed = sampling(0, &[]);
    let mut planned = |changes: u32| {
        let (mut choices, logits) = (Choices::default(), Tensor::zeros((2, 300), DType::F32, &Device::Cpu).unwrap());
        let filter = Filter { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
        choices.push(0, &filter, 0.0, &Penalties::NONE, (0..changes).map(|id| (id, 1)), &[]);
        let blocks = [block(0, &logits, &choices, &[]), block(2, &logits, &choices, &[])];
        let mut words = Words::default();
        (changed.plan(&blocks, &mut words).unwrap().layout().clone(), words.len())
    };
    assert!(planned(130) == planned(200) && planned(200).0 != planned(300).0);
}
