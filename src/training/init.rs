//! The weights of a job before its first step. Random draws come from the job's seed alone.
use super::head::TrainedHead;
use super::prompt_encoder::{EncoderKind, PromptEncoder};
use super::settings::{Init, Reparametrisation, Settings, TrainMethod};
use crate::error::{Error, Result};
use crate::model::{Model, ModelInfo};
use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

/// Rows drawn from the vocabulary to learn how large an embedding is.
const SAMPLE: usize = 512;

/// The prompt encoder that `settings` ask for. `text`: tokens of [`Init::Text`], repeated until there are enough.
///
/// # Errors
/// `InvalidArgument` where the text has no token.
pub fn encoder(model: &Model, settings: &Settings, seed: u64, text: &[u32]) -> Result<PromptEncoder> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (info, n) = (model.info(), settings.num_virtual_tokens);
    let (hidden, keys) = (info.hidden_size, info.num_kv_heads * info.head_dim);
    let stored = 2 * info.num_layers * keys;
    let tokens = match settings.init {
        Init::Random => None,
        Init::SampledVocabulary => Some((0..n).map(|_| rng.random_range(0..info.vocab_size as u32)).collect()),
        Init::Text if text.is_empty() => return Err(Error::invalid("settings.init_text", "empty", "has no token")),
        Init::Text => Some(text.iter().copied().cycle().take(n).collect::<Vec<u32>>()),
    };
    let mut weights = BTreeMap::new();
    let width = |own: usize| if settings.encoder_hidden_size == 0 { own } else { settings.encoder_hidden_size };
    let mut put = |name: &str, t: Tensor| drop(weights.insert(name.to_owned(), t));
    let kind = match (settings.method, settings.reparametrisation) {
        (TrainMethod::PrefixTuning, Reparametrisation::Projection) => {
            let h = width(keys);
            put("embedding.weight", normal(&mut rng, &[n, keys], 1.0)?);
            layer(&mut rng, &mut put, "transform.0", keys, h)?;
            layer(&mut rng, &mut put, "transform.2", h, stored)?;
            EncoderKind::Projection
        }
        (TrainMethod::PrefixTuning, _) => {
            let rows = match &tokens {
                Some(tokens) => model.kv_of(tokens)?,
                None => normal(&mut rng, &[n, stored], 0.02)?,
            };
            put("embedding.weight", rows);
            EncoderKind::Embedding
        }
        (TrainMethod::PTuning, Reparametrisation::Lstm) => {
            let (h, layers) = (width(hidden), settings.encoder_num_layers);
            put("embedding.weight", embeddings(model, &mut rng, &tokens, n)?);
            lstm(&mut rng, &mut put, layers, hidden, h)?;
            layer(&mut rng, &mut put, "mlp_head.0", 2 * h, 2 * h)?;
            layer(&mut rng, &mut put, "mlp_head.2", 2 * h, hidden)?;
            EncoderKind::Lstm
        }
        (TrainMethod::PTuning, _) => {
            let h = width(hidden);
            put("embedding.weight", embeddings(model, &mut rng, &tokens, n)?);
            layer(&mut rng, &mut put, "mlp_head.0", hidden, h)?;
            layer(&mut rng, &mut put, "mlp_head.2", h, h)?;
            layer(&mut rng, &mut put, "mlp_head.4", h, hidden)?;
            EncoderKind::Mlp
        }
        (TrainMethod::PromptTuning, _) => {
            put("embedding.weight", embeddings(model, &mut rng, &tokens, n)?);
            EncoderKind::Embedding
        }
        (TrainMethod::MultitaskPromptTuning, _) => {
            let (tasks, rank) = (settings.num_tasks.max(1), settings.num_ranks);
            put("embedding.weight", embeddings(model, &mut rng, &tokens, n)?);
            // cols @ rows is about 1: every task starts as the shared prompt.
            let about = |rng: &mut StdRng, shape: &[usize], mean: f64| -> Result<Tensor> {
                Ok((normal(rng, shape, 0.02)? + mean)?)
            };
            put("prefix_task_cols", about(&mut rng, &[tasks, n, rank], 1.0)?);
            put("prefix_task_rows", about(&mut rng, &[tasks, rank, hidden], 1.0 / rank as f64)?);
            EncoderKind::Multitask
        }
    };
    PromptEncoder::new(kind, weights)
}

/// How many numbers the weights of [`encoder`] and of a [`head`] of `labels` classes are.
pub fn size(info: &ModelInfo, settings: &Settings, labels: usize) -> usize {
    let (n, hidden, keys) = (settings.num_virtual_tokens, info.hidden_size, info.num_kv_heads * info.head_dim);
    let stored = 2 * info.num_layers * keys;
    let width = |own: usize| if settings.encoder_hidden_size == 0 { own } else { settings.encoder_hidden_size };
    let dense = |from: usize, to: usize| (from + 1).saturating_mul(to);
    let parts = match (settings.method, settings.reparametrisation) {
        (TrainMethod::PrefixTuning, Reparametrisation::Projection) => {
            vec![n * keys, dense(keys, width(keys)), dense(width(keys), stored)]
        }
        (TrainMethod::PrefixTuning, _) => vec![n * stored],
        (TrainMethod::PTuning, Reparametrisation::Lstm) => {
            let h = width(hidden);
            let layer = |i: usize| 2 * (dense(if i == 0 { hidden } else { 2 * h }, 4 * h) + dense(h, 4 * h));
            let layers = (0..settings.encoder_num_layers).map(layer).fold(0, usize::saturating_add);
            vec![n * hidden, layers, dense(2 * h, 2 * h), dense(2 * h, hidden)]
        }
        (TrainMethod::PTuning, _) => {
            let h = width(hidden);
            vec![n * hidden, dense(hidden, h), dense(h, h), dense(h, hidden)]
        }
        (TrainMethod::PromptTuning, _) => vec![n * hidden],
        (TrainMethod::MultitaskPromptTuning, _) => {
            vec![n * hidden, (settings.num_tasks.max(1) * settings.num_ranks).saturating_mul(n + hidden)]
        }
    };
    let head = match labels {
        0 => 0,
        labels => dense(hidden, labels).saturating_add(dense(hidden, hidden) * (info.head_modules.len() - 1)),
    };
    parts.into_iter().fold(head, usize::saturating_add)
}

/// A head of `labels` classes, as transformers starts one: normal, standard deviation 0.02, no bias.
pub fn head(model: &Model, labels: usize, seed: u64) -> Result<TrainedHead> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x6865_6164);
    let (info, hidden) = (model.info(), model.info().hidden_size);
    let names = info.head_modules;
    let layers = names.iter().enumerate().map(|(i, name)| {
        let rows = if i + 1 == names.len() { labels } else { hidden };
        let weight = normal(&mut rng, &[rows, hidden], 0.02)?;
        // A decoder's `score` has none.
        let bias = info.encoder.then(|| Tensor::zeros(rows, candle_core::DType::F32, &Device::Cpu)).transpose()?;
        Ok(((*name).to_owned(), weight, bias))
    });
    TrainedHead::new(layers.collect::<Result<_>>()?)
}

/// Virtual tokens `[n, hidden]`: those of tokens, or of random rows as large as the table's.
fn embeddings(model: &Model, rng: &mut StdRng, tokens: &Option<Vec<u32>>, n: usize) -> Result<Tensor> {
    let (vocab, hidden) = (model.info().vocab_size, model.info().hidden_size);
    if let Some(tokens) = tokens {
        return model.token_rows(tokens);
    }
    let sample: Vec<u32> = (0..SAMPLE).map(|_| rng.random_range(0..vocab as u32)).collect();
    let size = model.token_rows(&sample)?.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
    normal(rng, &[n, hidden], f64::from(size))
}

/// A dense layer as torch starts one: weights and bias uniform within 1 / sqrt(inputs).
fn layer(rng: &mut StdRng, put: &mut impl FnMut(&str, Tensor), name: &str, from: usize, to: usize) -> Result<()> {
    let bound = 1.0 / (from as f64).sqrt();
    put(&format!("{name}.weight"), uniform(rng, &[to, from], bound)?);
    put(&format!("{name}.bias"), uniform(rng, &[to], bound)?);
    Ok(())
}

/// A bidirectional LSTM as torch starts one.
fn lstm(rng: &mut StdRng, put: &mut impl FnMut(&str, Tensor), layers: usize, from: usize, h: usize) -> Result<()> {
    let bound = 1.0 / (h as f64).sqrt();
    for index in 0..layers {
        let inputs = if index == 0 { from } else { 2 * h };
        for side in ["", "_reverse"] {
            put(&format!("lstm_head.weight_ih_l{index}{side}"), uniform(rng, &[4 * h, inputs], bound)?);
            put(&format!("lstm_head.weight_hh_l{index}{side}"), uniform(rng, &[4 * h, h], bound)?);
            put(&format!("lstm_head.bias_ih_l{index}{side}"), uniform(rng, &[4 * h], bound)?);
            put(&format!("lstm_head.bias_hh_l{index}{side}"), uniform(rng, &[4 * h], bound)?);
        }
    }
    Ok(())
}

fn uniform(rng: &mut StdRng, shape: &[usize], bound: f64) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-bound..bound) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Box and Muller's method.
fn normal(rng: &mut StdRng, shape: &[usize], deviation: f64) -> Result<Tensor> {
    let draw = |_| {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
