//! What each request says. Request number i of a seed is the same whatever happened before it.
use super::lengths::Lengths;
use super::popularity::{Chooser, Popularity};
use super::tasks::{PastEos, Tasks};
use crate::error::Result;
use crate::rpc::proto::{self, generate_request::Input};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Who sends: requests of one adapter are one tenant. An index into [`Workload::tenants`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(pub usize);

/// Which part of a run a request belongs to. Each has requests of its own, so that a warm-up changes no measured one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not counted.
    WarmUp,
    /// Counted.
    Measured,
}

/// Lengths of random requests.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Prompts, in tokens.
    pub prompt_len: Lengths,
    /// Outputs, in tokens: exactly so many are generated.
    pub output_len: Lengths,
}

/// An adapter that random requests may name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Made {
    /// Empty: the bare base.
    pub id: String,
    pub prefix_len: usize,
}

/// All requests of a run.
#[derive(Debug)]
pub struct Workload {
    tenants: Vec<String>,
    seed: u64,
    /// The run's number in a sweep.
    point: u64,
    sampling: Option<proto::Sampling>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Synthetic {
        lengths: Synthetic,
        adapters: Vec<Made>,
        chooser: Chooser,
        vocab_size: u32,
        max_model_len: usize,
    },
    /// Without a chooser: in the order of the file.
    Tasks {
        tasks: Tasks,
        chooser: Option<Chooser>,
    },
}

/// One request, ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Whose it is.
    pub tenant: Tenant,
    /// What is sent.
    pub message: proto::GenerateRequest,
    /// How many tokens it must bring, where that is known before.
    pub wanted: Option<usize>,
}

impl Workload {
    /// Random token ids for `adapters`; none: for the bare base.
    pub(super) fn synthetic(
        lengths: Synthetic,
        mut adapters: Vec<Made>,
        popularity: Popularity,
        seed: u64,
        facts: &proto::GetServerInfoResponse,
    ) -> Result<Self> {
        if adapters.is_empty() {
            adapters.push(Made::default());
        }
        let chooser = Chooser::new(popularity, adapters.len())?;
        let source = Source::Synthetic {
            lengths,
            chooser,
            vocab_size: facts.model.as_ref().map_or(1, |m| m.vocab_size).max(1),
            max_model_len: facts.limits.map_or(usize::MAX, |l| l.max_model_len as usize),
            adapters,
        };
        Ok(Workload { tenants: source.names(), seed, point: 0, sampling: None, source })
    }

    /// The lines of a file: in its order, again and again, or for adapters drawn by `popularity`.
    pub(super) fn of_tasks(tasks: Tasks, popularity: Option<Popularity>, seed: u64) -> Result<Self> {
        let chooser = popularity.map(|p| Chooser::new(p, tasks.adapters.len())).transpose()?;
        let source = Source::Tasks { tasks, chooser };
        Ok(Workload { tenants: source.names(), seed, point: 0, sampling: None, source })
    }

    /// The same requests with random prompts that no other run of a sweep has, or the server would answer all but the
    /// first run from its cache. The first has those of a run by itself. Lengths and tenants stay, so that runs differ
    /// by what is swept alone; so do the lines of a tasks file, which are given.
    pub(super) fn of_point(self, number: usize) -> Self {
        Workload { point: number as u64, ..self }
    }

    /// The same with tokens drawn like this, by a seed for each request.
    pub(super) fn sampled(self, sampling: Option<proto::Sampling>) -> Self {
        Workload { sampling, ..self }
    }

    /// Names of the tenants.
    pub fn tenants(&self) -> &[String] {
        &self.tenants
    }

    /// Request number `index` of a phase.
    pub fn request(&self, phase: Phase, index: u64) -> Planned {
        let phase = match phase {
            Phase::WarmUp => 1,
            Phase::Measured => 0,
        };
        let seed = self.seed.rotate_left(32) ^ (index << 1 | phase);
        let mut planned = self.planned(seed, index);
        planned.message.sampling = self.sampling.map(|sampling| proto::Sampling { seed: Some(seed), ..sampling });
        planned
    }

    fn planned(&self, seed: u64, index: u64) -> Planned {
        let mut rng = StdRng::seed_from_u64(seed);
        match &self.source {
            Source::Synthetic { lengths, adapters, chooser, vocab_size, max_model_len } => {
                let tenant = chooser.choose(index, &mut rng);
                let made = &adapters[tenant.0];
                // What an open-ended distribution draws is cut to the room: one token at least of each.
                let room = max_model_len.saturating_sub(made.prefix_len);
                let prompt = lengths.prompt_len.draw(&mut rng).clamp(1, room.saturating_sub(1).max(1));
                let output = lengths.output_len.draw(&mut rng).clamp(1, room.saturating_sub(prompt).max(1));
                if self.point > 0 {
                    // Odd: the upper half, where no index reaches, differs for each number.
                    let mixed = self.point.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32);
                    rng = StdRng::seed_from_u64(seed ^ mixed);
                }
                let ids = (0..prompt).map(|_| rng.random_range(0..*vocab_size)).collect();
                let input = Input::TokenIds(proto::TokenIds { ids });
                Planned {
                    tenant,
                    message: message(&made.id, input, Some(output as u32), PastEos::GoOn),
                    wanted: Some(output),
                }
            }
            Source::Tasks { tasks, chooser } => {
                let line = match chooser {
                    None => (index % tasks.lines.len() as u64) as usize,
                    Some(chooser) => {
                        let lines = &tasks.of_adapter[chooser.choose(index, &mut rng).0];
                        lines[rng.random_range(0..lines.len())]
                    }
                };
                let line = &tasks.lines[line];
                let tenant = tasks.adapters.iter().position(|id| *id == line.adapter).unwrap_or_default();
                let drawn = tasks.output_len.map(|lengths| lengths.draw(&mut rng) as u32);
                let most = line.max_new_tokens.or(drawn);
                let exact = most.filter(|_| tasks.past_eos == PastEos::GoOn);
                let input = Input::Prompt(line.prompt.clone());
                Planned {
                    tenant: Tenant(tenant),
                    message: message(line.adapter.as_deref().unwrap_or_default(), input, most, tasks.past_eos),
                    wanted: exact.map(|n| n as usize),
                }
            }
        }
    }
}

impl Source {
    fn names(&self) -> Vec<String> {
        let name = |id: &str| if id.is_empty() { "(bare base)".to_owned() } else { id.to_owned() };
        match self {
            Source::Synthetic { adapters, .. } => adapters.iter().map(|made| name(&made.id)).collect(),
            Source::Tasks { tasks, .. } => tasks.adapters.iter().map(|id| name(id.as_deref().unwrap_or(""))).collect(),
        }
    }
}

fn message(adapter_id: &str, input: Input, most: Option<u32>, past_eos: PastEos) -> proto::GenerateRequest {
    proto::GenerateRequest {
        adapter_id: adapter_id.to_owned(),
        input: Some(input),
        stopping: Some(proto::Stopping {
            max_new_tokens: most,
            ignore_eos: past_eos == PastEos::GoOn,
            ..Default::default()
        }),
        // With ids every token is a message, also one whose text comes with the next.
        output: Some(proto::Output { token_ids: true, ..Default::default() }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn facts() -> proto::GetServerInfoResponse {
        proto::GetServerInfoResponse {
            model: Some(proto::ModelInfo { vocab_size: 100, ..Default::default() }),
            limits: Some(proto::Limits { max_model_len: 64, ..Default::default() }),
            ..Default::default()
        }
    }

    fn random(seed: u64, prompt: &str, output: &str) -> Workload {
        let lengths = Synthetic { prompt_len: prompt.parse().unwrap(), output_len: output.parse().unwrap() };
        let adapters = (0..5).map(|i| Made { id: format!("a{i}"), prefix_len: 20 }).collect();
        Workload::synthetic(lengths, adapters, Popularity::Zipf(1.0), seed, &facts()).unwrap()
    }

    #[test]
    fn a_request_is_a_function_of_seed_phase_and_number() {
        let all = |seed, phase| {
            let workload = random(seed, "uniform:4:9", "uniform:2:6");
            (0..40).rev().map(|i| workload.request(phase, i)).collect::<Vec<_>>()
        };
        assert_eq!(all(1, Phase::Measured), all(1, Phase::Measured));
        assert_ne!(all(1, Phase::Measured), all(2, Phase::Measured));
        assert_ne!(all(1, Phase::Measured), all(1, Phase::WarmUp));
    }

    #[test]
    fn runs_of_a_sweep_differ_in_what_prompts_say_and_in_nothing_else() {
        let of_point = |number| random(1, "uniform:9:20", "uniform:2:6").of_point(number);
        let all = |workload: &Workload, phase| (0..40).map(|i| workload.request(phase, i)).collect::<Vec<_>>();
        let alone = random(1, "uniform:9:20", "uniform:2:6");
        assert_eq!(all(&alone, Phase::Measured), all(&of_point(0), Phase::Measured), "a run by itself is the first");
        let mut said = std::collections::HashSet::new();
        for number in 0..6 {
            let workload = of_point(number);
            for phase in [Phase::WarmUp, Phase::Measured] {
                for (here, there) in all(&workload, phase).into_iter().zip(all(&alone, phase)) {
                    let ids = |planned: &Planned| match &planned.message.input {
                        Some(Input::TokenIds(ids)) => ids.ids.clone(),
                        other => panic!("{other:?}"),
                    };
                    let size = |planned: &Planned| (planned.tenant, ids(planned).len(), planned.wanted);
                    assert_eq!(size(&here), size(&there));
                    assert!(said.insert(ids(&here)), "run {number} says again what was said before");
                }
            }
        }
    }

    #[test]
    fn random_requests_fit_the_server_and_say_what_they_bring() {
        let workload = random(1, "lognormal:40:40", "normal:20:20");
        for i in 0..500 {
            let planned = workload.request(Phase::Measured, i);
            let Some(Input::TokenIds(ids)) = &planned.message.input else { panic!("{planned:?}") };
            let wanted = planned.wanted.unwrap();
            assert!(!ids.ids.is_empty() && wanted >= 1 && 20 + ids.ids.len() + wanted <= 64, "{planned:?}");
            let stopping = planned.message.stopping.unwrap();
            assert!(stopping.ignore_eos && stopping.max_new_tokens == Some(wanted as u32));
        }
    }

    #[test]
    fn without_adapters_requests_are_for_the_bare_base() {
        let lengths = Synthetic { prompt_len: Lengths::Fixed(4), output_len: Lengths::Fixed(4) };
        let workload = Workload::synthetic(lengths, Vec::new(), Popularity::Uniform, 0, &facts()).unwrap();
        assert_eq!(workload.tenants(), ["(bare base)"]);
        assert_eq!(workload.request(Phase::Measured, 3).message.adapter_id, "");
    }

    #[test]
    fn what_is_drawn_has_a_seed_of_its_own() {
        let lengths = Synthetic { prompt_len: Lengths::Fixed(4), output_len: Lengths::Fixed(4) };
        let workload = Workload::synthetic(lengths, Vec::new(), Popularity::Uniform, 0, &facts()).unwrap();
        let plain = workload.request(Phase::Measured, 0);
        assert_eq!(plain.message.sampling, None);
        let wish = proto::Sampling { temperature: Some(0.7), ..Default::default() };
        let workload = workload.sampled(Some(wish));
        let sampling = |index| workload.request(Phase::Measured, index).message.sampling.unwrap();
        assert_eq!(sampling(0).temperature, Some(0.7));
        assert!(sampling(0).seed != sampling(1).seed && sampling(1).seed == sampling(1).seed);
        assert_eq!(workload.request(Phase::Measured, 0).message.input, plain.message.input);
    }

    #[test]
    fn tasks_come_in_order_or_by_popularity() {
        let text = "{\"adapter\":\"a\",\"prompt\":\"x\"}\n{\"prompt\":\"y\",\"max_new_tokens\":3}\n{\"adapter\":\"a\",\"prompt\":\"z\"}";
        let tasks = Tasks::parse(text, None, false).unwrap();
        let prompt = |p: &Planned| match p.message.input.clone().unwrap() {
            Input::Prompt(text) => text,
            other => panic!("{other:?}"),
        };
        let in_order = Workload::of_tasks(tasks.clone(), None, 0).unwrap();
        let prompts: Vec<_> = (0..4).map(|i| prompt(&in_order.request(Phase::Measured, i))).collect();
        assert_eq!(prompts, ["x", "y", "z", "x"]);
        assert_eq!(in_order.request(Phase::Measured, 1).tenant, Tenant(1));
        let first = Workload::of_tasks(tasks, Some(Popularity::Identical), 0).unwrap();
        assert!((0..20).all(|i| first.request(Phase::Measured, i).message.adapter_id == "a"));
    }
}
