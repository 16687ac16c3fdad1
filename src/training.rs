//! Training of adapters on the weights that serve.
//!
//! A packed batch may hold sequences of several jobs: each attends to its own job's prefix, and the gradients part again
//! by job ([`step`]). A batch is run a layer at a time, so serving goes on in between.
pub mod head;
pub mod job;
pub mod optimizer;
pub mod prompt_encoder;
pub mod step;

pub use head::TrainedHead;
pub use job::{Job, Placement};
pub use optimizer::{AdamW, AdamWConfig, Schedule};
pub use prompt_encoder::{EncoderKind, PromptEncoder};
pub use step::{Example, Goal, Outcome, Step, Work};
