//! Training of adapters on the weights that serve.
//!
//! A packed batch may hold sequences of several jobs: each attends to its own job's prefix, and the gradients part again
//! by job ([`step`]). A batch is run a layer at a time, so serving goes on in between.
pub mod dataset;
pub mod export;
pub mod head;
pub mod init;
pub mod job;
pub mod jobs;
pub mod journal;
pub mod metrics;
pub mod optimizer;
pub mod prompt_encoder;
pub mod run;
pub mod settings;
pub mod step;
pub mod trainer;

pub use head::TrainedHead;
pub use job::{Job, Placement};
pub use optimizer::{AdamW, AdamWConfig, Schedule};
pub use prompt_encoder::{EncoderKind, PromptEncoder};
pub use step::{Example, Goal, Outcome, Step, Work};
