//! The end of a server: running streams finish, new work is refused.
use crate::served::{Served, long, prompt};
use prefixd::config::EngineConfig;
use prefixd::rpc::proto::FinishReason;
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
