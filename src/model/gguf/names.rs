//! The tensors of a file under the names that a Hugging Face checkpoint gives them.
use super::{Architecture, Gguf};
use crate::error::Result;
use crate::model::config::{Family, ModelConfig, Qkv, Residual, Up};

/// Tensors that become part of the config, and frequencies that old converters kept.
const NO_WEIGHTS: [&str; 4] =
    ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", ".attn_rot_embd.inv_freq"];

/// Names there and here, without `.weight` and `.bias`; `{}` stands for the layer's number.
pub struct TensorNames {
    pairs: Vec<(String, &'static str)>,
    /// Heads whose rows are paired in the file, of q and k.
    paired: Option<[usize; 2]>,
}

impl TensorNames {
    /// Those of a file whose numbers are `config`.
    pub fn new(gguf: &Gguf<'_>, config: &ModelConfig) -> Result<Self> {
        let paired = Architecture::of(gguf)?.paired.then_some([config.num_heads, config.num_kv_heads]);
        Ok(Self::of_family(config.family, paired))
    }

    /// Those of a family.
    pub(super) fn of_family(family: &Family, paired: Option<[usize; 2]>) -> Self {
        TensorNames { pairs: pairs(family), paired }
    }

    /// The Hugging Face name of a tensor of the file; its own where it has none; `None` where it is no weight.
    pub fn full(&self, stored: &str) -> Option<String> {
        if NO_WEIGHTS.iter().any(|n| stored == *n || (n.starts_with('.') && stored.ends_with(n))) {
            return None;
        }
        let translated = self.pairs.iter().find_map(|(full, short)| translate(stored, short, full));
        Some(translated.unwrap_or_else(|| stored.to_owned()))
    }

    /// The file's name of a tensor, for messages.
    pub fn stored(&self, full: &str) -> String {
        let translated = self.pairs.iter().find_map(|(name, short)| translate(full, name, short));
        translated.unwrap_or_else(|| full.to_owned())
    }

    /// Heads of a tensor whose rows `2 i` and `2 i + 1` of each head turn together.
    pub fn paired_heads(&self, stored: &str) -> Option<usize> {
        let [q, k] = self.paired?;
        let is = |short| translate(stored, short, "").is_some();
        if is("blk.{}.attn_q") { Some(q) } else { is("blk.{}.attn_k").then_some(k) }
    }
}

/// `name` is `from` with a layer and an ending: the same of `to`.
fn translate(name: &str, from: &str, to: &str) -> Option<String> {
    let (stem, ending) = name.rsplit_once('.').filter(|(_, ending)| matches!(*ending, "weight" | "bias"))?;
    match from.split_once("{}") {
        None => (stem == from).then(|| format!("{to}.{ending}")),
        Some((before, after)) => {
            let layer = stem.strip_prefix(before)?.strip_suffix(after)?;
            // Written one way only: two names of one tensor would be one here.
            let number = layer.parse::<u32>().ok().filter(|n| n.to_string() == layer)?;
            Some(format!("{}.{ending}", to.replace("{}", &number.to_string())))
        }
    }
}

fn pairs(family: &Family) -> Vec<(String, &'static str)> {
    let names = family.names;
    let root = names.roots.first().copied().unwrap_or("");
    let below = |name: &str| format!("{root}{name}");
    let mut all = vec![
        (below(names.embed), "token_embd"),
        (below(names.norm), "output_norm"),
        (names.head.to_owned(), "output"),
        (below(names.o), "blk.{}.attn_output"),
        (below(names.down), "blk.{}.ffn_down"),
    ];
    if !names.positions.is_empty() {
        all.push((below(names.positions), "position_embd"));
    }
    let norms: &[&'static str] = match family.residual {
        Residual::Sandwich => {
            &["blk.{}.attn_norm", "blk.{}.post_attention_norm", "blk.{}.ffn_norm", "blk.{}.post_ffw_norm"]
        }
        _ => &["blk.{}.attn_norm", "blk.{}.ffn_norm"],
    };
    all.extend(names.norms.iter().map(|n| below(n)).zip(norms.iter().copied()));
    match names.qkv {
        Qkv::Apart { q, k, v } => {
            all.extend([(below(q), "blk.{}.attn_q"), (below(k), "blk.{}.attn_k"), (below(v), "blk.{}.attn_v")]);
        }
        Qkv::Fused(qkv) | Qkv::ByHead(qkv) => all.push((below(qkv), "blk.{}.attn_qkv")),
    }
    if family.head_norm {
        all.push((below("layers.{}.self_attn.q_norm"), "blk.{}.attn_q_norm"));
        all.push((below("layers.{}.self_attn.k_norm"), "blk.{}.attn_k_norm"));
    }
    match names.up {
        Up::Gated { gate, up } => all.extend([(below(gate), "blk.{}.ffn_gate"), (below(up), "blk.{}.ffn_up")]),
        Up::Fused(up) | Up::Plain(up) => all.push((below(up), "blk.{}.ffn_up")),
    }
    all
}
