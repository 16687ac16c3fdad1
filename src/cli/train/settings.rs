//! The options of `prefixd train` that are settings of the job.
use crate::rpc::proto;
use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
#[command(next_help_heading = "Training")]
pub(crate) struct Settings {
    /// How.
    #[arg(long, value_enum, default_value_t)]
    method: Method,
    /// Rows of the prompt or prefix [default: 20].
    #[arg(long, value_name = "N")]
    virtual_tokens: Option<u32>,
    /// What they start from [default: text; random for a projection].
    #[arg(long, value_enum)]
    init: Option<Init>,
    /// The text of `--init text` [default: the first examples].
    #[arg(long, value_name = "TEXT")]
    init_text: Option<String>,
    /// The network that makes the rows while they are trained.
    #[arg(long, value_enum)]
    reparametrisation: Option<Reparametrisation>,
    /// Its width [default: that of a row].
    #[arg(long, value_name = "N")]
    encoder_hidden_size: Option<u32>,
    /// Layers of an LSTM.
    #[arg(long, value_name = "N")]
    encoder_num_layers: Option<u32>,
    /// Train a head that classifies.
    #[arg(long)]
    head: bool,
    /// Tasks of a multitask prompt [default: as many as the data has].
    #[arg(long, value_name = "N")]
    tasks: Option<u32>,
    /// Rank of a multitask prompt's matrices [default: 1].
    #[arg(long, value_name = "N")]
    ranks: Option<u32>,
    /// Peak learning rate [default: the method's own].
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Its way over the steps.
    #[arg(long, value_enum, default_value_t)]
    schedule: Schedule,
    /// Steps from rate 0 to the peak [default: 0].
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u32>,
    /// AdamW's weight decay [default: 0].
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// Norm that gradients are clipped to; 0: not at all [default: 1].
    #[arg(long, value_name = "X")]
    max_gradient_norm: Option<f64>,
    /// Examples of one batch [default: 16].
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Batches of one step [default: 1].
    #[arg(long, value_name = "N")]
    accumulation_steps: Option<u32>,
    /// Steps, instead of epochs.
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<u32>,
    /// Times that each example is seen [default: 3].
    #[arg(long, value_name = "X")]
    epochs: Option<f64>,
    /// Longest example in tokens [default: what the context holds].
    #[arg(long, value_name = "N")]
    max_length: Option<u32>,
    /// Of initial weights, order and split [default: 0].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Share of the examples that is kept for evaluation [default: 0].
    #[arg(long, value_name = "SHARE")]
    eval_share: Option<f64>,
    /// Steps between evaluations [default: one at the end].
    #[arg(long, value_name = "N")]
    eval_interval: Option<u32>,
    /// Evaluations without gain that end it [default: none do].
    #[arg(long, value_name = "N")]
    patience: Option<u32>,
    /// Learn the input too.
    #[arg(long)]
    loss_on_input: bool,
    /// Runs from other seeds, of which the best counts [default: 1].
    #[arg(long, value_name = "N")]
    restarts: Option<u32>,
    /// What becomes of activations.
    #[arg(long, value_enum, default_value_t)]
    recompute: Recompute,
    /// What the model writes, around `{{ target }}`.
    #[arg(long, value_name = "TEXT")]
    pub(super) target_template: Option<String>,
    /// Whether the end-of-sequence token follows.
    #[arg(long, value_name = "BOOL")]
    append_eos: Option<bool>,
    /// Take the examples in their order, epoch for epoch.
    #[arg(long)]
    keep_order: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Method {
    /// K and V of every layer (P-tuning v2).
    #[default]
    Prefix,
    /// Virtual tokens.
    Prompt,
    /// Virtual tokens made by a network.
    PTuning,
    /// Virtual tokens that tasks share.
    Multitask,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Init {
    /// A real text.
    Text,
    /// Tokens of the vocabulary.
    Vocabulary,
    /// Random numbers.
    Random,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Reparametrisation {
    /// Three layers (P-tuning).
    Mlp,
    /// An LSTM (P-tuning).
    Lstm,
    /// Two layers (prefix-tuning).
    Projection,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Schedule {
    /// Down in a line.
    #[default]
    Linear,
    /// Down in half a cosine.
    Cosine,
    /// Not down.
    Constant,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Recompute {
    /// Kept as far as memory goes.
    #[default]
    Auto,
    /// Kept; refused where they do not fit.
    Never,
    /// Computed again.
    Always,
}

impl From<Settings> for proto::TrainingSettings {
    fn from(s: Settings) -> Self {
        proto::TrainingSettings {
            method: match s.method {
                Method::Prefix => proto::TrainingMethod::PrefixTuning,
                Method::Prompt => proto::TrainingMethod::PromptTuning,
                Method::PTuning => proto::TrainingMethod::PTuning,
                Method::Multitask => proto::TrainingMethod::MultitaskPromptTuning,
            }
            .into(),
            num_virtual_tokens: s.virtual_tokens,
            init: match s.init {
                None => proto::PromptInit::Unspecified,
                Some(Init::Text) => proto::PromptInit::Text,
                Some(Init::Vocabulary) => proto::PromptInit::SampledVocabulary,
                Some(Init::Random) => proto::PromptInit::Random,
            }
            .into(),
            init_text: s.init_text.unwrap_or_default(),
            reparametrisation: match s.reparametrisation {
                None => proto::PromptReparametrisation::Unspecified,
                Some(Reparametrisation::Mlp) => proto::PromptReparametrisation::Mlp,
                Some(Reparametrisation::Lstm) => proto::PromptReparametrisation::Lstm,
                Some(Reparametrisation::Projection) => proto::PromptReparametrisation::Projection,
            }
            .into(),
            encoder_hidden_size: s.encoder_hidden_size,
            encoder_num_layers: s.encoder_num_layers,
            num_tasks: s.tasks,
            num_ranks: s.ranks,
            classification_head: s.head,
            learning_rate: s.lr,
            schedule: match s.schedule {
                Schedule::Linear => proto::LearningRateSchedule::Linear,
                Schedule::Cosine => proto::LearningRateSchedule::Cosine,
                Schedule::Constant => proto::LearningRateSchedule::Constant,
            }
            .into(),
            warmup_steps: s.warmup_steps,
            weight_decay: s.weight_decay,
            max_gradient_norm: s.max_gradient_norm,
            batch_size: s.batch_size,
            accumulation_steps: s.accumulation_steps,
            max_steps: s.steps,
            epochs: s.epochs,
            max_length: s.max_length,
            seed: s.seed,
            evaluation_share: s.eval_share,
            evaluation_interval: s.eval_interval,
            early_stopping_patience: s.patience,
            loss_on_input: s.loss_on_input,
            restarts: s.restarts,
            recomputation: match s.recompute {
                Recompute::Auto => proto::Recomputation::Auto,
                Recompute::Never => proto::Recomputation::Never,
                Recompute::Always => proto::Recomputation::Always,
            }
            .into(),
            // What the shell cannot easily say.
            target_template: s.target_template.map(|t| super::evaluate::unescaped(&t)),
            append_eos: s.append_eos,
            keep_order: s.keep_order,
        }
    }
}
