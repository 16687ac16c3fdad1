//! Training jobs: settings and examples from protobuf, jobs and reports to it.
use super::Chat;
use crate::error::{Error, Result};
use crate::rpc::proto;
use crate::training::Schedule;
use crate::training::dataset::Record;
use crate::training::jobs::{JobState, JobStatus};
use crate::training::run::{Happened, Report};
use crate::training::settings::{Init, Recompute, Reparametrisation, Settings, TrainMethod};

/// The settings with their defaults, unchecked.
///
/// # Errors
/// `InvalidArgument` for an enum value that this version does not know.
pub fn settings(wire: proto::TrainingSettings) -> Result<Settings> {
    use proto::{LearningRateSchedule as S, PromptInit as I, PromptReparametrisation as P};
    use proto::{Recomputation as R, TrainingMethod as M};
    let usual = Settings::default();
    let n = |value: Option<u32>, usual: usize| value.map_or(usual, |v| v as usize);
    let reparametrisation = {
        let value = wire.reparametrisation;
        match known("settings.reparametrisation", value, P::try_from(value))? {
            P::Unspecified => Reparametrisation::Default,
            P::Mlp => Reparametrisation::Mlp,
            P::Lstm => Reparametrisation::Lstm,
            P::Projection => Reparametrisation::Projection,
        }
    };
    let learning_rate = match wire.learning_rate {
        None => usual.learning_rate,
        Some(rate) if rate > 0.0 => rate,
        Some(rate) => {
            return Err(Error::invalid(
                "settings.learning_rate",
                rate,
                "must be above 0; leave it out for the default",
            ));
        }
    };
    Ok(Settings {
        method: match known("settings.method", wire.method, M::try_from(wire.method))? {
            M::Unspecified | M::PrefixTuning => TrainMethod::PrefixTuning,
            M::PromptTuning => TrainMethod::PromptTuning,
            M::PTuning => TrainMethod::PTuning,
            M::MultitaskPromptTuning => TrainMethod::MultitaskPromptTuning,
        },
        num_virtual_tokens: n(wire.num_virtual_tokens, usual.num_virtual_tokens),
        init: match known("settings.init", wire.init, I::try_from(wire.init))? {
            I::Unspecified if reparametrisation == Reparametrisation::Projection => Init::Random,
            I::Unspecified | I::Text => Init::Text,
            I::SampledVocabulary => Init::SampledVocabulary,
            I::Random => Init::Random,
        },
        init_text: wire.init_text,
        reparametrisation,
        encoder_hidden_size: n(wire.encoder_hidden_size, usual.encoder_hidden_size),
        encoder_num_layers: n(wire.encoder_num_layers, usual.encoder_num_layers),
        num_tasks: n(wire.num_tasks, usual.num_tasks),
        num_ranks: n(wire.num_ranks, usual.num_ranks),
        classification_head: wire.classification_head,
        learning_rate,
        schedule: match known("settings.schedule", wire.schedule, S::try_from(wire.schedule))? {
            S::Unspecified | S::Linear => Schedule::Linear,
            S::Cosine => Schedule::Cosine,
            S::Constant => Schedule::Constant,
        },
        warmup_steps: n(wire.warmup_steps, usual.warmup_steps),
        weight_decay: wire.weight_decay.unwrap_or(usual.weight_decay),
        max_gradient_norm: wire.max_gradient_norm.unwrap_or(usual.max_gradient_norm),
        batch_size: n(wire.batch_size, usual.batch_size),
        accumulation_steps: n(wire.accumulation_steps, usual.accumulation_steps),
        max_steps: n(wire.max_steps, usual.max_steps),
        epochs: wire.epochs.unwrap_or(usual.epochs),
        max_length: n(wire.max_length, usual.max_length),
        seed: wire.seed.unwrap_or(usual.seed),
        evaluation_share: wire.evaluation_share.unwrap_or(usual.evaluation_share),
        evaluation_interval: n(wire.evaluation_interval, usual.evaluation_interval),
        early_stopping_patience: n(wire.early_stopping_patience, usual.early_stopping_patience),
        loss_on_input: wire.loss_on_input,
        restarts: n(wire.restarts, usual.restarts),
        recompute: match known("settings.recomputation", wire.recomputation, R::try_from(wire.recomputation))? {
            R::Unspecified | R::Auto => Recompute::Auto,
            R::Never => Recompute::Never,
            R::Always => Recompute::Always,
        },
        target_template: wire.target_template.unwrap_or(usual.target_template),
        append_eos: wire.append_eos,
        keep_order: wire.keep_order,
    })
}

fn known<T>(field: &'static str, value: i32, parsed: std::result::Result<T, prost::UnknownEnumValue>) -> Result<T> {
    parsed.map_err(|_| Error::invalid(field, value, "is no value of this version"))
}

/// The settings of a job as they are.
fn settings_to_wire(s: &Settings) -> proto::TrainingSettings {
    use proto::{LearningRateSchedule as S, PromptInit as I, PromptReparametrisation as P};
    use proto::{Recomputation as R, TrainingMethod as M};
    let n = |value: usize| Some(value as u32);
    proto::TrainingSettings {
        method: match s.method {
            TrainMethod::PrefixTuning => M::PrefixTuning,
            TrainMethod::PromptTuning => M::PromptTuning,
            TrainMethod::PTuning => M::PTuning,
            TrainMethod::MultitaskPromptTuning => M::MultitaskPromptTuning,
        }
        .into(),
        num_virtual_tokens: n(s.num_virtual_tokens),
        init: match s.init {
            Init::Text => I::Text,
            Init::SampledVocabulary => I::SampledVocabulary,
            Init::Random => I::Random,
        }
        .into(),
        init_text: s.init_text.clone(),
        reparametrisation: match s.reparametrisation {
            Reparametrisation::Default => P::Unspecified,
            Reparametrisation::Mlp => P::Mlp,
            Reparametrisation::Lstm => P::Lstm,
            Reparametrisation::Projection => P::Projection,
        }
        .into(),
        encoder_hidden_size: n(s.encoder_hidden_size),
        encoder_num_layers: n(s.encoder_num_layers),
        num_tasks: n(s.num_tasks),
        num_ranks: n(s.num_ranks),
        classification_head: s.classification_head,
        learning_rate: Some(s.learning_rate),
        schedule: match s.schedule {
            Schedule::Linear => S::Linear,
            Schedule::Cosine => S::Cosine,
            Schedule::Constant => S::Constant,
        }
        .into(),
        warmup_steps: n(s.warmup_steps),
        weight_decay: Some(s.weight_decay),
        max_gradient_norm: Some(s.max_gradient_norm),
        batch_size: n(s.batch_size),
        accumulation_steps: n(s.accumulation_steps),
        max_steps: n(s.max_steps),
        epochs: Some(s.epochs),
        max_length: n(s.max_length),
        seed: Some(s.seed),
        evaluation_share: Some(s.evaluation_share),
        evaluation_interval: n(s.evaluation_interval),
        early_stopping_patience: n(s.early_stopping_patience),
        loss_on_input: s.loss_on_input,
        restarts: n(s.restarts),
        recomputation: match s.recompute {
            Recompute::Auto => R::Auto,
            Recompute::Never => R::Never,
            Recompute::Always => R::Always,
        }
        .into(),
        target_template: Some(s.target_template.clone()),
        append_eos: s.append_eos,
        keep_order: s.keep_order,
    }
}

/// An example of a request.
pub fn record(wire: proto::TrainingExample) -> Result<Record> {
    let task_id = wire.task_id;
    if let Some(messages) = wire.messages {
        if !wire.input.is_empty() {
            return Err(Error::invalid("input", format!("{:?}", wire.input), "but `messages` is given"));
        }
        let messages = Chat::try_from(messages)?.messages;
        return Ok(Record { messages, targets: wire.targets, task_id, ..Record::default() });
    }
    Ok(Record { input: Some(wire.input), targets: wire.targets, task_id, ..Record::default() })
}

/// A job as a client sees it.
pub fn status_of_job(job: &JobStatus) -> proto::TrainingJob {
    use proto::TrainingJobState as S;
    let (mut last_step, mut last_evaluation) = (None, None);
    for happened in [&job.last_step, &job.last_evaluation].into_iter().flatten().map(report) {
        match happened {
            proto::watch_training_job_response::Event::Step(step) => last_step = Some(step),
            proto::watch_training_job_response::Event::Evaluation(e) => last_evaluation = Some(e),
            proto::watch_training_job_response::Event::Divergence(_)
            | proto::watch_training_job_response::Event::Job(_) => {}
        }
    }
    proto::TrainingJob {
        job_id: job.id.to_string(),
        adapter_id: job.adapter_id.to_string(),
        state: match job.state {
            JobState::Queued => S::Queued,
            JobState::Running => S::Running,
            JobState::Publishing => S::Publishing,
            JobState::Succeeded => S::Succeeded,
            JobState::Failed => S::Failed,
            JobState::Cancelled => S::Cancelled,
        }
        .into(),
        error: job.error.clone(),
        settings: Some(settings_to_wire(&job.spec.settings)),
        created_at: Some(job.created_at.into()),
        ended_at: job.ended_at.map(Into::into),
        train_examples: job.spec.examples.0 as u32,
        evaluation_examples: job.spec.examples.1 as u32,
        too_long_examples: job.spec.too_long as u32,
        total_steps: job.spec.steps as u32,
        restart: job.at.0 as u32,
        step: job.at.1 as u32,
        last_step,
        last_evaluation,
        generation: job.generation,
    }
}

/// One thing that happened in a job.
pub fn report(report: &Report) -> proto::watch_training_job_response::Event {
    use proto::watch_training_job_response::Event;
    let (restart, step) = (report.restart as u32, report.step as u32);
    match &report.what {
        &Happened::Step { loss, learning_rate, gradient_norm, tokens_per_second } => {
            Event::Step(proto::TrainingStep { restart, step, loss, learning_rate, gradient_norm, tokens_per_second })
        }
        &Happened::Evaluation { loss, token_accuracy, exact_match } => {
            Event::Evaluation(proto::TrainingEvaluation { restart, step, loss, token_accuracy, exact_match })
        }
        Happened::Diverged { reason } => {
            Event::Divergence(proto::TrainingDivergence { restart, step, reason: reason.clone() })
        }
    }
}
