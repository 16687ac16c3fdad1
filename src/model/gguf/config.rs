//! The `config.json` that the metadata stands for, so that there is one way from numbers to a model.
use super::value::Value;
use super::{Architecture, Gguf, broken, decode};
use crate::error::{Error, Result};
use crate::model::config::{Family, NormKind, Positions};
use candle_core::DType;
use serde_json::{Map, Value as Json, json};

/// Keys that change what a model computes, in ways that none of the served families does, and the values that change nothing.
const NEUTRAL: &[(&str, &[f64])] = &[
    ("expert_count", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("attention.output_scale", &[0.0, 1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("rope.scaling.alpha", &[0.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ("rope.scaling.yarn_ext_factor", &[-1.0, 1.0]),
    ("rope.scaling.yarn_attn_factor", &[1.0]),
];

/// What each frequency is divided by.
const FREQUENCIES: &str = "rope_freqs.weight";

/// The `config.json` of a file.
///
/// # Errors
/// `InvalidArgument` for a key that is missing or no number, `FailedPrecondition` for a model that is not served.
pub fn config(gguf: &Gguf<'_>) -> Result<Json> {
    let architecture = Architecture::of(gguf)?;
    let keys = Keys { gguf, architecture: architecture.name };
    keys.refuse()?;
    let window = keys.size("attention.sliding_window")?.filter(|w| *w > 0);
    let family = architecture.family(window.is_some())?;
    let mut out = Map::new();
    let mut put = |key: &str, value: Json| drop(out.insert(key.to_owned(), value));
    put("architectures", json!([family.architectures[0]]));

    let names = family.keys;
    let hidden = keys.needed("embedding_length", 1 << 16)?;
    let heads = keys.needed("attention.head_count", 1 << 10)?;
    let layers = keys.needed("block_count", 1 << 10)?;
    let positions = keys.needed("context_length", 1 << 24)?;
    put(names.hidden, json!(hidden));
    put(names.heads, json!(heads));
    put(names.layers, json!(layers));
    put(names.positions, json!(positions));
    put(names.intermediate, json!(keys.needed("feed_forward_length", 1 << 18)?));
    put("num_key_value_heads", json!(keys.size("attention.head_count_kv")?.unwrap_or(heads)));
    let epsilon = match family.norm {
        NormKind::Layer => "attention.layer_norm_epsilon",
        NormKind::Rms | NormKind::RmsPlusOne => "attention.layer_norm_rms_epsilon",
    };
    put(names.norm_eps, json!(keys.number(epsilon)?.ok_or_else(|| keys.missing(epsilon))?));

    let head_dim = keys.size("attention.key_length")?.unwrap_or(hidden / heads);
    if let Some(v) = keys.size("attention.value_length")?.filter(|v| *v != head_dim) {
        let rule = format!("keys have {head_dim}; one width of both is served");
        return Err(Error::precondition(format!("`{}` is {v}, {rule}", keys.full("attention.value_length"))));
    }
    put("head_dim", json!(head_dim));

    let table = gguf.tensor("token_embd.weight");
    let rows = table.and_then(|t| t.shape.first().copied());
    put("vocab_size", json!(rows.ok_or_else(|| Error::precondition("the file has no tensor token_embd.weight"))?));
    put("tie_word_embeddings", json!(gguf.tensor("output.weight").is_none()));
    put("attention_bias", json!(gguf.tensor("blk.0.attn_q.bias").is_some()));
    put("mlp_bias", json!(gguf.tensor("blk.0.ffn_up.bias").is_some()));

    for (key, value) in windows(&keys, family, window, layers, positions)? {
        put(key, value);
    }
    for (key, value) in attention(&keys, family, hidden, heads, layers)? {
        put(key, value);
    }
    for (key, value) in rope(&keys, family, head_dim)? {
        put(key, value);
    }
    Ok(Json::Object(out))
}

type Entries = Vec<(&'static str, Json)>;

fn windows(keys: &Keys<'_>, family: &Family, window: Option<u64>, layers: u64, positions: u64) -> Result<Entries> {
    let name = "attention.sliding_window";
    let pattern = keys.pattern("attention.sliding_window_pattern")?;
    match family.name {
        "mistral" | "phi3" => Ok(window.map(|w| ("sliding_window", json!(w))).into_iter().collect()),
        "gemma2" | "gemma3_text" => {
            // The first files of Gemma 2 do not say it.
            let window = window.or((family.name == "gemma2").then_some(4096)).ok_or_else(|| keys.missing(name))?;
            let mut entries = vec![("sliding_window", json!(window))];
            match pattern {
                Some(Pattern::Every(n)) => entries.push(("sliding_window_pattern", json!(n))),
                Some(Pattern::Listed(slides)) => {
                    let kind = |s: &bool| if *s { "sliding_attention" } else { "full_attention" };
                    // A pattern may be longer than the model, never shorter.
                    let kinds: Vec<_> = slides.iter().take(layers as usize).map(kind).collect();
                    entries.push(("layer_types", json!(kinds)));
                }
                None => {}
            }
            Ok(entries)
        }
        // A window that is never reached changes nothing.
        _ => match window.filter(|w| *w < positions) {
            Some(w) => Err(Error::precondition(format!(
                "`{}` is {w}: windows of the architecture {} are not served from GGUF",
                keys.full(name),
                keys.architecture
            ))),
            None => Ok(Vec::new()),
        },
    }
}

/// Scale of the scores, and soft caps.
fn attention(keys: &Keys<'_>, family: &Family, hidden: u64, heads: u64, layers: u64) -> Result<Entries> {
    let mut entries = Vec::new();
    let key = "attention.scale";
    match keys.number(key)? {
        Some(scale) if scale > 0.0 => entries.push(("query_pre_attn_scalar", json!(scale.powi(-2)))),
        Some(scale) if scale < 0.0 => return Err(keys.wrong(key, "must not be below 0")),
        // The 27 billion parameters of Gemma 2 and 3 scale by another width than that of a head. No key says it, their
        // number of layers does.
        _ if matches!((family.name, layers), ("gemma2", 46) | ("gemma3_text", 62)) => {
            entries.push(("query_pre_attn_scalar", json!(hidden as f64 / heads as f64)));
        }
        _ => {}
    }
    // The first files of Gemma 2 do not say its caps, which are the same in all of its models.
    let usual = |cap: f64| (family.name == "gemma2").then_some(cap);
    for (key, name, usual) in [
        ("attn_logit_softcapping", "attn_logit_softcapping", usual(50.0)),
        ("final_logit_softcapping", "final_logit_softcapping", usual(30.0)),
    ] {
        // 0: no cap.
        if let Some(cap) = keys.number(key)?.or(usual).filter(|c| *c != 0.0) {
            entries.push((name, json!(cap)));
        }
    }
    Ok(entries)
}

fn rope(keys: &Keys<'_>, family: &Family, head_dim: u64) -> Result<Entries> {
    let by_layer = match family.positions {
        Positions::Learned(_) => return Ok(Vec::new()),
        Positions::Rotary(_) => false,
        Positions::RotaryByLayer => true,
    };
    let theta = keys.number("rope.freq_base")?.unwrap_or(if by_layer { 1e6 } else { 1e4 });
    let mut entries = vec![("rope_theta", json!(theta))];
    if by_layer {
        entries.push(("rope_local_base_freq", json!(keys.number("rope.freq_base_swa")?.unwrap_or(1e4))));
    }
    let dim = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    if dim != head_dim {
        // Half an element more, so that the product with the width is not rounded down to one element less.
        entries.push(("partial_rotary_factor", json!((dim as f64 + 0.5) / head_dim.max(1) as f64)));
    }
    if let Some(scaling) = scaling(keys)? {
        entries.push(("rope_scaling", scaling));
    }
    let original = "rope.scaling.original_context_length";
    // Of Llama 3 the factors say all.
    if let Some(n) = keys.size(original)?.filter(|_| keys.gguf.tensor(FREQUENCIES).is_none()) {
        entries.push(("original_max_position_embeddings", json!(n)));
    }
    Ok(entries)
}

/// What is done to the frequencies: `rope_scaling` in the words of transformers.
fn scaling(keys: &Keys<'_>) -> Result<Option<Json>> {
    let key = "rope.scaling.type";
    let kind = match keys.get(key) {
        None => "none",
        Some(v) => v.as_str().ok_or_else(|| keys.wrong(key, "must be a text"))?,
    };
    let factors = |name: &str| -> Result<Option<Vec<f64>>> {
        let Some(stored) = keys.gguf.tensor(name) else { return Ok(None) };
        if stored.shape.len() != 1 || stored.encoding.plain().is_none() || stored.shape[0] > 1 << 10 {
            let shape = &stored.shape;
            return Err(Error::precondition(format!(
                "tensor {name} has shape {shape:?}, must be a short list of floats"
            )));
        }
        let values = decode(stored, DType::F32)?.to_vec1::<f32>()?;
        Ok(Some(values.into_iter().map(f64::from).collect()))
    };
    let attention_factor = keys.number("rope.scaling.attn_factor")?;
    let plain_factor = |what: &str| match attention_factor {
        Some(f) if f != 1.0 => {
            let rule = format!("which is not served with {what}");
            Err(Error::precondition(format!("`{}` is {f}, {rule}", keys.full("rope.scaling.attn_factor"))))
        }
        _ => Ok(()),
    };
    let needed = |name| keys.number(name)?.ok_or_else(|| keys.missing(name));
    if let Some(freqs) = factors(FREQUENCIES)? {
        // Llama 3: the scaled frequencies, as what each of the plain ones is divided by.
        if kind != "none" {
            let rule = "which is not served beside the tensor rope_freqs.weight";
            return Err(Error::precondition(format!("`{}` is {kind:?}, {rule}", keys.full(key))));
        }
        plain_factor("the tensor rope_freqs.weight")?;
        return Ok(Some(json!({
            "rope_type": "longrope", "short_factor": freqs, "long_factor": freqs, "attention_factor": 1.0, "factor": 1.0
        })));
    }
    let (short, long) = (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?);
    match (kind, short, long) {
        ("none" | "longrope", Some(short), Some(long)) => {
            let mut scaling = json!({ "rope_type": "longrope", "short_factor": short, "long_factor": long });
            if let Some(f) = attention_factor {
                scaling["attention_factor"] = json!(f);
            }
            Ok(Some(scaling))
        }
        ("none", None, None) => plain_factor("no scaling").map(|()| None),
        ("linear", None, None) => {
            plain_factor("linear scaling")?;
            Ok(Some(json!({ "rope_type": "linear", "factor": needed("rope.scaling.factor")? })))
        }
        ("yarn", None, None) => {
            plain_factor("yarn")?;
            let mut scaling = json!({ "rope_type": "yarn", "factor": needed("rope.scaling.factor")? });
            for (name, key) in
                [("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")]
            {
                if let Some(v) = keys.number(key)? {
                    scaling[name] = json!(v);
                }
            }
            Ok(Some(scaling))
        }
        (kind, short, long) => Err(Error::precondition(format!(
            "`{}` is {kind:?}, with{} rope_factors_short.weight and with{} rope_factors_long.weight, which is not served; \
             served are none, linear, yarn without both and longrope with both",
            keys.full(key),
            if short.is_some() { "" } else { "out" },
            if long.is_some() { "" } else { "out" },
        ))),
    }
}

/// Which layers have the window.
enum Pattern {
    /// All but every n-th.
    Every(u64),
    /// Those that are true.
    Listed(Vec<bool>),
}

/// The metadata that belongs to an architecture.
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    architecture: &'static str,
}

impl<'a> Keys<'a> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn get(&self, key: &str) -> Option<&'a Value<'a>> {
        self.gguf.get(&self.full(key))
    }

    fn missing(&self, key: &str) -> Error {
        super::bad(format!("has no key `{}`", self.full(key)))
    }

    fn wrong(&self, key: &str, rule: &str) -> Error {
        self.get(key).map_or_else(|| self.missing(key), |v| broken(&self.full(key), v, rule))
    }

    /// A whole number; an array of equal ones counts as one.
    fn size(&self, key: &str) -> Result<Option<u64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let Some(array) = v.as_array() else {
            return v.as_u64().map(Some).ok_or_else(|| self.wrong(key, "must be a whole number, 0 or more"));
        };
        let mut values = array.values().map(|v| v.as_u64());
        match values.next().flatten() {
            Some(first) if values.all(|v| v == Some(first)) => Ok(Some(first)),
            _ => Err(Error::precondition(format!(
                "`{}` is {v} that differ from layer to layer, which is not served",
                self.full(key)
            ))),
        }
    }

    /// One that must be there, within the bounds that [`ModelConfig`](crate::model::config::ModelConfig) sets.
    fn needed(&self, key: &str, most: u64) -> Result<u64> {
        let size = self.size(key)?.ok_or_else(|| self.missing(key))?;
        if (1..=most).contains(&size) {
            return Ok(size);
        }
        Err(self.wrong(key, &format!("must be a whole number from 1 to {most}")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_f64().filter(|x| x.is_finite()).map(Some).ok_or_else(|| self.wrong(key, "must be a number"))
    }

    fn pattern(&self, key: &str) -> Result<Option<Pattern>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let every = v.as_u64().filter(|n| *n > 0).map(Pattern::Every);
        let listed = || v.as_array()?.values().map(|b| b.as_bool()).collect::<Option<Vec<_>>>().map(Pattern::Listed);
        every.or_else(listed).map(Some).ok_or_else(|| self.wrong(key, "must be a number above 0 or bools"))
    }

    fn refuse(&self) -> Result<()> {
        for (key, neutral) in NEUTRAL {
            if let Some(x) = self.number(key)?.filter(|x| !neutral.contains(x)) {
                let what = format!("`{}` is {x}, which is not served", self.full(key));
                return Err(Error::precondition(what));
            }
        }
        match self.get("attention.causal").and_then(Value::as_bool) {
            Some(false) => Err(Error::precondition(format!(
                "`{}` is false; decoders, which are causal, are served from GGUF",
                self.full("attention.causal")
            ))),
            _ => Ok(()),
        }
    }
}
