//! `prefixd adapters convert`.
use super::super::{Failure, Terminal};
use crate::adapter::convert::{KvShape, convert};
use crate::model::config::ModelConfig;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Make a folder as PEFT writes it of another layout.
#[derive(Debug, Args)]
pub(in crate::cli) struct Convert {
    /// A folder, or a file of weights.
    src: PathBuf,
    /// The folder to make.
    dst: PathBuf,
    #[command(flatten)]
    shape: Shape,
}

/// What stored K and V are for.
#[derive(Debug, Args)]
#[command(next_help_heading = "The base of stored K and V (for a prefix encoder)")]
struct Shape {
    /// Its layers.
    #[arg(long, requires_all = ["kv_heads", "head_dim"], value_name = "L")]
    layers: Option<usize>,
    /// Its KV heads.
    #[arg(long, requires_all = ["layers", "head_dim"], value_name = "H")]
    kv_heads: Option<usize>,
    /// The width of a head.
    #[arg(long, requires_all = ["layers", "kv_heads"], value_name = "D")]
    head_dim: Option<usize>,
    /// All three from the config.json of this folder.
    #[arg(long, conflicts_with_all = ["layers", "kv_heads", "head_dim"], value_name = "DIR")]
    model: Option<PathBuf>,
}

impl Convert {
    pub fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let shape = self.shape.read()?;
        let adapter = convert(&self.src, &self.dst, shape.as_ref())?;
        let tensors: Value = adapter.tensors.iter().map(|(name, t)| (name.clone(), json!(t.shape))).collect();
        let method = adapter.config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        terminal.json(&json!({ "folder": self.dst, "method": method, "tensors": tensors }));
        terminal.line(format!("{} {}", self.dst.display(), method.to_ascii_lowercase()));
        for (name, t) in &adapter.tensors {
            terminal.line(format!("  {name} {:?} {:?}", t.shape, t.dtype));
        }
        Ok(())
    }
}

impl Shape {
    fn read(self) -> Result<Option<KvShape>, Failure> {
        if let Some(dir) = self.model {
            let path = dir.join("config.json");
            let json = std::fs::read(&path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            let config = ModelConfig::parse(&json)?;
            let name = dir.file_name().map(|name| name.to_string_lossy().into_owned());
            let (num_layers, num_kv_heads, head_dim) = (config.num_layers(), config.num_kv_heads, config.head_dim);
            return Ok(Some(KvShape { name, num_layers, num_kv_heads, head_dim }));
        }
        // clap has them all or none.
        let given = self.layers.zip(self.kv_heads).zip(self.head_dim);
        Ok(given.map(|((num_layers, num_kv_heads), head_dim)| KvShape {
            name: None,
            num_layers,
            num_kv_heads,
            head_dim,
        }))
    }
}
