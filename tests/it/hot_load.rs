//! Adapters come, change and go while requests run.
use crate::served::{Served, long, prompt, upload};
use prefixd::config::EngineConfig;
use prefixd::rpc::proto;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tonic::Code;

const CARD: &str = "template = \"{{ input }}\\n=>\"\n";

fn card(prefix: &str) -> String {
    format!("prefix = {prefix:?}\n{CARD}")
}

/// 200 replacements under load: each answer is wholly that of the generation it names.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_wholly_one_generations() {
    let served = Served::start(EngineConfig::default()).await;
    let mut adapters = served.adapters().await;
    let client = served.inference().await;
    let cards = [card("is this review positive or negative ?\n"), card("what is the topic ?\n")];
    let publish = |version: usize| upload("changing", true, &[("task.toml", cards[version % 2].as_bytes())]);
    let ask = || long("changing", "the soup at Zazan was awful", 24);
    // What each of the two contents says, in quiet.
    let mut wants = Vec::new();
    let mut generations = HashMap::new();
    for version in 0..2 {
        let reply = adapters.upload_adapter(tokio_stream::iter(publish(version))).await.unwrap().into_inner();
        generations.insert(reply.adapter.unwrap().generation, version);
        wants.push(client.clone().generate(ask()).await.unwrap().into_inner().choices.remove(0).text);
    }
    assert_ne!(wants[0], wants[1]);
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, stop) = (client.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let answer = client.generate(ask()).await.unwrap().into_inner();
                    answers.push((answer.adapter.unwrap().generation, answer.choices[0].text.clone()));
                }
                answers
            })
        })
        .collect();
    for version in 0..200 {
        let reply = adapters.upload_adapter(tokio_stream::iter(publish(version))).await.unwrap().into_inner();
        generations.insert(reply.adapter.unwrap().generation, version % 2);
    }
    stop.store(true, Ordering::Relaxed);
    let mut seen = HashMap::new();
    for worker in workers {
        for (generation, text) in worker.await.unwrap() {
            assert_eq!(text, wants[generations[&generation]], "generation {generation}");
            *seen.entry(generation).or_insert(0) += 1;
        }
    }
    let answers: usize = seen.values().sum();
    println!("{answers} answers over {} generations", seen.len());
    assert!(seen.len() > 10, "the load met {} generations only", seen.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_list_unload_and_load_again() {
    let served = Served::start(EngineConfig::default()).await;
    let mut adapters = served.adapters().await;
    let mut client = served.inference().await;
    let files = card("what is the topic ?\n");
    let reply =
        adapters.upload_adapter(tokio_stream::iter(upload("mine", false, &[("task.toml", files.as_bytes())]))).await;
    let adapter = reply.unwrap().into_inner().adapter.unwrap();
    assert_eq!((adapter.state, adapter.method.as_str()), (proto::AdapterState::Ready.into(), "TEXT"));
    assert!(adapter.resident && adapter.prefix_tokens > 3 && adapter.loaded_at.is_some());

    let mut ids = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = proto::ListAdaptersRequest { page_size: 4, page_token };
        let page = adapters.list_adapters(request).await.unwrap().into_inner();
        assert!(page.adapters.len() <= 4);
        ids.extend(page.adapters.into_iter().map(|a| a.adapter_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(ids.is_sorted() && ids.len() == 9 && ids.contains(&"mine".to_owned()), "{ids:?}");

    let unload = |generation, delete| proto::UnloadAdapterRequest { adapter_id: "mine".into(), generation, delete };
    let status = adapters.unload_adapter(unload(Some(adapter.generation + 1), false)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    adapters.unload_adapter(unload(Some(adapter.generation), false)).await.unwrap();
    assert_eq!(client.generate(prompt("mine", "x")).await.unwrap_err().code(), Code::NotFound);
    let load = proto::LoadAdapterRequest { adapter_id: "mine".into(), pinned: true };
    let again = adapters.load_adapter(load.clone()).await.unwrap().into_inner().adapter.unwrap();
    assert!(again.generation > adapter.generation && again.pinned && again.digest == adapter.digest);
    client.generate(prompt("mine", "x")).await.unwrap();
    adapters.unload_adapter(unload(None, true)).await.unwrap();
    assert_eq!(adapters.load_adapter(load).await.unwrap_err().code(), Code::NotFound);
}

/// More adapters than fit the pool: all answer, the least recently used ones make room and come back.
#[tokio::test(flavor = "multi_thread")]
async fn more_adapters_than_the_pool_holds() {
    let served = Served::start(EngineConfig { kv_tokens: 512, ..EngineConfig::default() }).await;
    let mut adapters = served.adapters().await;
    let client = served.inference().await;
    for i in 0..24 {
        let files =
            card(&format!("what is the topic of the sentence number {i} in the long list of all sentences ?\n"));
        let id = format!("many-{i}");
        let upload = upload(&id, false, &[("task.toml", files.as_bytes())]);
        adapters.upload_adapter(tokio_stream::iter(upload)).await.unwrap();
    }
    let mut first = Vec::new();
    for round in 0..2 {
        let calls: Vec<_> = (0..24)
            .map(|i| {
                let mut client = client.clone();
                tokio::spawn(async move { client.generate(long(&format!("many-{i}"), "the old song", 12)).await })
            })
            .collect();
        for (i, call) in calls.into_iter().enumerate() {
            let text = call.await.unwrap().unwrap().into_inner().choices.remove(0).text;
            if round == 0 {
                first.push(text);
            } else {
                assert_eq!(text, first[i], "many-{i} came back as something else");
            }
        }
    }
    let stats = served.server().await.get_stats(proto::GetStatsRequest {}).await.unwrap().into_inner();
    println!("{stats:?}");
    assert!(stats.prefix_evictions > 24 && stats.adapters_resident < 24);
    let (step, forward) = (stats.step_seconds, stats.forward_seconds);
    assert!(0.0 < forward && forward < step, "{forward} of {step} s");
}
