//! From a job's data to the plan of its run.
use super::{Inner, Spec};
use crate::adapter::{InputRow, TaskCard};
use crate::error::{Context, Error, Kind, Result};
use crate::training::dataset::{Encoder, Record};
use crate::training::init;
use crate::training::job::Placement;
use crate::training::journal::MOST_BYTES;
use crate::training::run::{Plan, shuffle};
use crate::training::settings::{Init, Recompute, Settings, TrainMethod};
use crate::training::step::Example;
use std::collections::HashSet;

impl Inner {
    /// Encodes the data, and parts it. Also: how many records are too long.
    pub(super) fn plan(&self, spec: &Spec, data: &[Record]) -> Result<(Plan, usize)> {
        let (settings, base) = (&spec.settings, &self.base);
        let card = if spec.card.is_empty() { TaskCard::default() } else { TaskCard::parse(&spec.card)? };
        let encoder = Encoder::new(settings, card, &base.shape, &base.tokenizer, &base.chat_template, base.eos)?;
        let (train, own) = data.split_at(data.len().saturating_sub(spec.evaluation_lines));
        let mut all = encoder.encode(train)?;
        let mut too_long = all.too_long;
        let mut evaluation = Vec::new();
        if !own.is_empty() {
            let own = encoder.encode(own)?;
            too_long += own.too_long;
            evaluation = own.examples;
        }
        let apart = (all.examples.len() as f64 * settings.evaluation_share).round() as usize;
        if settings.evaluation_share > 0.0 && (apart == 0 || apart >= all.examples.len()) {
            let rule = format!("of {} examples leaves none on one side", all.examples.len());
            return Err(Error::invalid("settings.evaluation_share", settings.evaluation_share, rule));
        }
        if apart > 0 {
            let mut order: Vec<usize> = (0..all.examples.len()).collect();
            shuffle(&mut order, settings.seed ^ 0x0073_706c_6974);
            let chosen: HashSet<usize> = order[..apart].iter().copied().collect();
            let (mut rest, mut i) = (Vec::new(), 0..);
            for example in all.examples.drain(..) {
                let to = if chosen.contains(&i.next().unwrap_or(0)) { &mut evaluation } else { &mut rest };
                to.push(example);
            }
            all.examples = rest;
        }
        if settings.early_stopping_patience > 0 && evaluation.is_empty() {
            let rule = "but there is nothing to evaluate on: set `settings.evaluation_share`, or give `evaluation`";
            return Err(Error::invalid("settings.early_stopping_patience", settings.early_stopping_patience, rule));
        }
        let tasks = if settings.method == TrainMethod::MultitaskPromptTuning { settings.num_tasks.max(1) } else { 1 };
        if let Some(bad) = all.examples.iter().chain(&evaluation).find(|e| e.task >= tasks) {
            return Err(Error::invalid("task_id", bad.task, format!("the job has {tasks} tasks, counted from 0")));
        }
        let placement = match () {
            () if settings.method.method().is_kv() => Placement::Stored,
            () if encoder.placement.among_rows => Placement::AmongRows,
            () => Placement::VirtualTokens,
        };
        let ids = |rows: &[InputRow]| -> Vec<u32> {
            rows.iter().filter_map(|r| if let InputRow::Token(id) = r { Some(*id) } else { None }).collect()
        };
        // Text after stored rows is part of each sequence already.
        let after = if placement == Placement::Stored { Vec::new() } else { ids(&encoder.placement.after) };
        let labels = if settings.classification_head { encoder.card().labels.len() } else { 0 };
        let init_text = self.init_text(settings, &all.examples, &ids)?;
        let plan = Plan {
            settings: settings.clone(),
            placement,
            before: ids(&encoder.placement.before),
            after,
            init_text,
            labels,
            train: all.examples,
            evaluation,
        };
        Ok((plan, too_long))
    }

    /// Tokens of [`Init::Text`]: the given text, or the first examples, inputs and targets as they are.
    fn init_text(
        &self,
        settings: &Settings,
        examples: &[Example],
        ids: &dyn Fn(&[InputRow]) -> Vec<u32>,
    ) -> Result<Vec<u32>> {
        if settings.init != Init::Text {
            return Ok(Vec::new());
        }
        if settings.init_text.is_empty() {
            let n = settings.num_virtual_tokens;
            return Ok(examples.iter().flat_map(|e| ids(&e.rows)).take(n).collect());
        }
        // K and V of a text are those of a text with its BOS; as virtual tokens the words alone count.
        self.base.tokenizer.encode(&settings.init_text, settings.method == TrainMethod::PrefixTuning)
    }

    /// Refuses weights that memory could not hold.
    pub(super) fn check_weights(&self, plan: &Plan) -> Result<()> {
        // Each with its gradient and two moments, the best so far, and a checkpoint.
        let weights = init::size(&self.base.info, &plan.settings, plan.labels).saturating_mul(size_of::<f32>());
        let bytes = weights.saturating_mul(6);
        within(bytes, self.limits.weight_bytes, |mib, limit| {
            format!(
                "the weights that `settings` ask for take {mib} MiB with what the optimiser keeps, at most {limit} \
                 (training.weights_mib): look at `num_virtual_tokens`, `encoder_hidden_size`, `num_tasks`, `num_ranks` and the labels"
            )
        })?;
        // With two moments, and the best of this start and of all.
        within(weights.saturating_mul(5), MOST_BYTES, |mib, limit| {
            format!(
                "a checkpoint of the weights that `settings` ask for takes {mib} MiB, at most {limit} can be written: look at \
                 `num_virtual_tokens`, `encoder_hidden_size`, `num_tasks`, `num_ranks` and the labels"
            )
        })
    }

    /// Refuses a batch that memory could not hold even with every layer computed again, and one that wants none computed
    /// again where that would not fit.
    pub(super) fn check_memory(&self, plan: &Plan) -> Result<()> {
        let size = plan.settings.batch_size;
        // Of `size` examples at most, each of which comes up to so many times.
        let longest = |examples: &[Example], times: usize| -> usize {
            let mut lengths: Vec<usize> = examples.iter().map(|e| e.rows.len()).collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.into_iter().flat_map(|length| std::iter::repeat_n(length, times)).take(size).sum()
        };
        // A batch goes on where the last one ended, into the next epochs: one that is drawn may begin with what the last one ended with.
        let n = plan.train.len().max(1);
        let drawn = size > 1 && !plan.settings.keep_order;
        let trained = longest(&plan.train, if drawn { (size - 2) / n + 2 } else { size.div_ceil(n) });
        // Each task's virtual tokens and text run once in a batch, and each sequence has a share in the gradient of their K and V.
        let tasks = plan.settings.num_tasks.clamp(1, size);
        let leading = plan.leading_rows().saturating_mul(tasks);
        let info = &self.base.info;
        let share = plan.prefix_rows().saturating_mul(2 * info.num_kv_heads * info.head_dim * size_of::<f32>());
        let rows = trained.max(longest(&plan.evaluation, 1)).saturating_add(leading);
        let layer = |rows: usize| rows.saturating_mul(self.base.row_bytes);
        let shares = share.saturating_mul(size);
        within(layer(rows).saturating_add(shares), self.limits.batch_bytes, |mib, limit| {
            format!(
                "`settings.batch_size` is {size}: the longest examples and {leading} rows in front of them make {rows} rows, a layer of \
                 which takes {mib} MiB, {} of them for gradients of the prefix, at most {limit} (training.batch_mib); take a smaller \
                 one and `accumulation_steps`, or fewer `num_virtual_tokens`",
                shares >> 20
            )
        })?;
        if plan.settings.recompute != Recompute::Never {
            return Ok(());
        }
        let rows = trained.saturating_add(leading);
        within(layer(rows).saturating_mul(self.base.info.num_layers), self.limits.activation_bytes, |mib, limit| {
            format!(
                "`settings.recomputation` is NEVER: what all layers keep of {rows} rows takes {mib} MiB, at most {limit} \
                 (training.activation_mib); take AUTO, or a smaller `batch_size` and `accumulation_steps`"
            )
        })
    }
}

/// Refuses `bytes` beyond `most`; `text` says it of both in MiB.
fn within(bytes: usize, most: usize, text: impl FnOnce(usize, usize) -> String) -> Result<()> {
    if bytes <= most { Ok(()) } else { Err(Error::exhausted(text(bytes >> 20, most >> 20), None)) }
}

/// The card with the data's labels, where a head is trained and the card names none.
pub fn with_labels(card: String, settings: &Settings, data: &[Record]) -> Result<String> {
    let parsed = if card.is_empty() { TaskCard::default() } else { TaskCard::parse(&card)? };
    if !settings.classification_head || !parsed.labels.is_empty() {
        return Ok(card);
    }
    let mut labels: Vec<&str> = data.iter().filter_map(|r| r.answers().first().copied()).collect();
    labels.sort_unstable();
    labels.dedup();
    let mut table: toml::Table = card.parse().or_kind(Kind::InvalidArgument, "task.toml")?;
    let labels = labels.into_iter().map(|l| toml::Value::from(l.to_owned())).collect();
    table.insert("labels".into(), toml::Value::Array(labels));
    toml::to_string(&table).or_kind(Kind::Internal, "task.toml")
}
