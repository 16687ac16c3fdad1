//! In which order a run takes its examples.
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;

/// The endless order of the examples: each epoch is a permutation of its own, drawn from a seed; without one, each is the data as it is.
pub struct Order {
    n: usize,
    seed: Option<u64>,
    /// The epoch that was drawn last.
    epoch: Option<(usize, Vec<usize>)>,
}

impl Order {
    /// Of `n` examples.
    pub fn new(n: usize, seed: Option<u64>) -> Self {
        Order { n, seed, epoch: None }
    }

    /// The examples in places `range`.
    pub fn places(&mut self, range: Range<usize>) -> Vec<usize> {
        let n = self.n;
        let Some(seed) = self.seed else { return range.map(|at| at % n).collect() };
        let pick = |at: usize| {
            let drawn = self.epoch.take().filter(|(epoch, _)| *epoch == at / n);
            let (_, all) = self.epoch.insert(drawn.unwrap_or_else(|| {
                let mut all: Vec<usize> = (0..n).collect();
                shuffle(&mut all, seed ^ ((at / n) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                (at / n, all)
            }));
            all[at % n]
        };
        range.map(pick).collect()
    }
}

/// Fisher and Yates's shuffle, from `seed`.
pub fn shuffle(all: &mut [usize], seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for i in (1..all.len()).rev() {
        all.swap(i, rng.random_range(0..=i));
    }
}
