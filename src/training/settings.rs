//! What a training job may be told, checked whole before anything is stored.
use super::optimizer::{AdamWConfig, Schedule};
use crate::adapter::Method;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How an adapter is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainMethod {
    /// K and V of every layer: prefix-tuning; without reparametrisation also called P-tuning v2.
    #[default]
    PrefixTuning,
    /// Virtual tokens at the input.
    PromptTuning,
    /// Virtual tokens made by a small network.
    PTuning,
    /// Virtual tokens shared by tasks that scale them.
    MultitaskPromptTuning,
}

impl TrainMethod {
    /// What PEFT calls the result.
    pub fn method(self) -> Method {
        match self {
            TrainMethod::PrefixTuning => Method::PrefixTuning,
            TrainMethod::PromptTuning => Method::PromptTuning,
            TrainMethod::PTuning => Method::PTuning,
            TrainMethod::MultitaskPromptTuning => Method::MultitaskPromptTuning,
        }
    }
}

/// What the weights are before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The text's token embeddings; for prefix-tuning its K and V in every layer.
    #[default]
    Text,
    /// Embeddings of tokens drawn from the vocabulary; for prefix-tuning their K and V.
    SampledVocabulary,
    /// Random numbers.
    Random,
}

/// The network that makes the rows; gone once the adapter is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reparametrisation {
    /// None; P-tuning has the MLP then.
    #[default]
    Default,
    /// Three layers with ReLU: P-tuning.
    Mlp,
    /// A bidirectional LSTM and two layers: P-tuning.
    Lstm,
    /// Two layers with tanh: prefix-tuning.
    Projection,
}

/// What becomes of activations between the way forward and the way back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Kept for as many layers as fit.
    #[default]
    Auto,
    /// Kept for all layers: refused where they do not fit.
    Never,
    /// Computed again in every layer.
    Always,
}

/// Settings of a job. Zero stands for the default where 0 means nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The method.
    pub method: TrainMethod,
    /// Rows of the prompt or prefix.
    pub num_virtual_tokens: usize,
    /// What they start from.
    pub init: Init,
    /// The text of [`Init::Text`]; empty: the first training examples.
    pub init_text: String,
    /// The network that makes the rows.
    pub reparametrisation: Reparametrisation,
    /// Its width; 0: that of a row (prefix-tuning: of a layer's keys).
    pub encoder_hidden_size: usize,
    /// Layers of an LSTM.
    pub encoder_num_layers: usize,
    /// Tasks of a multitask prompt; 0: as the data has.
    pub num_tasks: usize,
    /// Rank of its scaling matrices.
    pub num_ranks: usize,
    /// Train a head that classifies, instead of words.
    pub classification_head: bool,
    /// Peak learning rate; 0: the method's own.
    pub learning_rate: f64,
    /// Its way over the steps.
    pub schedule: Schedule,
    /// Steps from rate 0 to the peak.
    pub warmup_steps: usize,
    /// AdamW's.
    pub weight_decay: f64,
    /// Gradients are clipped to this norm; 0: they are not.
    pub max_gradient_norm: f64,
    /// Examples of one forward and backward.
    pub batch_size: usize,
    /// Of which so many make a step.
    pub accumulation_steps: usize,
    /// Steps; 0: as `epochs` says.
    pub max_steps: usize,
    /// Times that every example is seen.
    pub epochs: f64,
    /// Longest example, prefix not counted; 0: what the context holds.
    pub max_length: usize,
    /// Of weights, order, split.
    pub seed: u64,
    /// Share of the examples that is kept for evaluation.
    pub evaluation_share: f64,
    /// Steps between evaluations; 0: at the end only.
    pub evaluation_interval: usize,
    /// Evaluations without a better loss before the end; 0: none ends it.
    pub early_stopping_patience: usize,
    /// Whether the tokens of the input are to be predicted too.
    pub loss_on_input: bool,
    /// Runs from other seeds; the best one is the result.
    pub restarts: usize,
    /// What becomes of activations.
    pub recompute: Recompute,
    /// What the model is to write for a target; `{{ target }}` once.
    pub target_template: String,
    /// Whether the end-of-sequence token follows; none: unless the target's template ends with a stop sequence of the card.
    pub append_eos: Option<bool>,
    /// Take the examples in their order, not in one that each epoch draws.
    pub keep_order: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            method: TrainMethod::default(),
            num_virtual_tokens: 20,
            init: Init::default(),
            init_text: String::new(),
            reparametrisation: Reparametrisation::default(),
            encoder_hidden_size: 0,
            encoder_num_layers: 2,
            num_tasks: 0,
            num_ranks: 1,
            classification_head: false,
            learning_rate: 0.0,
            schedule: Schedule::Linear,
            warmup_steps: 0,
            weight_decay: 0.0,
            max_gradient_norm: 1.0,
            batch_size: 16,
            accumulation_steps: 1,
            max_steps: 0,
            epochs: 3.0,
            max_length: 0,
            seed: 0,
            evaluation_share: 0.0,
            evaluation_interval: 0,
            early_stopping_patience: 0,
            loss_on_input: false,
            restarts: 1,
            recompute: Recompute::default(),
            target_template: TARGET.into(),
            append_eos: None,
            keep_order: false,
        }
    }
}

/// Tasks of a multitask prompt.
pub const MOST_TASKS: usize = 10_000;

/// Where the target stands in its template.
pub const TARGET: &str = "{{ target }}";

/// Bytes of `init_text` and of `target_template`: they stay in memory with each job.
const MOST_TEXT: usize = 64 << 10;
/// Bounds that keep one job from taking the machine.
const MAX_BATCH: usize = 4096;
const MAX_STEPS: usize = 10_000_000;

impl Settings {
    /// Checks every field, and sets those that stand for a default.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field as the API has it, its value and the rule.
    pub fn checked(mut self, max_model_len: usize) -> Result<Self> {
        let within = |field: &'static str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(field, value, format!("must be from {low} to {high}")))
        };
        let real = |field: &'static str, value: f64, low: f64, high: f64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(field, value, format!("must be from {low} to {high}")))
        };
        within("settings.num_virtual_tokens", self.num_virtual_tokens, 1, max_model_len.saturating_sub(2).max(1))?;
        within("settings.encoder_hidden_size", self.encoder_hidden_size, 0, 65_536)?;
        within("settings.encoder_num_layers", self.encoder_num_layers, 1, 8)?;
        within("settings.num_tasks", self.num_tasks, 0, MOST_TASKS)?;
        within("settings.num_ranks", self.num_ranks, 1, 1024)?;
        real("settings.learning_rate", self.learning_rate, 0.0, 1000.0)?;
        real("settings.weight_decay", self.weight_decay, 0.0, 10.0)?;
        real("settings.max_gradient_norm", self.max_gradient_norm, 0.0, 1e9)?;
        within("settings.batch_size", self.batch_size, 1, MAX_BATCH)?;
        within("settings.accumulation_steps", self.accumulation_steps, 1, MAX_BATCH)?;
        within("settings.max_steps", self.max_steps, 0, MAX_STEPS)?;
        real("settings.epochs", self.epochs, if self.max_steps == 0 { 1e-6 } else { 0.0 }, 1e6)?;
        within("settings.max_length", self.max_length, 0, max_model_len)?;
        real("settings.evaluation_share", self.evaluation_share, 0.0, 0.9)?;
        within("settings.restarts", self.restarts, 1, 100)?;
        self.check_method()?;
        if self.early_stopping_patience > 0 && self.evaluation_interval == 0 {
            let rule = "but `settings.evaluation_interval` is 0: there is one evaluation, at the end";
            return Err(Error::invalid("settings.early_stopping_patience", self.early_stopping_patience, rule));
        }
        for (field, text) in
            [("settings.init_text", &self.init_text), ("settings.target_template", &self.target_template)]
        {
            if text.len() > MOST_TEXT {
                return Err(Error::invalid(
                    field,
                    format!("{} bytes", text.len()),
                    format!("must have at most {MOST_TEXT}"),
                ));
            }
        }
        if self.restarts > 1 && self.init == Init::Text && self.keep_order && !self.classification_head && !self.draws()
        {
            let rule = "but with `init` TEXT and `keep_order` nothing is drawn: all would be the same";
            return Err(Error::invalid("settings.restarts", self.restarts, rule));
        }
        if self.target_template.matches(TARGET).count() != 1 {
            let rule = format!("must hold {TARGET} once");
            return Err(Error::invalid("settings.target_template", format!("{:?}", self.target_template), rule));
        }
        if self.learning_rate == 0.0 {
            self.learning_rate = match self.method {
                TrainMethod::PTuning => 5e-3,
                TrainMethod::PromptTuning | TrainMethod::MultitaskPromptTuning => 3e-2,
                TrainMethod::PrefixTuning if self.reparametrisation == Reparametrisation::Projection => 5e-3,
                TrainMethod::PrefixTuning => 1e-2,
            };
        }
        Ok(self)
    }

    /// Whether weights beside the virtual tokens start from random numbers.
    fn draws(&self) -> bool {
        matches!(self.method, TrainMethod::PTuning | TrainMethod::MultitaskPromptTuning)
            || self.reparametrisation == Reparametrisation::Projection
    }

    fn check_method(&self) -> Result<()> {
        let fits = match self.reparametrisation {
            Reparametrisation::Default => true,
            Reparametrisation::Mlp | Reparametrisation::Lstm => self.method == TrainMethod::PTuning,
            Reparametrisation::Projection => self.method == TrainMethod::PrefixTuning,
        };
        if !fits {
            let (value, method) = (format!("{:?}", self.reparametrisation), self.method.method().as_str());
            let rule =
                format!("but the method is {method}; MLP and LSTM are P_TUNING's, PROJECTION is PREFIX_TUNING's");
            return Err(Error::invalid("settings.reparametrisation", value, rule));
        }
        if self.num_tasks > 0 && self.method != TrainMethod::MultitaskPromptTuning {
            let rule = "but only MULTITASK_PROMPT_TUNING has tasks";
            return Err(Error::invalid("settings.num_tasks", self.num_tasks, rule));
        }
        let usual = Settings::default();
        let network = self.method == TrainMethod::PTuning || self.reparametrisation == Reparametrisation::Projection;
        if self.encoder_hidden_size != usual.encoder_hidden_size && !network {
            let rule = "but no network makes the rows";
            return Err(Error::invalid("settings.encoder_hidden_size", self.encoder_hidden_size, rule));
        }
        if self.encoder_num_layers != usual.encoder_num_layers && self.reparametrisation != Reparametrisation::Lstm {
            let rule = "but no LSTM makes the rows";
            return Err(Error::invalid("settings.encoder_num_layers", self.encoder_num_layers, rule));
        }
        if self.num_ranks != usual.num_ranks && self.method != TrainMethod::MultitaskPromptTuning {
            let rule = "but only MULTITASK_PROMPT_TUNING has tasks";
            return Err(Error::invalid("settings.num_ranks", self.num_ranks, rule));
        }
        if self.reparametrisation == Reparametrisation::Projection && self.init != Init::Random {
            let rule = "but a PROJECTION starts from random numbers: leave it out, or say RANDOM";
            return Err(Error::invalid("settings.init", format!("{:?}", self.init), rule));
        }
        if !self.init_text.is_empty() && self.init != Init::Text {
            let text = format!("{:?}", self.init_text);
            return Err(Error::invalid("settings.init_text", text, "but `settings.init` is not TEXT"));
        }
        Ok(())
    }

    /// The optimiser's constants.
    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            weight_decay: self.weight_decay,
            max_gradient_norm: self.max_gradient_norm,
            ..AdamWConfig::default()
        }
    }

    /// Examples of a step.
    pub fn step_size(&self) -> usize {
        self.batch_size * self.accumulation_steps
    }

    /// Steps over `examples`.
    pub fn steps(&self, examples: usize) -> usize {
        let batch = self.step_size();
        match self.max_steps {
            0 => ((self.epochs * examples as f64 / batch as f64).ceil() as usize).clamp(1, MAX_STEPS),
            steps => steps,
        }
    }
}
