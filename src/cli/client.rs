//! How the client commands reach a server.
use super::Failure;
use crate::rpc::proto::adapter_service_client::AdapterServiceClient;
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use crate::rpc::proto::server_service_client::ServerServiceClient;
use clap::Args;
use std::io::Read;
use std::time::Duration;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

/// A server that is there answers a connection well within this.
const CONNECT: Duration = Duration::from_secs(5);

/// Which server, and how long to wait for it.
#[derive(Clone, Debug, Args)]
pub(super) struct Connection {
    /// The server.
    #[arg(long, env = "PREFIXD_SERVER", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub server: String,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Names the request in the server's log.
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
}

/// Prefixes of other adapters before the task's own, and which of its tasks.
#[derive(Clone, Debug, Args)]
pub(super) struct Stack {
    /// An adapter whose prefix stands before the task's; may be given more than once.
    #[arg(long = "before", value_name = "ID")]
    pub prefix_adapters: Vec<String>,
    /// Which task of a multitask adapter, counted from 0.
    #[arg(long, requires = "adapter", value_name = "N")]
    pub task: Option<u32>,
}

impl Connection {
    pub async fn inference(&self) -> Result<InferenceServiceClient<Channel>, Failure> {
        Ok(InferenceServiceClient::new(connect(&self.server).await?).max_decoding_message_size(usize::MAX))
    }

    pub async fn adapters(&self) -> Result<AdapterServiceClient<Channel>, Failure> {
        Ok(AdapterServiceClient::new(connect(&self.server).await?).max_decoding_message_size(usize::MAX))
    }

    pub async fn facts(&self) -> Result<ServerServiceClient<Channel>, Failure> {
        Ok(ServerServiceClient::new(connect(&self.server).await?))
    }

    /// `message` with the deadline and the id asked for.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = Request::new(message);
        if let Some(seconds) = self.timeout {
            let timeout = Duration::try_from_secs_f64(seconds);
            request.set_timeout(timeout.map_err(|e| Failure::usage(format!("--timeout {seconds}: {e}")))?);
        }
        if let Some(id) = &self.request_id {
            let id = MetadataValue::try_from(id).map_err(|e| Failure::usage(format!("--request-id {id:?}: {e}")))?;
            request.metadata_mut().insert("x-request-id", id);
        }
        Ok(request)
    }
}

/// A channel to `server`; `http://` may be left out.
pub(super) async fn connect(server: &str) -> Result<Channel, Failure> {
    let url = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let endpoint = Endpoint::from_shared(url).map_err(|e| Failure::usage(format!("--server {server:?}: {e}")))?;
    let endpoint = endpoint.connect_timeout(CONNECT).tcp_nodelay(true);
    endpoint.connect().await.map_err(|source| Failure::Connect { server: server.to_owned(), source })
}

/// The prompt of the command line; `-` is stdin, without the line end that `echo` adds.
pub(super) fn prompt(argument: &str) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|e| Failure::usage(format!("stdin: {e}")))?;
    Ok(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
}
