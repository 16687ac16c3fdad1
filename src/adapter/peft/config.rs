//! `adapter_config.json`: the few of PEFT's keys that decide what the tensors mean.
use crate::adapter::{BaseShape, Method};
use crate::error::{Error, Kind, Result};
use serde::Deserialize;

/// Why a type of PEFT's is not served; `None` for a name that PEFT does not have.
fn why_not(peft_type: &str) -> Option<&'static str> {
    Some(match peft_type {
        "LORA" | "ADALORA" | "LOHA" | "LOKR" | "VERA" | "PVERA" | "VBLORA" | "UNILORA" | "RANDLORA" | "DELORA"
        | "TINYLORA" | "GRALORA" | "GLORA" | "FOURIERFT" | "C3A" | "WAVEFT" | "SHIRA" | "HIRA" | "MISS" | "ADAMSS"
        | "FROD" | "LILY" | "PEANUT" | "SHADOW" | "SUPERTUNING" | "DEFT" | "BEFT" | "OSF" | "PSOFT" => {
            "it changes weights of the base, which all tasks share"
        }
        "OFT" | "BOFT" | "HRA" | "ROAD" => "it rotates or reflects weights of the base, which all tasks share",
        "XLORA" | "POLY" => "it mixes changes of the base's weights, which all tasks share",
        "IA3" => "it scales keys, values and activations inside every layer of the base, which all tasks share",
        "LN_TUNING" => "it trains the base's own norms, which all tasks share",
        "TRAINABLE_TOKENS" => "it replaces rows of the base's token table, which all tasks share",
        "ADAPTION_PROMPT" => {
            "it adds a gated attention of its own to the upper layers; a prefix is attended to with the text, \
             in one softmax and in all layers"
        }
        _ => return None,
    })
}

/// The method of PEFT's spelling.
///
/// # Errors
/// `FailedPrecondition` saying why it is not served, and what is.
pub(in crate::adapter) fn method_of(peft_type: &str) -> Result<Method> {
    let known = Method::PEFT.into_iter().find(|method| method.as_str() == peft_type);
    known.ok_or_else(|| refuse_type(peft_type))
}

fn refuse_type(peft_type: &str) -> Error {
    let why = why_not(peft_type).unwrap_or("that is none of PEFT's types for prompts and prefixes");
    let served: Vec<_> = Method::PEFT.iter().map(|m| m.as_str()).collect();
    let (last, others) = served.split_last().map_or(("", String::new()), |(last, all)| (*last, all.join(", ")));
    let shown: String = peft_type.chars().take(80).collect();
    Error::precondition(format!(
        "{}: `peft_type` is {shown:?}: {why}; prefixd serves {others} and {last}, which leave every weight of the base \
         as it is",
        super::CONFIG_FILE
    ))
}

/// Most labels of a head.
const MAX_LABELS: usize = 4096;

/// The keys as written; all others are ignored, as PEFT's versions differ in them.
#[derive(Deserialize)]
struct Raw {
    peft_type: String,
    task_type: Option<String>,
    base_model_name_or_path: Option<String>,
    num_virtual_tokens: Option<i64>,
    num_frozen_tokens: Option<i64>,
    num_transformer_submodules: Option<i64>,
    num_layers: Option<i64>,
    num_attention_heads: Option<i64>,
}

/// A config whose method is served.
pub(super) struct PeftConfig {
    pub(super) method: Method,
    /// At least 1.
    pub(super) num_virtual_tokens: usize,
    /// `SEQ_CLS`: a trained head comes with the prompt.
    pub(super) classifies: bool,
    /// As written, for messages.
    pub(super) task_type: String,
    /// What the adapter was trained on, for messages.
    trained_on: Option<String>,
    num_layers: Option<i64>,
    /// For prefix-tuning PEFT writes the number of KV heads here.
    num_attention_heads: Option<i64>,
}

impl PeftConfig {
    /// Reads the config of a method that is served and a decoder-only base.
    pub(super) fn parse(json: &str) -> Result<Self> {
        let malformed = |m: String| Error::new(Kind::InvalidArgument, format!("{}: {m}", super::CONFIG_FILE));
        let raw: Raw = serde_json::from_str(json).map_err(|e| malformed(e.to_string()))?;
        let method = method_of(&raw.peft_type)?;
        let submodules = raw.num_transformer_submodules.unwrap_or(1);
        let task = raw.task_type.as_deref().unwrap_or("");
        if submodules != 1 || task == "SEQ_2_SEQ_LM" {
            return Err(Error::precondition(format!(
                "{}: `num_transformer_submodules` is {submodules}, `task_type` is {task:?}: made for an \
                 encoder-decoder; a decoder has 1 submodule",
                super::CONFIG_FILE
            )));
        }
        let n = raw.num_virtual_tokens.ok_or_else(|| malformed("`num_virtual_tokens` is missing".into()))?;
        let num_virtual_tokens = usize::try_from(n)
            .ok()
            .filter(|&n| n >= 1)
            .ok_or_else(|| malformed(format!("`num_virtual_tokens` is {n}, must be at least 1")))?;
        // Frozen rows of a cartridge are the first of those saved: served like the rest.
        if let Some(frozen) = raw.num_frozen_tokens.filter(|frozen| !(0..=n).contains(frozen)) {
            return Err(malformed(format!("`num_frozen_tokens` is {frozen}, must be 0 to `num_virtual_tokens` ({n})")));
        }
        Ok(PeftConfig {
            method,
            num_virtual_tokens,
            classifies: task == "SEQ_CLS",
            task_type: task.chars().take(80).collect(),
            trained_on: raw.base_model_name_or_path,
            num_layers: raw.num_layers,
            num_attention_heads: raw.num_attention_heads,
        })
    }

    /// Rules that need no tensor. The layout of a KV prefix depends on layers and heads one by one, not
    /// only on their product.
    pub(super) fn check_base(&self, shape: &BaseShape) -> Result<()> {
        let (n, max) = (self.num_virtual_tokens, shape.max_model_len);
        if n >= max {
            let what = format!("`num_virtual_tokens` is {n}, must be less than {max}, the longest sequence");
            return Err(self.misfit(shape, &what));
        }
        if !self.method.is_kv() {
            return Ok(());
        }
        let facts = [
            ("num_layers", self.num_layers, shape.num_layers, "decoder layers"),
            ("num_attention_heads", self.num_attention_heads, shape.num_kv_heads, "KV heads"),
        ];
        for (key, found, expected, noun) in facts {
            if let Some(found) = found.filter(|&found| found != expected as i64) {
                let what = format!("`{key}` is {found}, the base has {expected} {noun}");
                return Err(self.misfit(shape, &what));
            }
        }
        Ok(())
    }

    /// Columns of `prompt_embeddings` that fit the base.
    pub(super) fn width(&self, shape: &BaseShape) -> usize {
        match self.method.is_kv() {
            true => 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim,
            false => shape.hidden_size,
        }
    }

    /// Most bytes that fitting weights can take: f32 rows for the longest sequence, a head with a dense layer and
    /// [`MAX_LABELS`], and 16 MiB for the header, task matrices and ignored encoder keys.
    pub(super) fn max_weight_bytes(&self, shape: &BaseShape) -> u64 {
        let rows = shape.max_model_len.saturating_mul(self.width(shape));
        let head_rows = if self.classifies { shape.hidden_size.saturating_add(MAX_LABELS) } else { 0 };
        let floats = rows.saturating_add(head_rows.saturating_mul(shape.hidden_size));
        (floats as u64).saturating_mul(4).saturating_add(16 << 20)
    }

    /// How the width comes about, for messages.
    pub(super) fn prompt_rule(&self, shape: &BaseShape) -> String {
        match self.method.is_kv() {
            true => format!(
                "[num_virtual_tokens, 2 * {} layers * {} KV heads * {} head_dim]",
                shape.num_layers, shape.num_kv_heads, shape.head_dim
            ),
            false => "[num_virtual_tokens, hidden_size]".into(),
        }
    }

    /// `prompt_embeddings` is `[num_virtual_tokens, width]`.
    pub(super) fn check_prompt(&self, dims: &[usize], width: usize, shape: &BaseShape) -> Result<()> {
        let (rows, cols, n) = (dims[0], dims[1], self.num_virtual_tokens);
        if rows != n {
            return Err(Error::new(
                Kind::InvalidArgument,
                format!("`prompt_embeddings` has {rows} rows, `num_virtual_tokens` is {n}"),
            ));
        }
        if cols != width {
            let rule = self.prompt_rule(shape);
            return Err(self.misfit(shape, &format!("`prompt_embeddings` has {cols} columns, needs {width} as {rule}")));
        }
        Ok(())
    }

    fn misfit(&self, shape: &BaseShape, what: &str) -> Error {
        let made_for = match &self.trained_on {
            Some(name) => format!(" (it names {:?})", name.chars().take(80).collect::<String>()),
            None => String::new(),
        };
        Error::precondition(format!("the adapter does not fit base `{}`: {what}{made_for}", shape.name))
    }
}
