//! Steps of serving on a GPU: one upload each, and for decoding a recorded graph of all launches, where a step of that shape comes
//! again. A step of a small model is else bound by what it takes to launch three hundred kernels.
use super::super::batch::{Batch, Forward};
use super::{At, Decoder, Pass, View};
use crate::error::{Error, Result};
use crate::kv::KvPool;
use crate::ops::embed;
use crate::ops::gpu::{Gpu, Recorded};
use crate::ops::prefix_attention::PAGE;
use crate::ops::prefix_attention::device::{self, Launched, Uploads};
use candle_core::Tensor;
use std::collections::HashMap;

/// Graphs that are kept: shapes of steps come and go with the number of requests.
const MOST: usize = 128;

/// What lasts from step to step.
pub struct Steps {
    /// Where steps lie on the device.
    pub uploads: Uploads,
    /// Virtual tokens of a step that has none.
    pub no_soft: Tensor,
    /// `None`: steps are never recorded.
    pub graphs: Option<Graphs>,
}

impl Decoder {
    /// [`Decoder::forward`] on a GPU.
    pub(super) fn forward_on(&self, gpu: &Gpu, steps: &mut Steps, batch: &Batch, kv: &KvPool) -> Result<Forward> {
        let Steps { uploads, no_soft, graphs } = steps;
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
        let there = uploads.put(rows, &step, attentions(), &batch.carried)?;
        let (rows, launched) = (batch.inputs.len(), there.launched());
        let soft = if batch.soft.is_empty() {
            no_soft.clone()
        } else {
            self.machine.rows(&batch.soft, self.config.hidden_size)?
        };
        // What a recorded launch does not look at again.
        embed::device::check(&self.embedding, &there.rows, soft.dim(0)?)?;
        kv.device(0)?.fits(&there.rows)?;
        let decodes = batch.soft.is_empty() && batch.sequences.len() == rows && batch.logit_rows.len() == rows;
        let pass = Pass { at: At::Device(there.rows), view: View::Device { kv, plans: there.plans } };
        let work = || self.run(&batch.inputs, &soft, &batch.logit_rows, &pass);
        let hidden = match graphs {
            Some(graphs) if decodes => graphs.run(gpu, Shape { pool: kv.id(), rows, launched }, work)?,
            _ => work()?,
        };
        Ok(Forward { hidden, carried: Some(there.carried) })
    }
}

/// What the launches of a step depend on. What else differs between steps lies on the device, in the same places.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Shape {
    /// The pool that they write to.
    pool: u64,
    rows: usize,
    /// The rest.
    launched: (usize, Vec<Launched>),
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
    /// Its launches, and where they put what the step gives.
    Recorded(Recorded, Tensor),
    /// It cannot be recorded.
    Never,
}

impl Graphs {
    /// What `work` gives, `[rows, hidden]`, by the graph of its shape if there is one. It is there until the next step. A shape is recorded
    /// when it comes the second time: by then every kernel is loaded.
    fn run(&mut self, gpu: &Gpu, shape: Shape, work: impl Fn() -> Result<Option<Tensor>>) -> Result<Option<Tensor>> {
        self.clock += 1;
        if self.known.len() >= MOST && !self.known.contains_key(&shape) {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.used).map(|(shape, _)| shape.clone());
            oldest.and_then(|shape| self.known.remove(&shape));
        }
        let Some(known) = self.known.get_mut(&shape) else {
            self.known.insert(shape, Known { used: self.clock, state: State::Seen });
            return work();
        };
        known.used = self.clock;
        if let State::Recorded(graph, out) = &mut known.state {
            graph.launch()?;
            return Ok(Some(out.clone()));
        }
        let given = work()?;
        if let (State::Seen, Some(hidden)) = (&known.state, &given) {
            known.state = record(gpu, hidden, &work).unwrap_or_else(|error| {
                tracing::warn!(%error, rows = shape.rows, "a step cannot be recorded: its kernels are launched one by one");
                State::Never
            });
        }
        Ok(given)
    }
}

/// A graph of `work`, which gave `hidden`.
fn record(gpu: &Gpu, hidden: &Tensor, work: &impl Fn() -> Result<Option<Tensor>>) -> Result<State> {
    let out = hidden.zeros_like()?;
    // A first copy loads its kernel, which a recording must not.
    out.slice_set(hidden, 0, 0)?;
    let recorded = gpu.record(|| match work() {
        Ok(Some(hidden)) => out.slice_set(&hidden, 0, 0),
        Ok(None) => candle_core::bail!("the step gave nothing"),
        Err(e) => candle_core::bail!("{e}"),
    })?;
    Ok(recorded.map_or(State::Never, |graph| State::Recorded(graph, out)))
}
