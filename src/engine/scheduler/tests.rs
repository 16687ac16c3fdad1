#![allow(clippy::unwrap_used)]
//! Simulations: a step "runs" by being completed, sampled tokens are made up. No model, no tensor.
use super::*;
use crate::adapter::{InputRow, KvRows};
use crate::kv::PageId;
use proptest::prelude::*;
use std::collections::HashSet;

fn config(pages: usize) -> SchedulerConfig {
    SchedulerConfig {
        pages,
        max_batch_tokens: 64,
        max_sequences: 8,
        max_queue: 10_000,
        max_queue_per_tenant: 10_000,
        prefix_caching: true,
    }
}

/// `tag` makes the content: equal tags are equal prefixes.
fn prefix(tag: u32, stored: usize, rows: usize) -> Arc<Prefix> {
    let kv = KvRows { len: stored, data: vec![tag as f32; stored].into() };
    let rows = (0..rows as u32).map(|i| InputRow::Token(tag * 1000 + i)).collect();
    Arc::new(Prefix::new(Some(kv), rows, Vec::new().into()).unwrap())
}

fn sequence(tenant: &str, prefix: Option<Arc<Prefix>>, prompt: usize, new: usize) -> NewSequence {
    let input = (0..prompt as u32).map(InputRow::Token).collect();
    let tenant = tenant.into();
    NewSequence { tenant, prefix, input, soft: None, pooling: None, score_from: None, max_new_tokens: new }
}

/// A scheduler and, for each sequence, how many tokens it still wants.
struct Simulation {
    scheduler: Scheduler,
    left: HashMap<SequenceId, usize>,
    done: Vec<SequenceId>,
    /// A step's tokens are known when the next one was planned, as on a GPU.
    ahead: bool,
    /// Those of the last step.
    unread: Vec<(SequenceId, u32)>,
    /// All generated tokens of a sequence, known to the scheduler or not.
    truth: HashMap<SequenceId, Vec<u32>>,
    /// What was written to a slot of the pool last: the prefix and the place of a token, and which.
    slots: HashMap<(PageId, usize), Written>,
}

type Written = (Option<Digest>, usize, InputRow);

impl Simulation {
    fn new(config: SchedulerConfig) -> Self {
        let (scheduler, left, truth, slots) = (Scheduler::new(config), HashMap::new(), HashMap::new(), HashMap::new());
        Simulation { scheduler, left, done: Vec::new(), ahead: false, unread: Vec::new(), truth, slots }
    }

    fn submit(&mut self, new: NewSequence) -> SequenceId {
        let want = new.max_new_tokens;
        let id = self.scheduler.submit(new).unwrap();
        self.left.insert(id, want);
        id
    }

    fn step(&mut self) -> Step {
        let step = self.scheduler.schedule();
        self.check(&step);
        self.write(&step);
        self.scheduler.complete(&step);
        let mut sampled = Vec::new();
        for chunk in &step.sequences {
            let e = self.scheduler.get(chunk.id).unwrap();
            if e.logits(&chunk.rows).1 {
                // Sequences part and meet again.
                let token = 100 + (chunk.id.0 as usize * 7 + e.len()) as u32 % 3;
                self.truth.entry(chunk.id).or_default().push(token);
                if self.ahead {
                    self.scheduler.chosen(chunk.id, sampled.len() as u32);
                }
                sampled.push((chunk.id, token));
            }
        }
        let known = if self.ahead { std::mem::replace(&mut self.unread, sampled) } else { sampled };
        for (id, token) in &known {
            self.scheduler.push_token(*id, *token);
            let left = self.left.get_mut(id).unwrap();
            // Some end early, when their next row has run.
            *left = if self.ahead && *left % 7 == 6 { 0 } else { left.saturating_sub(1) };
        }
        for id in step.sequences.iter().map(|c| c.id).chain(known.iter().map(|(id, _)| *id)) {
            let Some(e) = self.scheduler.get(id) else { continue };
            if self.left[&id] == 0 && (e.computed >= e.goal().min(e.len() - 1) || known.iter().any(|(k, _)| *k == id)) {
                self.scheduler.finish(id);
                self.done.push(id);
            }
        }
        for id in &step.stuck {
            self.scheduler.finish(*id);
            self.done.push(*id);
        }
        step
    }

    /// The step's rows write their slots, after they have found in those before what their sequence put there.
    fn write(&mut self, step: &Step) {
        self.slots.retain(|(page, _), _| !step.fresh.contains(page));
        for chunk in &step.sequences {
            let e = self.scheduler.get(chunk.id).unwrap();
            let known = |i: usize| {
                let generated = self.truth.get(&chunk.id).map_or(&[][..], |t| t);
                e.tokens.get(i).cloned().unwrap_or_else(|| InputRow::Token(generated[i - e.prompt_len]))
            };
            let prefix = e.prefix.as_ref().map(|p| p.digest);
            for i in 0..chunk.rows.end {
                let (slot, written) = ((e.pages[i / PAGE_TOKENS], i % PAGE_TOKENS), (prefix, i, known(i)));
                if i < chunk.rows.start {
                    assert_eq!(self.slots.get(&slot), Some(&written), "row {i} of {:?}", chunk.id);
                } else {
                    self.slots.insert(slot, written);
                }
            }
        }
    }

    /// What must hold for every plan.
    fn check(&self, step: &Step) {
        let s = &self.scheduler;
        let rows: usize = step.sequences.iter().map(|c| c.rows.len()).sum();
        let prefix_rows: usize = step.prefixes.iter().map(|c| c.rows.len()).sum();
        assert!(rows + prefix_rows <= s.config.max_batch_tokens);
        assert!(s.running.len() <= s.config.max_sequences);
        let ids: HashSet<_> = step.sequences.iter().map(|c| c.id).collect();
        assert_eq!(ids.len(), step.sequences.len(), "a sequence runs once a step");
        let mut writers = HashSet::new();
        for chunk in &step.sequences {
            let e = &s.sequences[&chunk.id];
            assert!(e.running && chunk.rows.start == e.computed && !chunk.rows.is_empty());
            assert!(e.pages.len() * PAGE_TOKENS >= chunk.rows.end, "rows have pages");
            assert!(chunk.rows.end <= e.tokens.len() + 1, "at most one token is unread");
            for page in &e.pages[chunk.rows.start / PAGE_TOKENS..=(chunk.rows.end - 1) / PAGE_TOKENS] {
                assert!(writers.insert(*page), "a page is written by one sequence");
            }
            if let Some(p) = &e.prefix {
                assert!(s.is_ready(&p.digest), "nobody runs before its prefix");
            }
        }
        // Every used page belongs to somebody, and nobody shares what is written.
        let prefixes: HashSet<PageId> =
            s.prefixes.ready().flat_map(|d| s.prefixes.get(&d).unwrap().pages.clone()).collect();
        assert!(writers.is_disjoint(&prefixes));
    }

    fn run(&mut self, limit: usize) {
        for _ in 0..limit {
            if !self.scheduler.has_work() {
                return;
            }
            self.step();
        }
        panic!("{} sequences did not end in {limit} steps", self.scheduler.sequences.len());
    }

    /// Nobody is left and only prefixes hold pages.
    fn assert_settled(&mut self) {
        assert_eq!(self.scheduler.load(), (0, 0));
        while self.scheduler.prefixes.evict_oldest(&mut self.scheduler.pages).is_some() {}
        let (total, available) = self.scheduler.page_counts();
        let pinned = self.scheduler.prefixes.pinned_pages_besides(None);
        assert_eq!(available, total - pinned);
    }
}

#[test]
fn a_prompt_is_cut_to_the_budget_and_decoding_goes_on_beside_it() {
    let mut s = Simulation::new(config(100));
    let short = s.submit(sequence("a", None, 4, 20));
    s.step();
    let long = s.submit(sequence("b", None, 200, 1));
    let rows = |step: &Step, id| step.sequences.iter().find(|c| c.id == id).map(|c| c.rows.clone());
    for expected in [0..63, 63..126, 126..189] {
        let step = s.step();
        assert_eq!(rows(&step, short).unwrap().len(), 1);
        assert_eq!(rows(&step, long), Some(expected));
    }
    s.run(40);
    s.assert_settled();
}

#[test]
fn stored_prefixes_run_at_once_and_others_are_compiled_in_chunks() {
    let mut s = Simulation::new(config(100));
    s.submit(sequence("a", Some(prefix(1, 20, 0)), 4, 1));
    s.submit(sequence("b", Some(prefix(2, 0, 100)), 4, 1));
    let step = s.step();
    assert_eq!((step.copies.len(), step.sequences.len()), (1, 1));
    assert_eq!(step.prefixes[0].rows, 0..60);
    let step = s.step();
    assert_eq!((step.prefixes[0].rows.clone(), step.sequences.len()), (60..100, 0));
    assert_eq!(s.step().sequences.len(), 1);
    // Once compiled it stays: the next request of the task pays nothing.
    s.submit(sequence("b", Some(prefix(2, 0, 100)), 4, 1));
    let step = s.step();
    assert_eq!((step.prefixes.len(), step.sequences.len()), (0, 1));
    let c = s.scheduler.counters();
    assert_eq!((c.prefix_hits, c.prefix_misses), (1, 2));
}

#[test]
fn equal_leading_blocks_are_reused_under_the_same_prefix_only() {
    let mut s = Simulation::new(config(100));
    for tag in [1, 1, 2] {
        s.submit(sequence("t", Some(prefix(tag, 16, 0)), 50, 1));
        s.run(10);
    }
    // 50 tokens: the last one is always computed, so three full blocks can be found.
    assert_eq!(s.scheduler.counters().cached_tokens, 48);
    s.assert_settled();
}

#[test]
fn least_recently_used_prefixes_leave_and_come_back_and_pinned_ones_stay() {
    let mut s = Simulation::new(config(10));
    s.scheduler.prepare(prefix(0, 48, 0), true).unwrap();
    for tag in [1, 2, 3, 1] {
        s.submit(sequence(&tag.to_string(), Some(prefix(tag, 48, 0)), 10, 1));
        s.run(10);
        assert!(s.scheduler.is_ready(&prefix(0, 48, 0).digest), "pinned");
    }
    assert_eq!(s.scheduler.counters().prefix_evictions, 2);
    let e = s.scheduler.prepare(prefix(9, 64, 0), true).unwrap_err();
    assert!(e.to_string().contains("half"), "{e}");
    s.scheduler.forget(&prefix(0, 48, 0).digest);
    assert!(!s.scheduler.is_ready(&prefix(0, 48, 0).digest));
    // One that is in use leaves with its last user.
    s.submit(sequence("1", Some(prefix(1, 48, 0)), 10, 3));
    s.step();
    s.scheduler.forget(&prefix(1, 48, 0).digest);
    assert!(s.scheduler.is_ready(&prefix(1, 48, 0).digest));
    s.run(10);
    assert!(!s.scheduler.is_ready(&prefix(1, 48, 0).digest));
    s.assert_settled();
}

#[test]
fn what_can_never_fit_is_refused_and_what_fits_alone_ends() {
    let mut s = Simulation::new(config(4));
    let e = s.scheduler.submit(sequence("a", None, 60, 5)).unwrap_err();
    assert!(e.to_string().contains("5 KV pages") && e.to_string().contains('4'), "{e}");
    let ids: Vec<_> = (0..3).map(|i| s.submit(sequence(&i.to_string(), None, 30, 34))).collect();
    s.run(1000);
    assert_eq!(s.done.len(), ids.len());
    assert!(s.scheduler.counters().preemptions > 0);
    s.assert_settled();
}

#[test]
fn full_queues_refuse_one_tenant_before_all() {
    let mut s = Scheduler::new(SchedulerConfig { max_queue: 5, max_queue_per_tenant: 3, ..config(10) });
    let results: Vec<bool> = (0..4).map(|_| s.submit(sequence("flood", None, 4, 4)).is_ok()).collect();
    assert_eq!(results, [true, true, true, false]);
    assert!(s.submit(sequence("other", None, 4, 4)).is_ok());
    assert!(s.submit(sequence("third", None, 4, 4)).is_ok());
    let e = s.submit(sequence("fourth", None, 4, 4)).unwrap_err();
    assert!(e.retry_after().is_some());
}

/// 2,000 requests on one task; another task's request waits for the batch at hand, not for the flood.
#[test]
fn a_flood_on_one_adapter_does_not_starve_another() {
    let mut s = Simulation::new(config(400));
    for _ in 0..2000 {
        s.submit(sequence("flood", None, 20, 20));
    }
    (0..50).for_each(|_| drop(s.step()));
    for round in 0..20 {
        let id = s.submit(sequence("quiet", None, 20, 20));
        let steps = (0..).take_while(|_| !s.done.contains(&id) && !s.step().is_empty()).count();
        assert!(steps <= 50, "round {round}: {steps} steps");
    }
}

/// A step is planned before the last one's tokens are known: a sequence goes on from where they will be, ends when it is known to
/// have ended, and is not run beyond its limit.
#[test]
fn steps_are_planned_before_tokens_are_known() {
    let mut s = Simulation::new(config(100));
    s.ahead = true;
    let id = s.submit(sequence("a", None, 15, 3));
    let unread = |s: &Simulation| s.scheduler.get(id).map(|e| (e.tokens.len(), e.unread()));
    let rows = |step: &Step| step.sequences.iter().map(|c| (c.rows.start, c.rows.end)).collect::<Vec<_>>();
    assert_eq!(rows(&s.step()), [(0, 15)]);
    assert_eq!(unread(&s), Some((15, Some(0))));
    assert_eq!(rows(&s.step()), [(15, 16)]);
    assert_eq!(unread(&s), Some((16, Some(0))));
    assert_eq!(rows(&s.step()), [(16, 17)]);
    // Its third token is under way: there is nothing to run.
    assert!(s.step().is_empty());
    assert_eq!(unread(&s), None);
    s.assert_settled();
    // The block whose last token came from the device is found by the next one with the same text.
    let text = [(0..15).collect(), s.truth[&id].clone(), vec![1, 2]].concat();
    let new = NewSequence { input: text.into_iter().map(InputRow::Token).collect(), ..sequence("a", None, 0, 1) };
    s.submit(new);
    assert_eq!(rows(&s.step()), [(16, 20)]);
}

/// Two tasks that both always have work get equal shares, however many requests each has waiting.
#[test]
fn backlogged_tenants_share_equally() {
    let mut s = Simulation::new(config(400));
    for (tenant, requests) in [("many", 600), ("few", 150)] {
        for _ in 0..requests {
            s.submit(sequence(tenant, None, 20, 20));
        }
    }
    let mut tokens: HashMap<String, usize> = HashMap::new();
    for _ in 0..400 {
        for chunk in s.step().sequences {
            if let Some(e) = s.scheduler.get(chunk.id) {
                *tokens.entry(e.tenant.to_string()).or_default() += chunk.rows.len();
            }
        }
    }
    let (many, few) = (tokens["many"] as f64, tokens["few"] as f64);
    assert!((many / few - 1.0).abs() < 0.1, "{many} {few}");
}

#[derive(Clone, Debug)]
enum Op {
    Submit { tenant: u32, tag: u32, stored: bool, len: usize, prompt: usize, new: usize },
    Step,
    Cancel(usize),
    Prepare(u32),
    Forget(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let submit = (0..3u32, 0..4u32, any::<bool>(), 0..40usize, 1..70usize, 1..30usize)
        .prop_map(|(tenant, tag, stored, len, prompt, new)| Op::Submit { tenant, tag, stored, len, prompt, new });
    prop_oneof![3 => submit, 6 => Just(Op::Step), 1 => any::<usize>().prop_map(Op::Cancel),
        1 => (0..4u32).prop_map(Op::Prepare), 1 => (0..4u32).prop_map(Op::Forget)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    /// Whatever comes, every plan is sound, everything admitted ends, and every page comes back.
    #[test]
    fn everything_ends_and_every_page_comes_back(ops in prop::collection::vec(op(), 1..80), pages in 4usize..20, budget in 8usize..80, ahead: bool) {
        let mut s = Simulation::new(SchedulerConfig { max_batch_tokens: budget, ..config(pages) });
        s.ahead = ahead;
        for op in ops {
            match op {
                Op::Submit { tenant, tag, stored, len, prompt, new } => {
                    let prefix = (len > 0).then(|| if stored { prefix(tag, len, 0) } else { prefix(tag, 0, len) });
                    let new = sequence(&tenant.to_string(), prefix, prompt, new);
                    let want = new.max_new_tokens;
                    if let Ok(id) = s.scheduler.submit(new) {
                        s.left.insert(id, want);
                    }
                }
                Op::Step => drop(s.step()),
                Op::Cancel(i) => {
                    let mut ids: Vec<_> = s.scheduler.sequences.keys().copied().collect();
                    ids.sort();
                    if !ids.is_empty() {
                        s.scheduler.finish(ids[i % ids.len()]);
                    }
                }
                Op::Prepare(tag) => drop(s.scheduler.prepare(prefix(tag, 10, 10), false)),
                Op::Forget(tag) => s.scheduler.forget(&prefix(tag, 10, 10).digest),
            }
        }
        s.run(5000);
        s.assert_settled();
    }
}
