//! Task adapters: what they are in memory. Their formats, store and registry are the child modules.
//!
//! Whatever the kind (text prefix, prompt tuning, P-tuning, prefix-tuning), an adapter becomes one
//! [`Prefix`]: rows of K and V that every request of the task attends to, given either as stored rows
//! ([`KvRows`]) or as input rows that the frozen model runs once ([`InputRow`]).
pub mod convert;
mod head;
mod multitask;
pub mod peft;
mod placed;
pub mod registry;
mod stack;
pub mod store;
mod task;
pub mod watch;

use crate::error::{Error, Result};
use crate::ops::Machine;
use candle_core::DType;
use std::fmt;
use std::sync::Arc;

pub use head::Head;
pub use multitask::Tasks;
pub use peft::place;
pub use peft::{Loaded, load as load_folder};
pub use placed::{Placed, Placement};
pub use registry::{Registry, State, Status, Ticket};
pub use store::{Staging, Store};
pub use task::{CardSampling, CardStopping, Piece, TaskCard};

/// The name of an adapter: `[A-Za-z0-9][A-Za-z0-9._-]*`, at most 128 bytes. Never a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(Arc<str>);

impl AdapterId {
    /// Longest id in bytes.
    pub const MAX_BYTES: usize = 128;

    /// Checks `id`; the error names the field `adapter_id`.
    pub fn parse(id: &str) -> Result<Self> {
        let rule = "must match [A-Za-z0-9][A-Za-z0-9._-]* and have at most 128 bytes";
        let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let first = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !first || id.len() > Self::MAX_BYTES || !id.bytes().all(ok) {
            return Err(Error::invalid("adapter_id", format!("{id:?}"), rule));
        }
        Ok(AdapterId(id.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// blake3 of content. KV pages are keyed by it, never by a name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Which load of an id this is; grows by one with every load, over all ids of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// What an adapter must agree with: the facts of the base model, given by the model layer.
#[derive(Clone, Debug)]
pub struct BaseShape {
    /// Name of the base for messages.
    pub name: String,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// KV heads per layer.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Tokens in the longest sequence, prefix included.
    pub max_model_len: usize,
    /// Every token sees every other, and the answer is a class: virtual tokens cannot be a prefix.
    pub encoder: bool,
    /// Type that virtual tokens become.
    pub input_dtype: DType,
    /// Type that stored K and V become.
    pub kv_dtype: DType,
    /// What classification heads run on.
    pub machine: Arc<Machine>,
}

/// The adapter method, by the names of PEFT's `peft_type`; `Text` has no weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Method {
    Text,
    PromptTuning,
    PTuning,
    PrefixTuning,
    MultitaskPromptTuning,
    Cpt,
    Cartridge,
}

impl Method {
    /// All with weights, in the order of our messages.
    pub const PEFT: [Method; 6] = [
        Method::PromptTuning,
        Method::PTuning,
        Method::PrefixTuning,
        Method::Cartridge,
        Method::Cpt,
        Method::MultitaskPromptTuning,
    ];

    /// Whether the adapter stores K and V of every layer; the others store input rows.
    pub fn is_kv(self) -> bool {
        matches!(self, Method::PrefixTuning | Method::Cartridge)
    }

    /// PEFT's spelling (`TEXT` for text-only task cards).
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Text => "TEXT",
            Method::PromptTuning => "PROMPT_TUNING",
            Method::PTuning => "P_TUNING",
            Method::PrefixTuning => "PREFIX_TUNING",
            Method::MultitaskPromptTuning => "MULTITASK_PROMPT_TUNING",
            Method::Cpt => "CPT",
            Method::Cartridge => "CARTRIDGE",
        }
    }
}

/// K and V of the leading prefix rows, as the adapter stores them (already rotated: never rotate again).
#[derive(Clone, PartialEq)]
pub struct KvRows {
    /// Number of rows.
    pub len: usize,
    /// `[len, 2 * num_layers, num_kv_heads, head_dim]`: entry 2l is K of layer l, 2l+1 its V.
    pub data: Arc<[f32]>,
}

/// One input row of a prefix or of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputRow {
    /// A token of the vocabulary.
    Token(u32),
    /// Row `i` of the virtual token embeddings beside it ([`Prefix::soft`], [`SoftPrompt::rows`]).
    Soft(u32),
}

/// Virtual tokens that stand among a request's own rows: in the middle or at the end of a template, or before the
/// text of an encoder, which lets them see it. They cannot be a prefix.
#[derive(Clone)]
pub struct SoftPrompt {
    /// Of `rows`: cached blocks that hold virtual tokens are keyed by it.
    pub digest: Digest,
    /// `[len, hidden_size]`
    pub rows: Arc<[f32]>,
    /// Virtual tokens.
    pub len: usize,
}

impl SoftPrompt {
    /// `rows` `[len, hidden_size]`.
    pub fn new(rows: Vec<f32>, len: usize) -> Self {
        let mut h = blake3::Hasher::new();
        h.update(b"soft prompt");
        hash_floats(&mut h, b"rows", &rows);
        SoftPrompt { digest: Digest(*h.finalize().as_bytes()), rows: rows.into(), len }
    }
}

impl fmt::Debug for SoftPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SoftPrompt({}, {} rows)", self.digest, self.len)
    }
}

/// What every request of the task attends to: `kv` rows first, then `rows`, at positions `0..len()`.
#[derive(Clone)]
pub struct Prefix {
    /// Key of the compiled pages: content of everything below. The engine adds the model's own digest by
    /// keeping one pool for one model.
    pub digest: Digest,
    /// Stored K and V (prefix-tuning).
    pub kv: Option<KvRows>,
    /// Rows to run through the model: virtual tokens, prefix text.
    pub rows: Vec<InputRow>,
    /// `[num_soft, hidden_size]` virtual token embeddings that `rows` points into.
    pub soft: Arc<[f32]>,
}

impl Prefix {
    /// Builds a prefix and its digest; `None` if there is not one row in it.
    pub fn new(kv: Option<KvRows>, rows: Vec<InputRow>, soft: Arc<[f32]>) -> Option<Self> {
        let kv = kv.filter(|kv| kv.len > 0);
        if kv.is_none() && rows.is_empty() {
            return None;
        }
        let mut h = blake3::Hasher::new();
        hash_floats(&mut h, b"kv", kv.as_ref().map_or(&[], |kv| &kv.data));
        hash_floats(&mut h, b"soft", &soft);
        for row in &rows {
            match row {
                InputRow::Token(id) => h.update(b"t").update(&id.to_le_bytes()),
                InputRow::Soft(i) => h.update(b"s").update(&i.to_le_bytes()),
            };
        }
        Some(Prefix { digest: Digest(*h.finalize().as_bytes()), kv, rows, soft })
    }

    /// Number of positions the prefix takes.
    #[allow(clippy::len_without_is_empty)] // never empty: see `new`
    pub fn len(&self) -> usize {
        self.kv_len() + self.rows.len()
    }

    /// Leading positions whose K and V are stored.
    pub fn kv_len(&self) -> usize {
        self.kv.as_ref().map_or(0, |kv| kv.len)
    }

    /// Bytes held on the host.
    pub fn bytes(&self) -> usize {
        4 * (self.soft.len() + self.kv.as_ref().map_or(0, |kv| kv.data.len())) + self.rows.len() * 8
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prefix({}, {} kv rows, {} input rows)", self.digest, self.kv_len(), self.rows.len())
    }
}

fn hash_floats(h: &mut blake3::Hasher, tag: &[u8], values: &[f32]) {
    h.update(tag).update(&(values.len() as u64).to_le_bytes());
    let mut bytes = Vec::with_capacity(4096);
    for chunk in values.chunks(1024) {
        bytes.clear();
        chunk.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
        h.update(&bytes);
    }
}

/// One loaded generation of a task adapter. Immutable; requests hold it by [`Arc`].
#[derive(Debug)]
pub struct Adapter {
    /// The name requests use.
    pub id: AdapterId,
    /// Which load this is.
    pub generation: Generation,
    /// How it was made.
    pub method: Method,
    /// PEFT's `num_virtual_tokens`; 0 for text-only.
    pub num_virtual_tokens: usize,
    /// Template, labels, defaults.
    pub card: TaskCard,
    /// Of the card's task. `None` for a card without prefix text (a template alone), and where all there is are
    /// virtual tokens among the request's own rows.
    pub prefix: Option<Arc<Prefix>>,
    /// Of the card's task: virtual tokens that stand among a request's own rows.
    pub soft: Option<Arc<SoftPrompt>>,
    /// Classify answers through it.
    pub head: Option<Arc<Head>>,
    /// The tasks that requests may choose from: [`Method::MultitaskPromptTuning`].
    pub tasks: Option<Arc<Tasks>>,
}

impl Adapter {
    /// What the virtual tokens became for a task; `None`: the card's.
    ///
    /// # Errors
    /// `InvalidArgument` naming `task_id` and the number of tasks; also where the adapter has no tasks at all.
    pub fn placed(&self, task_id: Option<u32>) -> Result<Placed> {
        let own = || Placed { prefix: self.prefix.clone(), soft: self.soft.clone() };
        match (&self.tasks, task_id) {
            (_, None) => Ok(own()),
            (Some(_), Some(task)) if task as usize == self.card.task_id => Ok(own()),
            (Some(tasks), Some(task)) => tasks.placed(task),
            (None, Some(task)) => {
                let (id, method) = (&self.id, self.method.as_str());
                let rule = format!("but adapter `{id}` ({method}) has no tasks; only MULTITASK_PROMPT_TUNING has");
                Err(Error::invalid("task_id", task, rule))
            }
        }
    }

    /// The prefix of a task; see [`Adapter::placed`].
    pub fn prefix_of(&self, task_id: Option<u32>) -> Result<Option<Arc<Prefix>>> {
        Ok(self.placed(task_id)?.prefix)
    }
}
