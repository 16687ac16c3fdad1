//! A real server on a free loopback port, and real clients of it.
use prefixd::config::{Config, EngineConfig};
use prefixd::error::Result;
use prefixd::rpc::proto::adapter_service_client::AdapterServiceClient;
use prefixd::rpc::proto::inference_service_client::InferenceServiceClient;
use prefixd::rpc::proto::server_service_client::ServerServiceClient;
use prefixd::rpc::proto::upload_adapter_request::Part;
use prefixd::rpc::proto::{self, generate_request};
use prefixd::server::Server;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// A server that runs until [`Served::stop`] or the end of the test.
pub struct Served {
    pub address: String,
    shutdown: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<()>>,
}

impl Served {
    /// With the embedded model and the shipped adapters.
    pub async fn start(engine: EngineConfig) -> Self {
        Self::with(Config { engine, drain_seconds: 20, ..Config::default() }).await
    }

    /// With other settings.
    pub async fn with(config: Config) -> Self {
        let server = Server::start(config, |_| {}).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (shutdown, stopped) = oneshot::channel();
        let task = tokio::spawn(server.serve(listener, async {
            let _ = stopped.await;
        }));
        Served { address, shutdown: Some(shutdown), task }
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).unwrap().connect().await.unwrap()
    }

    pub async fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    pub async fn adapters(&self) -> AdapterServiceClient<Channel> {
        AdapterServiceClient::new(self.channel().await)
    }

    pub async fn server(&self) -> ServerServiceClient<Channel> {
        ServerServiceClient::new(self.channel().await)
    }

    /// Begins the drain.
    pub fn begin_stop(&mut self) {
        drop(self.shutdown.take());
    }

    /// Waits for the drain's end.
    pub async fn stopped(self) -> Result<()> {
        self.task.await.unwrap()
    }
}

/// A Generate request for text.
pub fn prompt(adapter_id: &str, prompt: &str) -> proto::GenerateRequest {
    proto::GenerateRequest {
        adapter_id: adapter_id.into(),
        input: Some(generate_request::Input::Prompt(prompt.into())),
        ..Default::default()
    }
}

/// The same with a length that only `max_new_tokens` ends.
pub fn long(adapter_id: &str, text: &str, max_new_tokens: u32) -> proto::GenerateRequest {
    let stopping = proto::Stopping { max_new_tokens: Some(max_new_tokens), ignore_eos: true, ..Default::default() };
    // Card stop sequences would end it: a list of its own replaces them.
    let stopping = proto::Stopping { stop_sequences: vec!["\u{1}never\u{1}".into()], ..stopping };
    proto::GenerateRequest { stopping: Some(stopping), ..prompt(adapter_id, text) }
}

/// The parts of an upload.
pub fn upload(id: &str, replace: bool, files: &[(&str, &[u8])]) -> Vec<proto::UploadAdapterRequest> {
    let header = proto::UploadHeader { adapter_id: id.into(), replace, pinned: false };
    let chunk =
        |(name, data): &(&str, &[u8])| Part::Chunk(proto::FileChunk { name: (*name).into(), data: data.to_vec() });
    let parts = std::iter::once(Part::Header(header)).chain(files.iter().map(chunk));
    parts.map(|part| proto::UploadAdapterRequest { part: Some(part) }).collect()
}
