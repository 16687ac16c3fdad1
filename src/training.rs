//! Training of adapters on the weights that serve.
//!
//! One step may train several jobs: their sequences share the packed batch, each attends to its own job's prefix, and
//! the gradients part again by job. There is no service on top of it yet.
pub mod optimizer;
pub mod prompt_encoder;
pub mod trainer;

pub use optimizer::{AdamW, AdamWConfig, Schedule};
pub use prompt_encoder::{EncoderKind, PromptEncoder};
pub use trainer::{Example, Job, Placement, StepReport, Work, step};
