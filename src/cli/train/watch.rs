//! Following a job: the bar, what it came to, the curve.
use super::curve::{self, Curve};
use crate::cli::{Failure, Terminal};
use crate::rpc::proto::training_service_client::TrainingServiceClient;
use crate::rpc::proto::{self, TrainingJobState, watch_training_job_response::Event};
use serde_json::{Value, json};
use std::path::Path;
use tonic::transport::Channel;

/// A job that has been followed to its end.
pub(in crate::cli) struct Watched {
    job: Option<proto::TrainingJob>,
    curve: Curve,
}

/// One line on a job.
pub(in crate::cli) fn summary(job: &proto::TrainingJob) -> String {
    let settings = job.settings.clone().unwrap_or_default();
    let method = settings.method().as_str_name().trim_start_matches("TRAINING_METHOD_").to_ascii_lowercase();
    let (examples, steps, n) = (job.train_examples, job.total_steps, settings.num_virtual_tokens.unwrap_or(0));
    let mut line = format!(
        "{}: {} by {method}, {n} virtual tokens, {examples} examples, {steps} steps",
        job.job_id, job.adapter_id
    );
    if job.too_long_examples > 0 {
        line += &format!("; {} examples are too long and left out", job.too_long_examples);
    }
    line
}

/// Without the enum's prefix: `RUNNING`.
pub(in crate::cli) fn state(job: &proto::TrainingJob) -> &'static str {
    job.state().as_str_name().trim_start_matches("TRAINING_JOB_STATE_")
}

/// Shows a job until it ends. Whoever interrupts this leaves the job running.
pub(in crate::cli) async fn follow(
    client: &mut TrainingServiceClient<Channel>,
    job_id: &str,
    terminal: &Terminal,
) -> Result<Watched, Failure> {
    let message = proto::WatchTrainingJobRequest { job_id: job_id.to_owned() };
    let mut events = client.watch_training_job(message).await?.into_inner();
    let bar = terminal.bar();
    let mut watched = Watched { job: None, curve: Curve::default() };
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Step(step)) => {
                let rate = step.tokens_per_second;
                bar.set_position(u64::from(step.step));
                bar.set_message(format!("loss {:.4}, {rate:.0} tokens/s", step.loss));
                watched.curve.step(step);
            }
            Some(Event::Evaluation(e)) => {
                let exact = 100.0 * e.exact_match;
                let line = format!("  step {:>5}: evaluation loss {:.4}, exact match {exact:.1} %", e.step, e.loss);
                bar.suspend(|| terminal.line(line));
                watched.curve.evaluation(e);
            }
            Some(Event::Job(job)) => {
                bar.set_length(u64::from(job.total_steps));
                watched.job = Some(job);
            }
            Some(Event::Divergence(d)) => {
                let line = format!("  restart {} is given up: {}", d.restart, d.reason);
                bar.suspend(|| terminal.line(line));
            }
            None => {}
        }
    }
    bar.finish_and_clear();
    Ok(watched)
}

impl Watched {
    /// The job at its end.
    ///
    /// # Errors
    /// Where it ended without a result: why.
    pub fn ended(&self) -> Result<proto::TrainingJob, Failure> {
        let job = self.job.clone().ok_or_else(|| Failure::local("the server told nothing of the job"))?;
        match job.state() {
            TrainingJobState::Succeeded => Ok(job),
            _ => Err(Failure::local(format!("job {} is {}: {}", job.job_id, state(&job), job.error))),
        }
    }

    /// Draws the curve and says where, and how the loss went.
    pub fn draw(&self, path: &Path, terminal: &Terminal) -> Result<(), Failure> {
        let Some((first, last)) = self.curve.ends() else { return Ok(()) };
        curve::draw(&self.curve, path).map_err(|e| Failure::local(format!("{}: {e}", path.display())))?;
        let (steps, line) = (self.curve.len(), self.curve.sparkline(24));
        terminal.line(format!("  loss {first:.4} {line} {last:.4} in {steps} steps; curve: {}", path.display()));
        Ok(())
    }
}

/// A job in the API's own field names.
pub(in crate::cli) fn json(job: &proto::TrainingJob) -> Value {
    let step = |s: &proto::TrainingStep| {
        json!({ "step": s.step, "loss": s.loss, "learning_rate": s.learning_rate, "gradient_norm": s.gradient_norm,
                "tokens_per_second": s.tokens_per_second })
    };
    let evaluation = |e: &proto::TrainingEvaluation| json!({ "step": e.step, "loss": e.loss, "token_accuracy": e.token_accuracy, "exact_match": e.exact_match });
    json!({
        "job_id": job.job_id,
        "adapter_id": job.adapter_id,
        "state": state(job),
        "error": job.error,
        "train_examples": job.train_examples,
        "evaluation_examples": job.evaluation_examples,
        "too_long_examples": job.too_long_examples,
        "total_steps": job.total_steps,
        "step": job.step,
        "restart": job.restart,
        "last_step": job.last_step.as_ref().map(step),
        "last_evaluation": job.last_evaluation.as_ref().map(evaluation),
        "generation": job.generation,
    })
}
