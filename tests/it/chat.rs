//! Conversations: chat templates render as transformers renders them (`chat.json`, made by `tests/oracle/chat.py`), and
//! `messages` are answered like the text that comes of them.
use crate::served::{Served, prompt};
use prefixd::config::{Config, EngineConfig};
use prefixd::rpc::proto::{self, classify_request, generate_request, score_request};
use prefixd::tokenizer::Tokenizer;
use prefixd::tokenizer::chat::{ChatMessage, ChatTemplate, SpecialTokens};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_stream::StreamExt;
use tonic::Code;

fn oracle() -> Value {
    serde_json::from_str(include_str!("chat.json")).unwrap()
}

fn template(oracle: &Value, name: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")];
    let tokens: SpecialTokens = tokens.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
    ChatTemplate::new(oracle["templates"][name].as_str().unwrap(), tokens).unwrap()
}

fn conversation(oracle: &Value, name: &str) -> Vec<ChatMessage> {
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let message = |m: &Value| ChatMessage { role: text(&m["role"]), content: text(&m["content"]) };
    oracle["conversations"][name].as_array().unwrap().iter().map(message).collect()
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let oracle = oracle();
    let cases = oracle["cases"].as_array().unwrap();
    let tokenizer = Tokenizer::from_bytes(&std::fs::read("models/demo/tokenizer.json").unwrap()).unwrap();
    let (mut wrong, mut tokenised) = (0, 0);
    for case in cases {
        let (name, talk) = (case["template"].as_str().unwrap(), case["conversation"].as_str().unwrap());
        let messages = conversation(&oracle, talk);
        let prompted = case["add_generation_prompt"].as_bool().unwrap();
        let got = template(&oracle, name).render(&messages, prompted);
        let same = match (&got, case["text"].as_str()) {
            (Ok(got), Some(text)) => got == text,
            (Err(e), None) => e.to_string().ends_with(case["error"].as_str().unwrap()),
            _ => false,
        };
        if !same {
            wrong += 1;
            println!("{name}, {talk}, {prompted}:\n got {got:?}\nwant {:?} {}", case["text"].as_str(), case["error"]);
        }
        if let Some(ids) = case["ids"].as_array() {
            let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(&got.unwrap(), false).unwrap(), ids, "{name}, {talk}");
            tokenised += 1;
        }
    }
    assert_eq!(wrong, 0, "of {} cases", cases.len());
    assert!(tokenised >= 20 && cases.len() >= 160, "{tokenised} of {}", cases.len());
}

const TEMPLATE: &str = "\
{{ bos_token }}{% for m in messages %}\
{% if m.role not in ['system', 'user'] %}{{ raise_exception('Nobody is ' ~ m.role) }}{% endif %}\
{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}=>{% endif %}";

/// The demo model in a folder, with a chat template.
pub fn model() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(format!("models/demo/{file}"), dir.path().join(file)).unwrap();
    }
    let config = json!({"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "</s>"});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

pub async fn served(model: &TempDir) -> Served {
    let model = model.path().to_str().unwrap().to_owned();
    Served::with(Config { model, drain_seconds: 20, ..Config::default() }).await
}

pub fn talk(messages: &[(&str, &str)]) -> proto::Messages {
    let message =
        |(role, content): &(&str, &str)| proto::ChatMessage { role: (*role).into(), content: (*content).into() };
    proto::Messages { messages: messages.iter().map(message).collect(), add_generation_prompt: None }
}

fn generate(adapter_id: &str, input: generate_request::Input) -> proto::GenerateRequest {
    let output = Some(proto::Output { logprobs: Some(0), token_ids: true, input_logprobs: true });
    proto::GenerateRequest { input: Some(input), output, ..prompt(adapter_id, "") }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_answered_like_the_text_that_comes_of_them() {
    let model = model();
    let served = served(&model).await;
    let mut client = served.inference().await;
    let messages = talk(&[("system", " Be fair. "), ("user", "the soup at Zazan was tasty")]);
    for (adapter_id, prefix) in [("", 0), ("sentiment", 20)] {
        let request = proto::TokenizeRequest {
            adapter_id: adapter_id.into(),
            messages: Some(messages.clone()),
            ..Default::default()
        };
        let tokens = client.tokenize(request).await.unwrap().into_inner();
        assert_eq!(tokens.text, "<s>Be fair.\nthe soup at Zazan was tasty\n=>", "no template of the adapter's");
        assert_eq!(tokens.token_ids.iter().filter(|&&id| id == 0).count(), 1, "one BOS: {:?}", tokens.tokens);
        assert_eq!(tokens.prefix_tokens, prefix);
        let ids = proto::TokenIds { ids: tokens.token_ids };

        let by_text = generate(adapter_id, generate_request::Input::Messages(messages.clone()));
        let by_ids = generate(adapter_id, generate_request::Input::TokenIds(ids.clone()));
        let answer = client.generate(by_text.clone()).await.unwrap().into_inner();
        let expected = client.generate(by_ids).await.unwrap().into_inner();
        assert_eq!((&answer.choices, &answer.input_logprobs), (&expected.choices, &expected.input_logprobs));
        assert_eq!(answer.usage.unwrap().prefix_tokens, prefix);
        let pieces: Vec<_> = client.generate_stream(by_text).await.unwrap().into_inner().collect().await;
        let pieces = pieces.into_iter().filter_map(|piece| piece.unwrap().choice);
        assert_eq!(pieces.map(|c| c.text).collect::<String>(), expected.choices[0].text);

        let text = proto::continuation::Content::Text(" positive".into());
        let score = |input| proto::ScoreRequest {
            adapter_id: adapter_id.into(),
            input: Some(input),
            continuations: vec![proto::Continuation { content: Some(text.clone()) }],
            ..Default::default()
        };
        let answer = client.score(score(score_request::Input::Messages(messages.clone()))).await.unwrap();
        let expected = client.score(score(score_request::Input::TokenIds(ids.clone()))).await.unwrap();
        assert_eq!(answer.into_inner().scores, expected.into_inner().scores);

        let classify = |input| proto::ClassifyRequest {
            adapter_id: adapter_id.into(),
            input: Some(input),
            labels: vec![" positive".into(), " negative".into()],
            ..Default::default()
        };
        let answer = client.classify(classify(classify_request::Input::Messages(messages.clone()))).await.unwrap();
        let expected = client.classify(classify(classify_request::Input::TokenIds(ids))).await.unwrap();
        assert_eq!(answer.into_inner().scores, expected.into_inner().scores);
    }
    let open = proto::Messages { add_generation_prompt: Some(false), ..messages };
    let request = proto::TokenizeRequest { messages: Some(open), ..Default::default() };
    assert!(client.tokenize(request).await.unwrap().into_inner().text.ends_with("tasty\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_messages_say_why() {
    let model = model();
    let served = served(&model).await;
    let mut client = served.inference().await;
    let many = vec![("user", "x"); 1025];
    let huge = "x".repeat(600 << 10);
    let cases: [(proto::Messages, &[&str]); 6] = [
        (talk(&[]), &["`messages`", "a list of 0", "1 to 1024"]),
        (talk(&many), &["`messages`", "a list of 1025", "1 to 1024"]),
        (talk(&[("user", "x"), ("", "y")]), &["`messages`", "without a role at index 1"]),
        (talk(&[("user", &huge), ("user", &huge)]), &["`messages`", "1228808 bytes", "1048576"]),
        (talk(&[("user", "x"), ("robot", "y")]), &["`messages`", "a list of 2", "chat template says: Nobody is robot"]),
        (talk(&[("user", &"word ".repeat(5000))]), &["prompt 5", "256"]),
    ];
    for (messages, expected) in cases {
        let request = generate("", generate_request::Input::Messages(messages));
        let e = client.generate(request).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{e}");
        assert!(expected.iter().all(|part| e.message().contains(part)), "{e}");
    }
    let both = talk(&[("user", "x")]);
    let both = proto::TokenizeRequest { prompt: "y".into(), messages: Some(both), ..Default::default() };
    let e = client.tokenize(both).await.unwrap_err();
    assert!(e.code() == Code::InvalidArgument && e.message().contains("`messages` is given"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_template_says_so() {
    let served = Served::start(EngineConfig::default()).await;
    let request = generate("sentiment", generate_request::Input::Messages(talk(&[("user", "x")])));
    let e = served.inference().await.generate(request).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    assert!(e.message().contains("model embedded: no chat template"), "{e}");
}
