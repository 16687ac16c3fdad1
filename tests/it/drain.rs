//! The end of a server: running streams finish, new work is refused.
use crate::served::{Served, long, prompt};
use crate::support;
use prefixd::config::EngineConfig;
use prefixd::engine::{Engine, Guest};
use prefixd::error::Kind;
use prefixd::model::Model;
use prefixd::model::background::Background;
use prefixd::rpc::proto::FinishReason;
use std::time::Duration;
use tokio_stream::StreamExt;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn running_streams_finish_and_new_work_is_refused() {
    let mut served = Served::start(EngineConfig::default()).await;
    let mut client = served.inference().await;
    let mut stream = client.generate_stream(long("", "on monday", 230)).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    served.begin_stop();
    let refused = loop {
        match client.generate(prompt("sentiment", "x")).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let mut reason = 0;
    while let Some(message) = stream.next().await {
        reason = message.unwrap().choice.map_or(reason, |c| c.finish_reason);
    }
    assert_eq!(reason, i32::from(FinishReason::Length), "the stream was cut");
    served.stopped().await.unwrap();
}

/// Work on the engine's thread that fails as no work may.
struct Panics;

impl Background for Panics {
    fn slice(&mut self, _: &Model) -> bool {
        panic!("on purpose")
    }
}

#[tokio::test]
async fn an_engine_that_ends_by_itself_says_so() {
    let guest = Guest { work: Box::new(Panics), share: 0.1, device_bytes: 0 };
    let config = EngineConfig { kv_tokens: 64, ..EngineConfig::default() };
    let engine = Engine::start_with(support::embedded(), &config, Some(guest)).unwrap();
    let handle = engine.handle();
    tokio::time::timeout(Duration::from_secs(60), handle.ended()).await.expect("nobody was told");
    assert!(handle.has_ended());
    let refused = handle.submit(support::request(None, &[1, 2], 1)).err().unwrap();
    assert_eq!(refused.kind(), Kind::Unavailable, "{refused}");
}
