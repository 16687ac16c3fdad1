//! The API over the wire: what the proto's comments promise.
use crate::served::{Served, long, prompt};
use prefixd::config::EngineConfig;
use prefixd::rpc::proto::{self, FinishReason, continuation::Content, score_request};
use std::path::Path;
use tokio_stream::StreamExt;

/// `(input, target)` of a shipped adapter's held-out examples.
fn examples(id: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(Path::new("adapters").join(id).join("examples.jsonl")).unwrap();
    let line = |l: &str| {
        let v: serde_json::Value = serde_json::from_str(l).unwrap();
        (v["input"].as_str().unwrap().to_owned(), v["target"].as_str().unwrap().to_owned())
    };
    text.lines().map(line).collect()
}

const SHIPPED: [&str; 8] = ["agenda", "answer", "booking", "describe", "formal", "sentiment", "slots", "topic"];

/// The main job: all shipped tasks and the bare base in one burst, answered as they should be.
#[tokio::test(flavor = "multi_thread")]
async fn one_burst_over_all_tasks_is_answered_correctly() {
    let served = Served::start(EngineConfig::default()).await;
    let client = served.inference().await;
    let mut calls = Vec::new();
    for id in SHIPPED {
        for (input, target) in examples(id).into_iter().take(10) {
            let mut client = client.clone();
            calls.push(tokio::spawn(async move {
                let answer = client.generate(prompt(id, &input)).await.unwrap().into_inner();
                let bare = client.generate(prompt("", &input)).await.unwrap().into_inner();
                (id, target, answer, bare)
            }));
        }
    }
    let (mut right, mut bare_right, mut shared, mut mixed) = (0, 0, 0, 0);
    let total = calls.len();
    for call in calls {
        let (id, target, answer, bare) = call.await.unwrap();
        let text = answer.choices[0].text.trim().to_owned();
        right += usize::from(text == target);
        bare_right += usize::from(bare.choices[0].text.trim().lines().next() == Some(&target));
        assert_eq!(answer.adapter.unwrap().adapter_id, id);
        assert!(answer.usage.unwrap().prefix_tokens > 0);
        let timings = answer.timings.unwrap();
        shared = shared.max(timings.batch_max_sequences);
        mixed = mixed.max(timings.batch_max_adapters);
    }
    println!(
        "{right} of {total} right, {bare_right} by the bare base; up to {shared} sequences of {mixed} adapters a batch"
    );
    assert!(right * 10 >= total * 9, "{right} of {total}");
    assert!(bare_right * 10 <= total * 3, "{bare_right} of {total}");
    assert!(mixed >= 8, "{mixed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_the_unary_answer_in_pieces() {
    let served = Served::start(EngineConfig::default()).await;
    let mut client = served.inference().await;
    // Hot sampling over a byte-level vocabulary: characters in pieces, and bytes that are none.
    let mut request = long("", "on monday", 120);
    request.sampling =
        Some(proto::Sampling { temperature: Some(3.0), seed: Some(5), n: Some(3), ..Default::default() });
    request.output = Some(proto::Output { logprobs: Some(2), input_logprobs: true, token_ids: true });
    let whole = client.generate(request.clone()).await.unwrap().into_inner();
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let first = stream.next().await.unwrap().unwrap();
    assert!(first.choice.is_none() && first.adapter.is_some());
    let mut pieces = vec![proto::Choice::default(); 3];
    let mut input_logprobs = Vec::new();
    while let Some(message) = stream.next().await {
        let message = message.unwrap();
        input_logprobs.extend(message.input_logprobs);
        let Some(choice) = message.choice else { continue };
        let all = &mut pieces[choice.index as usize];
        all.text += &choice.text;
        all.token_ids.extend(choice.token_ids);
        all.logprobs.extend(choice.logprobs);
        if choice.finish_reason != 0 {
            all.finish_reason = choice.finish_reason;
            let usage = message.usage.unwrap();
            assert_eq!((usage.generated_tokens, usage.prompt_tokens as usize), (120, whole.input_logprobs.len() + 1));
        }
    }
    assert_eq!(input_logprobs, whole.input_logprobs);
    for (piece, choice) in pieces.iter().zip(&whole.choices) {
        assert_eq!(
            (&piece.text, &piece.token_ids, &piece.logprobs),
            (&choice.text, &choice.token_ids, &choice.logprobs)
        );
        assert_eq!((piece.finish_reason, choice.token_ids.len()), (FinishReason::Length.into(), 120));
        assert!(choice.logprobs.iter().all(|l| l.top.len() == 2 && l.top[0].logprob >= l.top[1].logprob));
    }
    assert_ne!(pieces[0].text, pieces[1].text, "choices draw from seeds of their own");
    assert!(whole.choices.iter().any(|c| !c.text.is_ascii()), "nothing to split: {whole:?}");
}

/// Neither a stop sequence nor an end token ends an answer before `min_new_tokens`.
#[tokio::test(flavor = "multi_thread")]
async fn min_new_tokens_holds_off_every_end() {
    let served = Served::start(EngineConfig::default()).await;
    let mut client = served.inference().await;
    let mut request = prompt("sentiment", "the soup at Zazan was tasty");
    request.output = Some(proto::Output { token_ids: true, ..Default::default() });
    let short = client.generate(request.clone()).await.unwrap().into_inner().choices.remove(0);
    let min = short.token_ids.len() as u32 + 6;
    request.stopping =
        Some(proto::Stopping { min_new_tokens: Some(min), max_new_tokens: Some(40), ..Default::default() });
    let long = client.generate(request).await.unwrap().into_inner().choices.remove(0);
    assert!(long.token_ids.len() as u32 >= min, "{long:?}");
    assert_eq!(long.token_ids[..short.token_ids.len()], short.token_ids);
    assert!(long.text.starts_with(&short.text) && long.text.contains('\n'), "{long:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_add_up_to_what_generation_says_and_classify_ranks_by_them() {
    let served = Served::start(EngineConfig::default()).await;
    let mut client = served.inference().await;
    let (input, target) = examples("sentiment").remove(0);
    let mut request = prompt("sentiment", &input);
    request.output = Some(proto::Output { logprobs: Some(0), token_ids: true, ..Default::default() });
    let answer = client.generate(request).await.unwrap().into_inner();
    assert_eq!(answer.choices[0].finish_reason, i32::from(FinishReason::StopSequence));
    assert_eq!(answer.choices[0].stop_sequence, "\n");
    let ids = proto::TokenIds { ids: answer.choices[0].token_ids.clone() };
    let score = proto::ScoreRequest {
        adapter_id: "sentiment".into(),
        input: Some(score_request::Input::Prompt(input.clone())),
        continuations: [Content::TokenIds(ids), Content::Text(" negative".into()), Content::Text(" positive".into())]
            .map(|content| proto::Continuation { content: Some(content) })
            .to_vec(),
        ..Default::default()
    };
    let scores = client.score(score).await.unwrap().into_inner().scores;
    let generated: Vec<f32> = answer.choices[0].logprobs.iter().map(|l| l.logprob).collect();
    let scored: Vec<f32> = scores[0].tokens.iter().map(|l| l.logprob).collect();
    assert_eq!(generated, scored, "the same tokens, the same bits");
    assert!((scores[0].perplexity - (-scores[0].logprob / scored.len() as f64).exp()).abs() < 1e-9);

    let classify = proto::ClassifyRequest {
        adapter_id: "sentiment".into(),
        input: Some(proto::classify_request::Input::Prompt(input)),
        ..Default::default()
    };
    let answer = client.classify(classify).await.unwrap().into_inner();
    assert_eq!((answer.label.as_str(), answer.scores.len()), (target.as_str(), 2));
    assert!((answer.scores.iter().map(|s| s.probability).sum::<f64>() - 1.0).abs() < 1e-9);
    let expected = scores[1].logprob.max(scores[2].logprob);
    assert!((answer.scores[0].logprob - expected).abs() < 1e-6);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_and_cancellation_return_the_pages() {
    let served = Served::start(EngineConfig { prefix_caching: false, ..EngineConfig::default() }).await;
    let mut client = served.inference().await;
    // This client has a timer of its own, which says Cancelled where the machine is too busy to answer 2 ms before it.
    let mut codes = Vec::new();
    while codes.len() < 10 && !codes.contains(&tonic::Code::DeadlineExceeded) {
        let mut request = tonic::Request::new(long("describe", "name = Zazan", 200));
        request.set_timeout(std::time::Duration::from_millis(30));
        codes.push(client.generate(request).await.unwrap_err().code());
    }
    assert_eq!(codes.pop(), Some(tonic::Code::DeadlineExceeded));
    assert!(codes.iter().all(|code| *code == tonic::Code::Cancelled), "{codes:?}");
    let mut stream = client.generate_stream(long("slots", "book", 200)).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let mut server = served.server().await;
    for _ in 0..500 {
        let stats = server.get_stats(proto::GetStatsRequest {}).await.unwrap().into_inner();
        let prefixes = stats.kv_pages_total - stats.kv_pages_available;
        if (stats.running, stats.waiting) == (0, 0) && prefixes <= 2 * stats.adapters_resident + 2 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("pages did not come back");
}

#[tokio::test(flavor = "multi_thread")]
async fn server_info_tokenize_and_request_ids() {
    let served = Served::start(EngineConfig::default()).await;
    let info = served.server().await.get_server_info(proto::GetServerInfoRequest {}).await.unwrap().into_inner();
    let (model, limits) = (info.model.unwrap(), info.limits.unwrap());
    assert_eq!((model.name.as_str(), model.family.as_str(), model.device.as_str()), ("embedded", "llama", "cpu"));
    assert!(model.num_parameters > 1_000_000 && limits.max_model_len >= 256);
    let mut client = served.inference().await;
    let request =
        proto::TokenizeRequest { adapter_id: "sentiment".into(), prompt: "the soup".into(), ..Default::default() };
    let tokens = client.tokenize(request).await.unwrap().into_inner();
    assert_eq!((tokens.text.as_str(), tokens.tokens.concat().as_str()), ("the soup\n=>", "the soup\n=>"));
    assert!(tokens.prefix_tokens > 0 && tokens.tokens.len() == tokens.token_ids.len());
    let mut request = tonic::Request::new(prompt("sentiment", "the soup was tasty"));
    request.metadata_mut().insert("x-request-id", "mine-7".parse().unwrap());
    assert_eq!(client.generate(request).await.unwrap().into_inner().request_id, "mine-7");
}
