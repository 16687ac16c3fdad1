#![allow(clippy::unwrap_used)]
use super::*;
use crate::adapter::peft::{SavedAdapter, SavedBase, SavedTensor, save};
use crate::adapter::{AdapterId, BaseShape, Method, load_folder};
use crate::error::Kind;
use crate::model::source;
use crate::ops::Machine;
use candle_core::DType;
use proto::{classify_request, generate_request, score_request};
use tonic::metadata::MetadataMap;

/// Admission over a base of 1 layer, 1 KV head of 4 and the embedded tokenizer; no engine.
struct Desk {
    admission: Admission,
    registry: Arc<Registry>,
    shape: BaseShape,
}

fn desk(encoder: bool) -> Desk {
    let tokenizer = Tokenizer::from_bytes(&source::resolve("embedded").unwrap().tokenizer).unwrap();
    let registry = Registry::new(64);
    let vocab_size = tokenizer.vocab_size();
    let shape = BaseShape {
        name: "tiny".into(),
        num_layers: 1,
        num_kv_heads: 1,
        head_dim: 4,
        hidden_size: 4,
        max_model_len: 64,
        encoder,
        input_dtype: DType::F32,
        kv_dtype: DType::F32,
        machine: Machine::new(1),
    };
    let limits = Limits::default();
    let parts = Parts {
        tokenizer,
        registry: registry.clone(),
        limits,
        max_model_len: 64,
        vocab_size,
        encoder,
        classifier: None,
        chat_template: Err(Error::precondition("no chat template")),
    };
    Desk { admission: Admission::new(parts), registry, shape }
}

impl Desk {
    /// Puts an adapter of two virtual tokens (none for TEXT) in service.
    fn load(&self, id: &str, method: Method, card: &str, task_type: &str, tensors: &[(&str, &[usize])]) {
        let dir = tempfile::tempdir().unwrap();
        if method != Method::Text {
            let mut adapter = SavedAdapter::new(method, 2, task_type, &SavedBase::default()).unwrap();
            let dims = [2, if method.is_kv() { 8 } else { 4 }];
            let prompt = [("prompt_embeddings", dims.as_slice())];
            for (name, dims) in prompt.iter().chain(tensors) {
                let values = vec![1.0; dims.iter().product()];
                adapter.tensors.insert((*name).into(), SavedTensor::f32(dims.to_vec(), &values));
            }
            save(dir.path(), &adapter).unwrap();
        }
        std::fs::write(dir.path().join("task.toml"), card).unwrap();
        let loaded = load_folder(dir.path(), &self.shape, self.admission.tokenizer()).unwrap();
        let ticket = self.registry.begin_load(&AdapterId::parse(id).unwrap()).unwrap();
        let (id, generation) = (ticket.id().clone(), ticket.generation());
        ticket.publish(loaded.into_adapter(id, generation));
    }

    fn soft(&self, id: &str, card: &str) {
        self.load(id, Method::PromptTuning, card, "CAUSAL_LM", &[]);
    }

    async fn generate(&self, message: proto::GenerateRequest) -> Result<Request> {
        let call = Call::new("Generate", &MetadataMap::new());
        Ok(self.admission.generate(&call, message).await?.requests.remove(0))
    }

    async fn classify(&self, message: proto::ClassifyRequest) -> Result<Scoring> {
        self.admission.classify(&Call::new("Classify", &MetadataMap::new()), message).await
    }

    fn ids(&self, text: &str, special: bool) -> Vec<InputRow> {
        self.admission.tokenizer().encode(text, special).unwrap().into_iter().map(InputRow::Token).collect()
    }
}

fn prompt(id: &str, text: &str) -> proto::GenerateRequest {
    let input = Some(generate_request::Input::Prompt(text.into()));
    proto::GenerateRequest { adapter_id: id.into(), input, ..Default::default() }
}

fn token_ids(id: &str) -> proto::GenerateRequest {
    let input = Some(generate_request::Input::TokenIds(proto::TokenIds { ids: vec![5, 6] }));
    proto::GenerateRequest { input, ..prompt(id, "") }
}

fn after(before: &[&str], message: proto::GenerateRequest) -> proto::GenerateRequest {
    proto::GenerateRequest { prefix_adapter_ids: before.iter().map(|id| (*id).into()).collect(), ..message }
}

fn text(id: &str) -> proto::ClassifyRequest {
    let input = Some(classify_request::Input::Prompt("is it good".into()));
    proto::ClassifyRequest { adapter_id: id.into(), input, ..Default::default() }
}

fn says<T>(result: Result<T>, kind: Kind, parts: &[&str]) {
    let Err(e) = result else { panic!("{parts:?}: admitted") };
    assert_eq!(e.kind(), kind, "{e}");
    for part in parts {
        assert!(e.to_string().contains(part), "{part:?} is not in: {e}");
    }
}

const SOFT: [InputRow; 2] = [InputRow::Soft(0), InputRow::Soft(1)];

#[tokio::test]
async fn virtual_tokens_stand_where_the_template_says() {
    let desk = desk(false);
    desk.soft("middle", "template = 'say {{ input }} {{ virtual }} =>'");
    desk.soft("split", "virtual_token_splits = [1, 1]\ntemplate = '{{ virtual_1 }}{{ input }}{{ virtual_0 }}'");
    let request = desk.generate(prompt("middle", "{{ virtual }}")).await.unwrap();
    let expected = [desk.ids("say {{ virtual }} ", true), SOFT.to_vec(), desk.ids(" =>", false)].concat();
    assert_eq!((request.input, request.soft.unwrap().len, request.prefix.is_none()), (expected, 2, true));
    let request = desk.generate(prompt("split", "good")).await.unwrap();
    assert_eq!(request.input, [vec![SOFT[1]], desk.ids("good", true), vec![SOFT[0]]].concat());

    let message = proto::TokenizeRequest { adapter_id: "middle".into(), prompt: "x".into(), ..Default::default() };
    let input = desk.admission.tokenize(message).await.unwrap();
    assert_eq!((input.text.as_str(), input.who.prefix_len()), ("say x  =>", 0));

    let refused = Kind::InvalidArgument;
    says(desk.generate(token_ids("middle")).await, refused, &["`token_ids` is given", "stand in its template"]);
    let bare = proto::GenerateRequest { skip_template: true, ..prompt("middle", "x") };
    says(desk.generate(bare).await, refused, &["`skip_template` is true", "stand in its template"]);
    let output = Some(proto::Output { input_logprobs: true, ..Default::default() });
    let scored = proto::GenerateRequest { output, ..prompt("middle", "x") };
    says(desk.generate(scored).await, refused, &["`output.input_logprobs`", "no probability"]);
    says(desk.generate(prompt("middle", &"good ".repeat(64))).await, refused, &["prefix 0 + prompt", "64"]);
}

#[tokio::test]
async fn prefixes_are_stacked_before_the_adapters_own() {
    let desk = desk(false);
    for (id, method) in [("kv", Method::PrefixTuning), ("kv2", Method::Cartridge)] {
        desk.load(id, method, "template = 'not {{ input }}'", "CAUSAL_LM", &[]);
    }
    desk.soft("soft", "template = '{{ input }}!'");
    desk.soft("middle", "template = '{{ input }}{{ virtual }}'");
    desk.load("text", Method::Text, "prefix = 'good'", "", &[]);
    desk.load("template", Method::Text, "template = '{{ input }}.'", "", &[]);
    let request = desk.generate(after(&["kv", "kv2"], prompt("soft", "x"))).await.unwrap();
    let prefix = request.prefix.unwrap();
    assert_eq!((prefix.kv_len(), prefix.len(), &prefix.rows[..]), (4, 6, &SOFT[..]));
    assert_eq!(request.input, desk.ids("x!", true), "template and special tokens are the adapter's own");
    let again = desk.generate(after(&["kv", "kv2"], prompt("soft", "y"))).await.unwrap();
    assert!(Arc::ptr_eq(&prefix, &again.prefix.unwrap()));

    // The bare base after a text that has its BOS; virtual tokens of its own after a stack.
    let request = desk.generate(after(&["text"], prompt("", "x"))).await.unwrap();
    assert_eq!(request.input, desk.ids("x", false));
    let request = desk.generate(after(&["kv"], prompt("middle", "x"))).await.unwrap();
    assert_eq!((request.prefix.unwrap().len(), request.soft.unwrap().len), (2, 2));

    let refused = Kind::FailedPrecondition;
    says(desk.generate(after(&["soft"], prompt("kv", "x"))).await, refused, &["prefix 1 of the stack", "first"]);
    says(desk.generate(after(&["middle"], prompt("kv", "x"))).await, refused, &["`middle`", "own rows"]);
    says(desk.generate(after(&["template"], prompt("kv", "x"))).await, refused, &["`template` has no prefix"]);
    says(desk.generate(after(&["none"], prompt("kv", "x"))).await, Kind::NotFound, &["`none`"]);
    let invalid = Kind::InvalidArgument;
    says(
        desk.generate(after(&["kv"; 9], prompt("", "x"))).await,
        invalid,
        &["`prefix_adapter_ids` is a list of 9", "8"],
    );
    says(desk.generate(after(&["../x"], prompt("", "x"))).await, invalid, &["`prefix_adapter_ids` is \"../x\""]);
    let long = prompt("kv", &"good ".repeat(50));
    says(desk.generate(after(&["kv"; 8], long)).await, invalid, &["prefix 18 + prompt", "64"]);
}

#[tokio::test]
async fn a_request_may_choose_a_task() {
    let desk = desk(false);
    let tasks: [(&str, &[usize]); 2] = [("prefix_task_cols", &[3, 2, 1]), ("prefix_task_rows", &[3, 1, 4])];
    desk.load("tasks", Method::MultitaskPromptTuning, "", "CAUSAL_LM", &tasks);
    desk.soft("soft", "");
    let ask = |id: &str, task| proto::GenerateRequest { task_id: Some(task), ..prompt(id, "x") };
    assert_eq!(desk.generate(ask("tasks", 2)).await.unwrap().prefix.unwrap().len(), 2);
    let refused = Kind::InvalidArgument;
    says(desk.generate(ask("tasks", 3)).await, refused, &["`task_id` is 3, the adapter has 3 tasks"]);
    says(desk.generate(ask("soft", 0)).await, refused, &["`task_id` is 0", "(PROMPT_TUNING) has no tasks"]);
    says(desk.generate(ask("", 0)).await, refused, &["`task_id` is 0, but no `adapter_id`"]);
}

#[tokio::test]
async fn a_head_answers_classify() {
    let desk = desk(false);
    let head: [(&str, &[usize]); 1] = [("base_model.score.weight", &[2, 4])];
    desk.load("named", Method::PTuning, "labels = ['bad', 'good']", "SEQ_CLS", &head);
    desk.load("nameless", Method::PrefixTuning, "", "SEQ_CLS", &head);
    let scoring = desk.classify(text("named")).await.unwrap();
    assert_eq!(scoring.labels, ["bad", "good"]);
    let [request] = scoring.requests.as_slice() else { panic!("one request") };
    assert_eq!(request.input, desk.ids("is it good", true));
    assert!(request.head.is_some() && request.score_from.is_none() && request.stopping.max_new_tokens == 0);
    assert_eq!(desk.classify(text("nameless")).await.unwrap().labels, ["LABEL_0", "LABEL_1"]);
    let message = proto::ClassifyRequest { labels: vec!["x".into()], ..text("named") };
    says(desk.classify(message).await, Kind::InvalidArgument, &["`labels` is a list of 1", "trained head"]);
    assert!(desk.generate(prompt("named", "x")).await.unwrap().head.is_none(), "a decoder still writes");
}

#[tokio::test]
async fn an_encoder_classifies_and_writes_nothing() {
    let desk = desk(true);
    let head: [(&str, &[usize]); 1] = [("base_model.classifier.weight", &[2, 4])];
    desk.load("soft", Method::PTuning, "", "SEQ_CLS", &head);
    desk.load("kv", Method::PrefixTuning, "", "SEQ_CLS", &head);
    desk.load("end", Method::PTuning, "template = '{{ input }}{{ virtual }}'", "SEQ_CLS", &head);
    desk.load("headless", Method::PTuning, "", "SEQ_CLS", &[]);
    let mut requests = Vec::new();
    for id in ["soft", "kv", "end"] {
        requests.push(desk.classify(text(id)).await.unwrap().requests.remove(0));
    }
    let tokens = desk.ids("is it good", true);
    assert_eq!(requests[0].input, [SOFT.to_vec(), tokens.clone()].concat());
    assert_eq!((&requests[1].input, requests[1].prefix.as_ref().unwrap().kv_len()), (&tokens, 2));
    assert_eq!(requests[2].input, [tokens, SOFT.to_vec()].concat());
    let ids = Some(classify_request::Input::TokenIds(proto::TokenIds { ids: vec![5] }));
    let request =
        desk.classify(proto::ClassifyRequest { input: ids, ..text("soft") }).await.unwrap().requests.remove(0);
    assert_eq!(request.input, [SOFT.to_vec(), vec![InputRow::Token(5)]].concat());

    let refused = Kind::FailedPrecondition;
    says(desk.generate(prompt("soft", "x")).await, refused, &["encoder", "Generate needs a decoder", "Classify"]);
    let input = Some(score_request::Input::Prompt("x".into()));
    let score = proto::ScoreRequest { input, ..Default::default() };
    let call = Call::new("Score", &MetadataMap::new());
    says(desk.admission.score(&call, score).await.map(drop), refused, &["encoder", "Score needs a decoder"]);
    for id in ["headless", ""] {
        let labels = vec!["a".into(), "b".into()];
        let message = proto::ClassifyRequest { labels, ..text(id) };
        says(desk.classify(message).await, refused, &["encoder", "without a classification head"]);
    }
    let stacked = proto::ClassifyRequest { prefix_adapter_ids: vec!["soft".into()], ..text("kv") };
    says(desk.classify(stacked).await, refused, &["`soft`", "own rows"]);
    let stacked = proto::ClassifyRequest { prefix_adapter_ids: vec!["kv".into()], ..text("soft") };
    assert_eq!(desk.classify(stacked).await.unwrap().requests[0].prefix.as_ref().unwrap().len(), 2);
}
