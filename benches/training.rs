//! A training step on the shape of Qwen2-0.5B with random weights, in one run beside candle's own autograd; and eight jobs in
//! one batch beside the same eight in turn.
//!
//! `cargo bench --bench training -- [f32|bf16|candle|jobs]... [--tries N]`. Times depend on the machine: read the ratios. PEFT is
//! beside it in `benches/peers/training_step.py`.
#![allow(clippy::unwrap_used, missing_docs)]
mod shape;

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use prefixd::adapter::InputRow;
use prefixd::config::DtypeChoice;
use prefixd::model::packed::Activations;
use prefixd::model::{LoadOptions, Model};
use prefixd::training::{AdamWConfig, EncoderKind, Example, Goal, Job, Placement, PromptEncoder, Step, Work};
use shape::{HALF_B, Shape, median};
use std::collections::BTreeMap;

const BATCH: usize = 4;
const TOKENS: usize = 128;
const VIRTUAL: usize = 32;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let tries = given.iter().position(|a| a == "--tries").and_then(|i| given.get(i + 1)?.parse().ok()).unwrap_or(5);
    let all = !given.iter().any(|g| ["f32", "bf16", "candle", "jobs"].contains(&g.as_str()));
    let asked = |what: &str| all || given.iter().any(|g| g == what);
    let mut kept_f32 = None;
    // As the server does.
    prefixd::ops::pool::quiet_candle();
    for (name, dtype) in [("f32", DtypeChoice::F32), ("bf16", DtypeChoice::Bf16)] {
        let needed = asked(name) || asked(if name == "f32" { "candle" } else { "jobs" });
        if !needed {
            continue;
        }
        let model = Model::load(&HALF_B.files(), LoadOptions { dtype, ..LoadOptions::default() }).unwrap();
        prefixd::ops::memory::hold();
        let alone = asked(name) || name == "f32" && asked("candle");
        for placement in [Placement::Stored, Placement::VirtualTokens].into_iter().filter(|_| alone) {
            let mut job = job(&model, placement);
            let examples: Vec<_> = (0..BATCH).map(|s| example(s, TOKENS)).collect();
            let mut of = |keep| median(tries, || step(&model, &mut [&mut job], &[&examples], keep));
            let kept = of(Activations::Keep(usize::MAX));
            let again = of(Activations::Keep(0));
            let rate = (BATCH * TOKENS) as f64 / kept;
            println!(
                "{name} {placement:?} {BATCH} x {TOKENS}: {:.3} s a step ({rate:.0} tokens/s), recomputed {:.3} s ({:.2})",
                kept,
                again,
                again / kept
            );
            if placement == Placement::VirtualTokens && name == "f32" {
                kept_f32 = Some(kept);
            }
        }
        if name == "bf16" && asked("jobs") {
            for (sequences, tokens) in [(1, 8), (1, 16), (2, 8), (2, 16), (2, 32), (2, 128)] {
                together(&model, sequences, tokens, tries);
            }
        }
    }
    if asked("candle") {
        let stock = Stock::new(HALF_B).unwrap();
        let time = median(tries.min(3), || stock.step(BATCH, TOKENS).unwrap());
        println!(
            "candle's autograd, f32, virtual tokens: {time:.3} s a step; prefixd's is {:.3} of it",
            kept_f32.unwrap() / time
        );
    }
}

/// Eight jobs of so many sequences of so many tokens, in one batch and one after the other.
fn together(model: &Model, sequences: usize, tokens: usize, tries: usize) {
    let mut jobs: Vec<Job> = (0..8).map(|_| job(model, Placement::Stored)).collect();
    let of = |job: usize| (0..sequences).map(|s| example(sequences * job + s, tokens)).collect();
    let data: Vec<Vec<Example>> = (0..8).map(of).collect();
    let data: Vec<&[Example]> = data.iter().map(Vec::as_slice).collect();
    let keep = Activations::Keep(usize::MAX);
    let at_once = median(tries, || step(model, &mut jobs.iter_mut().collect::<Vec<_>>(), &data, keep));
    let in_turn = median(tries, || {
        for (job, data) in jobs.iter_mut().zip(&data) {
            step(model, &mut [job], &[data], keep);
        }
    });
    println!(
        "8 jobs of {sequences} x {tokens}: {at_once:.3} s at once, {in_turn:.3} s in turn, {:.2} times as fast",
        in_turn / at_once
    );
}

fn job(model: &Model, placement: Placement) -> Job {
    let info = model.info();
    let width = match placement {
        Placement::Stored => 2 * info.num_layers * info.num_kv_heads * info.head_dim,
        _ => info.hidden_size,
    };
    let rows = Tensor::randn(0f32, 0.02, (VIRTUAL, width), &Device::Cpu).unwrap();
    let weights = BTreeMap::from([("embedding.weight".to_owned(), rows)]);
    let encoder = PromptEncoder::new(EncoderKind::Embedding, weights).unwrap();
    Job::new(encoder, placement, AdamWConfig::default()).unwrap()
}

fn example(seed: usize, tokens: usize) -> Example {
    let ids: Vec<u32> = (0..tokens).map(|i| ((seed * 7919 + i * 104_729) % 150_000) as u32).collect();
    let rows = ids.iter().map(|id| InputRow::Token(*id)).collect();
    Example { task: 0, rows, goal: Goal::Tokens(ids.into_iter().map(Some).collect()) }
}

fn step<E: AsRef<[Example]>>(model: &Model, jobs: &mut [&mut Job], data: &[E], keep: Activations) {
    let work: Vec<Work<'_>> = jobs
        .iter()
        .zip(data)
        .map(|(job, data)| {
            let examples: Vec<&Example> = data.as_ref().iter().collect();
            let divisor = examples.iter().map(|e| job.targets(e)).sum();
            Work { job, examples, divisor, train: true }
        })
        .collect();
    let mut step = Step::new(model, &work, keep).unwrap();
    while step.advance(model).unwrap() {}
    for (job, outcome) in jobs.iter_mut().zip(step.finish().unwrap()) {
        job.update(&outcome.gradients.unwrap(), 1e-3).unwrap();
    }
}

/// The same decoder out of candle's differentiable ops, with frozen f32 tensors as weights.
struct Stock {
    shape: Shape,
    table: Tensor,
    layers: Vec<Vec<Tensor>>,
    prompt: Var,
}

impl Stock {
    fn new(shape: Shape) -> Result<Self> {
        let random = |n: usize, k: usize| Tensor::randn(0f32, 0.02, (n, k), &Device::Cpu);
        let (hidden, inner, kv) = (shape.hidden, shape.inner, shape.kv_heads * shape.head_dim());
        let sizes = [
            (hidden, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, hidden),
            (inner, hidden),
            (inner, hidden),
            (hidden, inner),
        ];
        let layer = || sizes.iter().map(|(n, k)| random(*n, *k)).collect::<Result<Vec<_>>>();
        Ok(Stock {
            shape,
            table: random(shape.vocab, hidden)?,
            layers: (0..shape.layers).map(|_| layer()).collect::<Result<_>>()?,
            prompt: Var::from_tensor(&random(VIRTUAL, hidden)?)?,
        })
    }

    /// Forward, loss over all tokens, backward to the virtual tokens.
    fn step(&self, batch: usize, tokens: usize) -> Result<()> {
        let Shape { hidden, heads, kv_heads, vocab, .. } = self.shape;
        let (dim, length) = (self.shape.head_dim(), tokens + VIRTUAL);
        let ids: Vec<u32> = (0..batch * tokens).map(|i| (i * 104_729 % 150_000) as u32).collect();
        let ids = Tensor::from_vec(ids, (batch, tokens), &Device::Cpu)?;
        let text = self.table.index_select(&ids.flatten_all()?, 0)?.reshape((batch, tokens, hidden))?;
        let prompt = self.prompt.unsqueeze(0)?.broadcast_as((batch, VIRTUAL, hidden))?;
        let mut x = Tensor::cat(&[&prompt.contiguous()?, &text], 1)?.reshape((batch * length, hidden))?;
        let mask: Vec<f32> =
            (0..length * length).map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, 1, length, length), &Device::Cpu)?;
        let angles: Vec<f32> = (0..length * dim / 2)
            .map(|i| (i / (dim / 2)) as f32 * 1e6f32.powf(-2.0 * (i % (dim / 2)) as f32 / dim as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (length, dim / 2), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let norm = |x: &Tensor| x.broadcast_div(&(x.sqr()?.mean_keepdim(1)? + 1e-6)?.sqrt()?);
        let split = |x: Tensor, heads: usize| x.reshape((batch, length, heads, dim))?.transpose(1, 2)?.contiguous();
        for w in &self.layers {
            let h = norm(&x)?;
            let q = candle_nn::rotary_emb::rope_slow(&split(h.matmul(&w[0].t()?)?, heads)?, &cos, &sin)?;
            let k = candle_nn::rotary_emb::rope_slow(&split(h.matmul(&w[1].t()?)?, kv_heads)?, &cos, &sin)?;
            let v = split(h.matmul(&w[2].t()?)?, kv_heads)?;
            let spread = |t: Tensor| {
                let shape = (batch, kv_heads, heads / kv_heads, length, dim);
                t.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?.reshape((batch, heads, length, dim))
            };
            let scores = (q.matmul(&spread(k)?.t()?)? / (dim as f64).sqrt())?.broadcast_add(&mask)?;
            let attended = candle_nn::ops::softmax(&scores, 3)?.matmul(&spread(v)?)?;
            let attended = attended.transpose(1, 2)?.contiguous()?.reshape((batch * length, hidden))?;
            x = (x + attended.matmul(&w[3].t()?)?)?;
            let h = norm(&x)?;
            let up = (h.matmul(&w[4].t()?)?.silu()? * h.matmul(&w[5].t()?)?)?;
            x = (x + up.matmul(&w[6].t()?)?)?;
        }
        let last = norm(&x)?.reshape((batch, length, hidden))?.i((.., VIRTUAL - 1..length - 1, ..))?.contiguous()?;
        let logits = last.reshape((batch * tokens, hidden))?.matmul(&self.table.t()?)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &ids.flatten_all()?)?;
        let gradients = loss.backward()?;
        assert_eq!(logits.dims(), [batch * tokens, vocab]);
        assert_eq!(gradients.get(&self.prompt).unwrap().dtype(), DType::F32);
        Ok(())
    }
}
