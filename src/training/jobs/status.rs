//! What a client asks for, and what it sees of a job.
use crate::adapter::AdapterId;
use crate::training::dataset::Record;
use crate::training::run::Report;
use crate::training::settings::Settings;
use crate::training::trainer::JobId;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::SystemTime;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// Trains.
    Running,
    /// Trained; its adapter is on the way into the store.
    Publishing,
    /// Its adapter is in the store.
    Succeeded,
    /// It will not end.
    Failed,
    /// Someone ended it.
    Cancelled,
}

impl JobState {
    /// Lower-case name, as in the journal and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Publishing => "publishing",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }

    /// What [`JobState::as_str`] wrote; anything else counts as failed.
    pub fn parse(name: &str) -> Self {
        use JobState::*;
        [Queued, Running, Publishing, Succeeded, Cancelled].into_iter().find(|s| s.as_str() == name).unwrap_or(Failed)
    }

    /// Nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }
}

/// All that a job was told, but for its data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Checked.
    pub settings: Settings,
    /// Text of the adapter's `task.toml`; empty: none.
    pub card: String,
    /// Put the adapter in service at the end.
    pub load: bool,
    /// Keep it in the KV pool.
    pub pinned: bool,
    /// The last so many lines of the data are for evaluation only.
    pub evaluation_lines: usize,
    /// Lines that no sequence could hold.
    pub too_long: usize,
    /// Examples to learn from, examples to evaluate on.
    pub examples: (usize, usize),
    /// Steps of one start.
    pub steps: usize,
}

/// What a client asks for.
pub struct NewJob {
    /// What to train.
    pub adapter_id: AdapterId,
    /// Unchecked.
    pub settings: Settings,
    /// Text of the `task.toml`.
    pub card: String,
    /// Put the adapter in service at the end.
    pub load: bool,
    /// Keep it in the KV pool.
    pub pinned: bool,
    /// To learn from.
    pub data: Vec<Record>,
    /// To evaluate on, besides `settings.evaluation_share` of the data.
    pub evaluation: Vec<Record>,
}

/// A job as a client sees it.
#[derive(Clone, Debug)]
pub struct JobStatus {
    /// Its name.
    pub id: JobId,
    /// What it trains.
    pub adapter_id: AdapterId,
    /// What it was told.
    pub spec: Arc<Spec>,
    /// Where it is.
    pub state: JobState,
    /// Why it failed.
    pub error: String,
    /// Under which its adapter came into service; 0: it has not.
    pub generation: u64,
    /// When it was created.
    pub created_at: SystemTime,
    /// When it ended.
    pub ended_at: Option<SystemTime>,
    /// Which start of several, and its steps done.
    pub at: (usize, usize),
    /// The last step's report.
    pub last_step: Option<Report>,
    /// The last evaluation's.
    pub last_evaluation: Option<Report>,
}
