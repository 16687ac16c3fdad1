//! `adapter_config.json`: the few of PEFT's keys that decide what the tensors mean.
use crate::adapter::{BaseShape, Method};
use crate::error::{Error, Kind, Result};
use serde::Deserialize;

/// What prefixd serves, for messages.
const SERVED: &str = "prefixd serves PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CARTRIDGE and \
                      MULTITASK_PROMPT_TUNING, which leave every weight of the base as it is";

/// The keys as written; all others are ignored, as PEFT's versions differ in them.
#[derive(Deserialize)]
struct Raw {
    peft_type: String,
    task_type: Option<String>,
    base_model_name_or_path: Option<String>,
    num_virtual_tokens: Option<i64>,
    num_transformer_submodules: Option<i64>,
    num_layers: Option<i64>,
    num_attention_heads: Option<i64>,
}

/// A config whose method is served.
pub(super) struct PeftConfig {
    pub(super) method: Method,
    /// At least 1.
    pub(super) num_virtual_tokens: usize,
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
        let method = match raw.peft_type.as_str() {
            "PROMPT_TUNING" => Method::PromptTuning,
            "P_TUNING" => Method::PTuning,
            "PREFIX_TUNING" | "CARTRIDGE" => Method::PrefixTuning,
            "MULTITASK_PROMPT_TUNING" => Method::MultitaskPromptTuning,
            other => {
                let other: String = other.chars().take(80).collect();
                return Err(Error::precondition(format!("{}: `peft_type` is {other:?}; {SERVED}", super::CONFIG_FILE)));
            }
        };
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
        Ok(PeftConfig {
            method,
            num_virtual_tokens,
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
        if self.method != Method::PrefixTuning {
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
        match self.method {
            Method::PrefixTuning => 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim,
            _ => shape.hidden_size,
        }
    }

    /// Most bytes that fitting weights can take: f32 rows for the longest sequence, and 16 MiB for the
    /// header, task matrices and ignored encoder keys.
    pub(super) fn max_weight_bytes(&self, shape: &BaseShape) -> u64 {
        let rows = shape.max_model_len.saturating_mul(self.width(shape)).saturating_mul(4);
        (rows as u64).saturating_add(16 << 20)
    }

    /// How the width comes about, for messages.
    pub(super) fn prompt_rule(&self, shape: &BaseShape) -> String {
        match self.method {
            Method::PrefixTuning => format!(
                "[num_virtual_tokens, 2 * {} layers * {} KV heads * {} head_dim]",
                shape.num_layers, shape.num_kv_heads, shape.head_dim
            ),
            _ => "[num_virtual_tokens, hidden_size]".into(),
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
