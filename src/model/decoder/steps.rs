//! Steps of serving on a GPU: one upload each, and for decoding a recorded graph of all launches up to the chosen tokens, where a step of that
//! shape comes again. A step of a small model is else bound by what it takes to launch three hundred kernels.
use super::super::batch::{Batch, Forward};
use super::{At, Decoder, Pass, View};
use crate::error::{Error, Result};
use crate::kv::KvPool;
use crate::ops::embed;
use crate::ops::gpu::{Carried, Gpu, Recorded, Words};
use crate::ops::prefix_attention::PAGE;
use crate::ops::prefix_attention::device::{self, Launched, Uploads};
use crate::ops::sample::device::{Layout, Plan, Sampling};
use candle_core::Tensor;
use std::collections::HashMap;
use std::ops::Range;

/// Graphs that are kept: shapes of steps come and go with the number of requests.
const MOST: usize = 128;

/// What lasts from step to step.
pub struct Steps {
    /// Where steps lie on the device.
    pub uploads: Uploads,
    /// Virtual tokens of a step that has none.
    pub no_soft: Tensor,
    /// What chooses their tokens.
    pub sampling: Sampling,
    /// `None`: steps are never recorded.
    pub graphs: Option<Graphs>,
}

impl Decoder {
    /// [`Decoder::forward`] on a GPU.
    pub(super) fn forward_on(&self, gpu: &Gpu, steps: &mut Steps, batch: &Batch, kv: &KvPool) -> Result<Forward> {
        let Steps { uploads, no_soft, sampling, graphs } = steps;
        let table: Vec<u32> = batch.pages.iter().map(|page| page * PAGE as u32).collect();
        let attentions = || self.config.layers.iter().map(|facts| facts.attention);
        let first = attentions().next().ok_or_else(|| Error::internal("a model without layers"))?;
        let step = device::Step {
            sequences: &batch.sequences,
            table: &table,
            slots: kv.pages() * PAGE,
            layout: self.kv_layout(),
            heads: self.config.num_heads,
            attention: first,
        };
        let rows = (&*batch.inputs, &*batch.positions, &*batch.slots);
        let mut words = Words::default();
        let plan = sampling.plan(&batch.choose, &mut words)?;
        let there = uploads.put(rows, &step, attentions(), &words)?;
        let (rows, launched) = (batch.inputs.len(), there.launched());
        let soft = if batch.soft.is_empty() {
            no_soft.clone()
        } else {
            self.machine.rows(&batch.soft, self.config.hidden_size)?
        };
        // What a recorded launch does not look at again.
        embed::device::check(&self.embedding, &there.rows, soft.dim(0)?)?;
        kv.device(0)?.fits(&there.rows)?;
        let pass = Pass { at: At::Device(there.rows), view: View::Device { kv, plans: there.plans } };
        let work = || {
            let hidden = self.run(&batch.inputs, &soft, &batch.logit_rows, &pass)?;
            self.choose(hidden.as_ref(), sampling, &plan, &there.carried)?;
            Ok(hidden)
        };
        let chosen_from: usize = plan.blocks().map(Range::len).sum();
        let each = [batch.sequences.len(), batch.logit_rows.len(), chosen_from] == [rows; 3];
        let decodes = batch.soft.is_empty() && each;
        let hidden = match graphs {
            Some(graphs) if decodes => {
                graphs.run(gpu, Shape { pool: kv.id(), rows, launched, chosen: plan.layout().clone() }, || {
                    work().map(drop)
                })?;
                None
            }
            _ => work()?,
        };
        Ok(Forward { hidden, chosen: Some(sampling.read(plan)?) })
    }

    /// Chooses what is planned from the hidden rows whose logits are wanted. Logits of a block are gone before those of the next are there.
    fn choose(&self, hidden: Option<&Tensor>, sampling: &Sampling, plan: &Plan, carried: &Carried) -> Result<()> {
        for (block, rows) in plan.blocks().enumerate() {
            let hidden = hidden.ok_or_else(|| Error::internal("tokens to choose, and no rows to choose them from"))?;
            let logits = self.logits(&hidden.narrow(0, rows.start, rows.len())?)?;
            sampling.choose(plan, block, &logits, carried)?;
        }
        Ok(sampling.end(plan)?)
    }
}

/// What the launches of a step depend on. What else differs between steps lies on the device, in the same places.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Shape {
    /// The pool that they write to.
    pool: u64,
    rows: usize,
    /// The rest of the pass.
    launched: (usize, Vec<Launched>),
    /// What follows it.
    chosen: Layout,
}

/// Recorded steps.
#[derive(Default)]
pub struct Graphs {
    known: HashMap<Shape, Known>,
    /// Steps so far.
    clock: u64,
}

struct Known {
    used: u64,
    state: State,
}

enum State {
    /// It came once.
    Seen,
    /// Its launches.
    Recorded(Recorded),
    /// It cannot be recorded.
    Never,
}

impl Graphs {
    /// Does `work`, by the graph of its shape if there is one. A shape is recorded when it comes the second time: by then every kernel is
    /// loaded.
    fn run(&mut self, gpu: &Gpu, shape: Shape, work: impl Fn() -> Result<()>) -> Result<()> {
        self.clock += 1;
        if self.known.len() >= MOST && !self.known.contains_key(&shape) {
            let worth = |known: &Known| (matches!(known.state, State::Recorded(_)), known.used);
            let oldest = self.known.iter().min_by_key(|(_, known)| worth(known)).map(|(shape, _)| shape.clone());
            oldest.and_then(|shape| self.known.remove(&shape));
        }
        let Some(known) = self.known.get_mut(&shape) else {
            self.known.insert(shape, Known { used: self.clock, state: State::Seen });
            return work();
        };
        known.used = self.clock;
        if let State::Recorded(graph) = &mut known.state {
            return Ok(graph.launch()?);
        }
        work()?;
        if let State::Seen = known.state {
            // A recording does nothing: this step is done.
            let recorded = gpu.record(|| work().or_else(|e| candle_core::bail!("{e}")));
            known.state = recorded.map(|graph| graph.map_or(State::Never, State::Recorded)).unwrap_or_else(|error| {
                tracing::warn!(%error, rows = shape.rows, "a step cannot be recorded: its kernels are launched one by one");
                State::Never
            });
        }
        Ok(())
    }
}
