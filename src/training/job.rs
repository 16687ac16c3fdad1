//! One adapter in training: its weights, where its rows stand, its optimiser.
use super::head::TrainedHead;
use super::optimizer::{AdamW, AdamWConfig};
use super::prompt_encoder::PromptEncoder;
use super::step::{Example, Goal};
use crate::error::{Context, Error, Kind, Result};
use candle_core::{Device, Tensor, Var};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::BTreeMap;

/// What the encoder's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Virtual tokens that the model runs in front of every sequence: `[n, hidden]`.
    VirtualTokens,
    /// Virtual tokens among a sequence's own rows: an encoder's, or where a template places them.
    AmongRows,
    /// K and V of every layer, used as stored: `[n, 2 * layers * kv_heads * head_dim]`.
    Stored,
}

/// One adapter in training.
pub struct Job {
    /// What is trained.
    pub encoder: PromptEncoder,
    /// What is trained beside it, to classify.
    pub head: Option<TrainedHead>,
    /// What the encoder's rows are.
    pub placement: Placement,
    /// Text before the virtual tokens.
    pub before: Vec<u32>,
    /// Text after them that all sequences share. After stored rows it belongs to the sequences.
    pub after: Vec<u32>,
    optimizer: AdamW,
}

impl Job {
    /// A job at its start, without head or text.
    pub fn new(encoder: PromptEncoder, placement: Placement, config: AdamWConfig) -> Result<Self> {
        Self::with_head(encoder, None, placement, config)
    }

    /// The same with a head.
    pub fn with_head(
        encoder: PromptEncoder,
        head: Option<TrainedHead>,
        placement: Placement,
        config: AdamWConfig,
    ) -> Result<Self> {
        let vars: Vec<Var> = weights(&encoder, &head).map(|(_, var)| var.clone()).collect();
        let optimizer = AdamW::new(vars.iter(), config)?;
        Ok(Job { encoder, head, placement, before: Vec::new(), after: Vec::new(), optimizer })
    }

    /// All trainable weights: the encoder's, then the head's, always in the same order.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Var)> {
        weights(&self.encoder, &self.head)
    }

    /// Things to be predicted in `example`: tokens, or one class. Its first row is predicted only where rows of the
    /// prefix run before it; stored rows predict nothing.
    pub fn targets(&self, example: &Example) -> usize {
        let runs = match self.placement {
            Placement::Stored => false,
            Placement::VirtualTokens => true,
            Placement::AmongRows => !(self.before.is_empty() && self.after.is_empty()),
        };
        match &example.goal {
            Goal::Tokens(labels) => labels.iter().skip(usize::from(!runs)).flatten().count(),
            Goal::Class(_) => 1,
        }
    }

    /// One step of the optimiser. Returns the gradients' norm before clipping.
    pub fn update(&mut self, gradients: &[Tensor], learning_rate: f64) -> Result<f64> {
        let vars = weights(&self.encoder, &self.head).map(|(_, var)| var);
        let pairs: Vec<(&Var, &Tensor)> = vars.zip(gradients).collect();
        self.optimizer.step(&pairs, learning_rate)
    }

    /// The values of all weights, not to change with them.
    pub fn values(&self) -> Result<Vec<Tensor>> {
        self.weights().map(|(_, var)| Ok(var.as_tensor().copy()?)).collect()
    }

    /// Sets all weights to what [`Job::values`] gave.
    pub fn set_values(&self, values: &[Tensor]) -> Result<()> {
        self.weights().zip(values).try_for_each(|((_, var), value)| Ok(var.set(value)?))
    }

    /// Everything that a later run needs to go on with the same bits: weights, moments, and other values `kept` under
    /// their names, as safetensors.
    pub fn save(&self, kept: &BTreeMap<String, Vec<Tensor>>) -> Result<Vec<u8>> {
        let (moments, steps) = self.optimizer.state();
        let mut bytes: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        let mut put = |name: String, t: &Tensor| -> Result<()> {
            let values = t.flatten_all()?.to_vec1::<f32>()?;
            bytes.insert(name, (t.dims().to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
            Ok(())
        };
        for (i, ((name, var), (mean, square))) in self.weights().zip(moments).enumerate() {
            put(format!("weight.{name}"), var)?;
            put(format!("mean.{name}"), mean)?;
            put(format!("square.{name}"), square)?;
            for (which, values) in kept {
                put(format!("kept.{which}.{name}"), &values[i])?;
            }
        }
        bytes.insert("steps".into(), (vec![1], (steps as f32).to_le_bytes().to_vec()));
        let views = bytes.iter().map(|(name, (shape, bytes))| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).or_kind(Kind::Internal, name);
            view.map(|view| (name.as_str(), view))
        });
        safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).or_kind(Kind::Internal, "checkpoint")
    }

    /// Goes on from [`Job::save`]; returns the values kept under `names` that are there.
    ///
    /// # Errors
    /// `Internal` where the bytes are not a checkpoint of these weights.
    pub fn load(&mut self, bytes: &[u8], names: &[&str]) -> Result<BTreeMap<String, Vec<Tensor>>> {
        let all = SafeTensors::deserialize(bytes).or_kind(Kind::Internal, "checkpoint")?;
        let read = |name: &str, like: &[usize]| -> Result<Tensor> {
            let view = all.tensor(name).or_kind(Kind::Internal, "checkpoint")?;
            if view.shape() != like || view.dtype() != Dtype::F32 {
                return Err(Error::internal(format!("checkpoint: {name} is {:?}, not {like:?}", view.shape())));
            }
            let (values, _) = view.data().as_chunks::<4>();
            let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
            Ok(Tensor::from_vec(values, like, &Device::Cpu)?)
        };
        let (mut moments, mut kept) = (Vec::new(), BTreeMap::<String, Vec<Tensor>>::new());
        for (name, var) in weights(&self.encoder, &self.head) {
            var.set(&read(&format!("weight.{name}"), var.dims())?)?;
            moments.push((read(&format!("mean.{name}"), var.dims())?, read(&format!("square.{name}"), var.dims())?));
            for which in names {
                let key = format!("kept.{which}.{name}");
                if all.tensor(&key).is_ok() {
                    kept.entry((*which).to_owned()).or_default().push(read(&key, var.dims())?);
                }
            }
        }
        let steps = read("steps", &[1])?.to_vec1::<f32>()?[0];
        self.optimizer.resume(moments, steps as i32);
        Ok(kept)
    }
}

fn weights<'a>(encoder: &'a PromptEncoder, head: &'a Option<TrainedHead>) -> impl Iterator<Item = (&'a str, &'a Var)> {
    encoder.weights().chain(head.iter().flat_map(TrainedHead::weights))
}
