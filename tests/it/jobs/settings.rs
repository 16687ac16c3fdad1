//! What settings do: judged by what serving says of the adapter, and by other jobs.
use super::*;
use crate::chat;
use prefixd::rpc::proto::{LearningRateSchedule, PromptInit, TrainingMethod, continuation, score_request};

/// Words, no labels.
const WORDS: &str =
    "template = \"{{ input }}\\n=>\"\nadd_special_tokens = false\n[stopping]\nstop_sequences = [\"\\n\"]\n";

type Change = fn(&mut proto::TrainingSettings);

/// A job on `data` whose first step has rate 0: its loss is that of what it starts from.
fn still(adapter_id: &str, data: Vec<proto::TrainingExample>, change: Change) -> proto::CreateTrainingJobRequest {
    let mut request = proto::CreateTrainingJobRequest { data: inline(data), ..job(adapter_id, 1) };
    request.task_card = WORDS.into();
    let settings = request.settings.as_mut().unwrap();
    (settings.warmup_steps, settings.batch_size) = (Some(1), Some(1));
    change(settings);
    request
}

/// Trains, and returns what was reported.
async fn trained(
    client: &mut Client,
    request: proto::CreateTrainingJobRequest,
) -> (Vec<proto::TrainingStep>, Vec<proto::TrainingEvaluation>, proto::TrainingJob) {
    let id = create(client, request).await.unwrap();
    let (steps, evaluations, job) = follow(client, &id).await;
    assert_eq!(job.state(), TrainingJobState::Succeeded, "{}", job.error);
    (steps, evaluations, job)
}

async fn digest(served: &Served, adapter_id: &str) -> String {
    let get = proto::GetAdapterRequest { adapter_id: adapter_id.into() };
    served.adapters().await.get_adapter(get).await.unwrap().into_inner().adapter.unwrap().digest
}

/// The tokens of a prompt, as the adapter's template words it.
async fn tokens(served: &Served, adapter_id: &str, prompt: &str) -> Vec<u32> {
    let request = proto::TokenizeRequest { adapter_id: adapter_id.into(), prompt: prompt.into(), ..Default::default() };
    served.inference().await.tokenize(request).await.unwrap().into_inner().token_ids
}

/// What serving says of a continuation: its tokens, and the mean of their negative log-probabilities.
async fn score(
    served: &Served,
    adapter_id: &str,
    input: score_request::Input,
    continuation: continuation::Content,
) -> (Vec<u32>, f64) {
    let request = proto::ScoreRequest {
        adapter_id: adapter_id.into(),
        input: Some(input),
        continuations: vec![proto::Continuation { content: Some(continuation) }],
        ..Default::default()
    };
    let score = served.inference().await.score(request).await.unwrap().into_inner().scores.remove(0);
    let ids: Vec<u32> = score.tokens.iter().map(|t| t.token_id).collect();
    let loss = -score.logprob / ids.len() as f64;
    (ids, loss)
}

fn ids(ids: &[u32]) -> proto::TokenIds {
    proto::TokenIds { ids: ids.to_vec() }
}

fn eos() -> u32 {
    let text = std::fs::read_to_string("models/demo/generation_config.json").unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap()["eos_token_id"].as_u64().unwrap() as u32
}

#[track_caller]
fn near(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{what}: {a} {b}");
}

/// Which tokens count, by `target_template`, `append_eos` and `loss_on_input`.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_what_serving_says_of_its_targets() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    // Of the text "positive\n": whether the line's end is in it, whether EOS follows, whether the input counts.
    let cases: [(&str, Change, bool, bool, bool); 5] = [
        ("ends-with-a-stop", |_| (), true, false, false),
        ("eos", |s| s.append_eos = Some(true), true, true, false),
        ("bare", |s| s.target_template = None, false, true, false),
        ("neither", |s| (s.target_template, s.append_eos) = (None, Some(false)), false, false, false),
        ("input", |s| s.loss_on_input = true, true, false, true),
    ];
    for (name, change, line, end, input) in cases {
        let example = examples(1).remove(0);
        let (steps, _, _) = trained(&mut client, still(name, vec![example.clone()], change)).await;
        let mut before = tokens(&served, name, &example.input).await;
        let text = continuation::Content::Text(if line { "positive\n" } else { "positive" }.into());
        let (mut wanted, _) = score(&served, name, score_request::Input::TokenIds(ids(&before)), text).await;
        wanted.extend(end.then(eos));
        if input {
            // The first token is what a stored prefix never predicts.
            let rest = before.split_off(1);
            wanted = rest.into_iter().chain(wanted).collect();
        }
        let wanted = continuation::Content::TokenIds(ids(&wanted));
        let (_, loss) = score(&served, name, score_request::Input::TokenIds(ids(&before)), wanted).await;
        near(steps[0].loss, loss, name);
    }
}

/// A conversation is worded by the base's chat template; its last message is the target.
#[tokio::test(flavor = "multi_thread")]
async fn conversations_are_learnt_from() {
    let model = chat::model();
    let served = chat::served(&model).await;
    let mut client = client(&served).await;
    let talk = |answer: &str| {
        let messages = chat::talk(&[("system", "Be fair."), ("user", "the soup was tasty"), ("assistant", answer)]);
        proto::TrainingExample { messages: Some(messages), ..Default::default() }
    };
    let mut request = still("talk", vec![talk(" positive")], |s| s.target_template = None);
    request.task_card = String::new();
    let before = trained(&mut client, request.clone()).await.0[0].loss;
    let asked =
        || score_request::Input::Messages(chat::talk(&[("system", "Be fair."), ("user", "the soup was tasty")]));
    let (mut wanted, _) = score(&served, "talk", asked(), continuation::Content::Text(" positive".into())).await;
    wanted.push(eos());
    let wanted = || continuation::Content::TokenIds(ids(&wanted));
    near(before, score(&served, "talk", asked(), wanted()).await.1, "the loss");

    request.replace = true;
    request.settings.as_mut().unwrap().max_steps = Some(150);
    let after = trained(&mut client, request).await.0.pop().unwrap().loss;
    let (_, serves) = score(&served, "talk", asked(), wanted()).await;
    assert!(after < 0.5 * before && serves < 0.5 * before, "{before} {after} {serves}");
    let evaluate = proto::EvaluateRequest {
        adapter_id: "talk".into(),
        data: inline(vec![talk(" positive")]),
        ..Default::default()
    };
    let measured = client.evaluate(evaluate).await.unwrap().into_inner();
    let (with, bare) = (measured.scores.unwrap(), measured.base_scores.unwrap());
    assert!(with.perplexity.unwrap() < bare.perplexity.unwrap(), "{with:?} {bare:?}");
}

/// Two batches of four are one of eight: the same losses and norms, but for the order of the sums.
#[tokio::test(flavor = "multi_thread")]
async fn accumulated_batches_are_one_large_one() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut runs = Vec::new();
    for (batch, accumulated) in [(8, 1), (4, 2), (1, 8)] {
        let mut request = job(&format!("batch-{batch}"), 6);
        let settings = request.settings.as_mut().unwrap();
        (settings.batch_size, settings.accumulation_steps) = (Some(batch), Some(accumulated));
        runs.push(trained(&mut client, request).await.0);
    }
    for run in &runs[1..] {
        assert_eq!(run.len(), 6);
        for (large, parts) in runs[0].iter().zip(run) {
            near(parts.loss, large.loss, "loss");
            assert!(
                (parts.gradient_norm - large.gradient_norm).abs() < 1e-3 * large.gradient_norm,
                "{parts:?} {large:?}"
            );
        }
    }
}

/// At a rate that moves nothing, a step's loss says which example it took.
#[tokio::test(flavor = "multi_thread")]
async fn examples_come_as_they_are_or_in_an_order_that_each_epoch_draws() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut orders = Vec::new();
    for (name, keep_order) in [("kept", true), ("drawn", false)] {
        let mut request = job(name, 24);
        let settings = request.settings.as_mut().unwrap();
        (settings.batch_size, settings.learning_rate, settings.keep_order) = (Some(1), Some(1e-12), keep_order);
        request.data = inline(examples(8));
        let losses: Vec<f64> = trained(&mut client, request).await.0.iter().map(|s| s.loss).collect();
        orders.push(losses);
    }
    let (kept, drawn) = (&orders[0], &orders[1]);
    for (i, example) in examples(8).iter().enumerate() {
        let before = tokens(&served, "kept", &example.input).await;
        // A label is written as its verbalizer.
        let text = continuation::Content::Text(format!(" {}\n", example.targets[0]));
        let (_, loss) = score(&served, "kept", score_request::Input::TokenIds(ids(&before)), text).await;
        for epoch in 0..3 {
            near(kept[8 * epoch + i], loss, &example.input);
        }
    }
    let sorted = |epoch: &[f64]| {
        let mut all = epoch.to_vec();
        all.sort_by(f64::total_cmp);
        all
    };
    let first = sorted(&kept[..8]);
    for epoch in drawn.chunks(8) {
        sorted(epoch).iter().zip(&first).for_each(|(a, b)| near(*a, *b, "an epoch has each example once"));
    }
    let differ = |a: &[f64], b: &[f64]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-3);
    assert!(differ(&drawn[..8], &kept[..8]) && differ(&drawn[..8], &drawn[8..16]), "{drawn:?}");
}

/// Evaluated on labels that contradict the data, it gets worse as it learns them.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_gets_no_better_ends_early_with_its_best_weights() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let request = |name: &str, steps: u32, patience: u32| {
        let mut request = job(name, steps);
        let mut contrary = examples(8);
        for example in &mut contrary {
            example.targets = vec![if example.targets[0] == "positive" { "negative" } else { "positive" }.into()];
        }
        request.evaluation_data = inline(contrary);
        let settings = request.settings.as_mut().unwrap();
        settings.schedule = LearningRateSchedule::Constant.into();
        (settings.evaluation_interval, settings.early_stopping_patience) = (Some(2), Some(patience));
        request
    };
    let (steps, evaluations, job) = trained(&mut client, request("early", 400, 3)).await;
    let best = evaluations.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap();
    assert!(steps.len() < 400 && job.step as usize == steps.len(), "it never ended: {}", steps.len());
    assert_eq!(steps.len() as u32, best.step + 2 * 3, "{evaluations:?}");
    assert_eq!(evaluations.last().unwrap().step, best.step + 2 * 3);
    // A job that stops there has the same weights, and the one that went on has no later ones.
    trained(&mut client, request("best", best.step, 0)).await;
    assert_eq!(digest(&served, "early").await, digest(&served, "best").await);
    trained(&mut client, request("later", best.step + 6, 0)).await;
    assert_eq!(digest(&served, "later").await, digest(&served, "best").await);
}

/// The result is that of the seed whose evaluation was best.
#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_several_restarts_is_the_result() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let request = |name: &str, seed: u64, restarts: u32| {
        let mut request = job(name, 6);
        request.evaluation_data = inline(examples(9));
        let settings = request.settings.as_mut().unwrap();
        (settings.method, settings.init) = (TrainingMethod::PromptTuning.into(), PromptInit::SampledVocabulary.into());
        (settings.seed, settings.restarts) = (Some(seed), Some(restarts));
        request
    };
    let (steps, evaluations, job) = trained(&mut client, request("three", 7, 3)).await;
    assert_eq!((steps.len(), evaluations.len(), job.restart), (18, 3, 2));
    let mut losses = Vec::new();
    for seed in [7, 8, 9] {
        let alone = trained(&mut client, request(&format!("seed-{seed}"), seed, 1)).await.1;
        losses.push(alone[0].loss);
    }
    assert_eq!(losses, evaluations.iter().map(|e| e.loss).collect::<Vec<_>>());
    let best = (0..3).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap();
    for seed in [7, 8, 9] {
        let same = digest(&served, "three").await == digest(&served, &format!("seed-{seed}")).await;
        assert_eq!(same, seed == 7 + best, "seed {seed}: {losses:?}");
    }
}

/// Who comes late is told of every step, from the disk, a thousand at a time.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_watcher_hears_of_every_step() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut request = job("long", 1100);
    let settings = request.settings.as_mut().unwrap();
    (settings.batch_size, settings.num_virtual_tokens) = (Some(1), Some(1));
    request.evaluation_data = inline(examples(1));
    let (steps, evaluations, job) = trained(&mut client, request).await;
    assert_eq!((steps.len(), evaluations.len(), job.step), (1100, 1, 1100));
    let (again, evaluated, ended) = follow(&mut client, &job.job_id).await;
    assert!(again == steps && evaluated == evaluations && ended.state() == TrainingJobState::Succeeded);
}

/// A head's classes are the data's targets, and it answers Classify and Evaluate.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_trained_and_classifies() {
    let dir = tempfile::tempdir().unwrap();
    let served = server(Some(dir.path()), TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut request = job("headed", 60);
    request.task_card = "template = \"{{ input }}\"\nadd_special_tokens = false\n".into();
    request.settings.as_mut().unwrap().classification_head = true;
    request.evaluation_data = inline(examples(12));
    let (steps, evaluations, _) = trained(&mut client, request).await;
    assert!(steps[59].loss < 0.5 * steps[0].loss && evaluations[0].exact_match > 0.9, "{evaluations:?}");
    let get = proto::GetAdapterRequest { adapter_id: "headed".into() };
    let adapter = served.adapters().await.get_adapter(get).await.unwrap().into_inner().adapter.unwrap();
    assert_eq!(adapter.labels, ["negative", "positive"]);
    let classify = proto::ClassifyRequest {
        adapter_id: "headed".into(),
        input: Some(proto::classify_request::Input::Prompt("the soup at Kelto was rude".into())),
        ..Default::default()
    };
    assert_eq!(served.inference().await.classify(classify).await.unwrap().into_inner().label, "negative");
    let evaluate =
        proto::EvaluateRequest { adapter_id: "headed".into(), data: inline(examples(20)), ..Default::default() };
    let measured = client.evaluate(evaluate).await.unwrap().into_inner();
    let scores = measured.scores.unwrap();
    assert!(scores.exact_match > 0.9 && scores.macro_f1.unwrap() > 0.9 && scores.perplexity.is_none(), "{scores:?}");
    assert!(measured.base_scores.is_none(), "the bare base has no such head");
}

/// P-tuning v2 and virtual tokens on an encoder base, whose own head is random here: the trained one classifies.
#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_learns_classes() {
    let model = format!("{}/tests/oracle/results/peft/bert_seqcls", env!("CARGO_MANIFEST_DIR"));
    let served = Served::with(Config { model, adapters: None, drain_seconds: 20, ..Config::default() }).await;
    let mut client = client(&served).await;
    // A class is whether w7 is among the words.
    let words = |n: usize| -> Vec<proto::TrainingExample> {
        let one = |i: usize| {
            let (a, b) = (10 + i * 7 % 50, 10 + i * 11 % 50);
            let input = if i.is_multiple_of(2) { format!("w1 w{a} w7 w{b}") } else { format!("w1 w{a} w{b} w5") };
            let target = if i.is_multiple_of(2) { "there" } else { "absent" };
            proto::TrainingExample { input, targets: vec![target.into()], ..Default::default() }
        };
        (0..n).map(one).collect()
    };
    for method in [TrainingMethod::PrefixTuning, TrainingMethod::PromptTuning, TrainingMethod::PTuning] {
        let adapter_id = method.as_str_name().to_lowercase();
        let mut request = job(&adapter_id, 200);
        request.task_card = String::new();
        request.data = inline(words(40));
        request.evaluation_data = inline(words(20));
        let settings = request.settings.as_mut().unwrap();
        settings.set_method(method);
        (settings.classification_head, settings.target_template) = (true, None);
        let (steps, evaluations, _) = trained(&mut client, request).await;
        assert!(steps[199].loss < 0.5 * steps[0].loss, "{adapter_id}: {} {}", steps[0].loss, steps[199].loss);
        let evaluate =
            proto::EvaluateRequest { adapter_id: adapter_id.clone(), data: inline(words(20)), ..Default::default() };
        let scores = client.evaluate(evaluate).await.unwrap().into_inner().scores.unwrap();
        // Serving says what training's evaluation said.
        near(scores.exact_match, evaluations[0].exact_match, &adapter_id);
        assert!(scores.exact_match > 0.9, "{adapter_id}: {scores:?}");
    }
    // What a decoder's job is by default is refused, with the reason.
    let mut without = job("without", 5);
    (without.task_card, without.data) = (String::new(), inline(words(8)));
    let refused = create(&mut client, without).await.unwrap_err();
    assert!(refused.message().contains("settings.classification_head"), "{refused}");
}

/// The data's task, the first one too, comes before the card's.
#[tokio::test(flavor = "multi_thread")]
async fn the_data_says_which_task_answers() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let with = |task: Option<u32>, n: usize| {
        let mut all = examples(n);
        all.iter_mut().for_each(|e| e.task_id = task);
        all
    };
    let mut request = job("two", 12);
    request.task_card = format!("task_id = 1\n{WORDS}");
    request.settings.as_mut().unwrap().method = TrainingMethod::MultitaskPromptTuning.into();
    let mut data = examples(24);
    data.iter_mut().enumerate().for_each(|(i, e)| e.task_id = Some(i as u32 % 2));
    request.data = inline(data);
    trained(&mut client, request).await;
    let mut perplexity = async |data: Vec<proto::TrainingExample>, task_id: Option<u32>| {
        let (adapter_id, data, skip_base) = ("two".into(), inline(data), true);
        let request = proto::EvaluateRequest { adapter_id, data, task_id, skip_base, ..Default::default() };
        client.evaluate(request).await.unwrap().into_inner().scores.unwrap().perplexity.unwrap()
    };
    let (first, second) = (perplexity(with(None, 6), Some(0)).await, perplexity(with(None, 6), Some(1)).await);
    assert_ne!(first, second);
    assert_eq!(perplexity(with(Some(0), 6), None).await, first);
    assert_eq!(perplexity(with(Some(1), 6), None).await, second);
    assert_eq!(perplexity(with(None, 6), None).await, second, "the card's");
}
