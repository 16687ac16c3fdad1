//! The server, wired: model, engine, store, registry, services; from the start to the last drained stream.
//!
//! Starting and listening are two steps, so that a test or the demo serves on any listener it likes:
//!
//! ```no_run
//! # async fn example() -> prefixd::error::Result<()> {
//! # let config = prefixd::config::Config::default();
//! let server = prefixd::server::Server::start(config, |_| {}).await?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
//! server.serve(listener, async { /* ends when the server is to drain */ }).await
//! # }
//! ```
mod drained;
mod gauges;
mod shipped;
mod training;
mod watching;

use crate::adapter::{AdapterId, Registry, Store};
use crate::blocking;
use crate::config::Config;
use crate::engine::loader::{AdapterLoader, LoadedAll, Parts};
use crate::engine::{Engine, EngineHandle};
use crate::error::{Context, Error, Kind, Result};
use crate::model::{LoadOptions, Model, ModelInfo, source};
use crate::rpc::admission::{self, Admission};
use crate::rpc::drain::Drain;
use crate::rpc::{self, Services, adapters::Adapters, inference::Inference, proto, server_info::ServerInfo};
use crate::telemetry;
use crate::training::jobs::Jobs;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::TcpListener;

pub use drained::terminated;
pub use shipped::adapter_folder;

/// Calls at once on one connection. Beyond it HTTP/2 makes the client wait; what the engine cannot hold is
/// refused by the engine, with a status.
const STREAMS_PER_CONNECTION: u32 = 4096;

/// Metadata of one call: ids, deadlines, tokens of a proxy.
const MAX_HEADER_BYTES: u32 = 32 << 10;

/// A client that lost its network is noticed after this and [`KEEPALIVE_TIMEOUT`].
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// For the last checkpoints of training jobs to come to disk.
const JOBS_STOP: Duration = Duration::from_secs(10);

/// What a start has got done.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The model's files are being found, read and packed.
    Model(&'a str),
    /// The model is ready.
    ModelReady(&'a ModelInfo),
    /// Of so many adapters in the store, this one is done.
    Adapter {
        /// Which.
        id: &'a AdapterId,
        /// How many are done, this one included.
        done: usize,
        /// How many there are.
        total: usize,
        /// Why it failed, if it did.
        error: Option<&'a Error>,
    },
}

/// A started server that does not listen yet.
pub struct Server {
    config: Config,
    services: Services,
    loader: AdapterLoader,
    drain: Drain,
    loaded: LoadedAll,
    /// Last to go but for the folder: requests that outlive the drain get UNAVAILABLE.
    work: Work,
    /// The shipped adapters' folder, gone with the server.
    _shipped: Option<TempDir>,
}

/// The engine, and the jobs that train on its thread. Dropped in that order, and with a wait for either.
struct Work {
    engine: Engine,
    jobs: Ending,
}

/// Waits at its end until the jobs are on disk.
struct Ending(Option<Jobs>);

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(jobs) = &self.jobs.0 {
            jobs.stop();
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        // The trainer went with the engine; what it said last is to be on disk.
        if self.0.as_ref().is_some_and(|jobs| !jobs.stopped(JOBS_STOP)) {
            tracing::warn!("training jobs: not everything is on disk; they go on from an earlier checkpoint");
        }
    }
}

/// Starts a server and serves on `listener` until `shutdown` is ready, then drains.
pub async fn run(listener: TcpListener, config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    Server::start(config, |_| {}).await?.serve(listener, shutdown).await
}

impl Server {
    /// Loads the model and the adapters. An adapter that fails is FAILED, not the server.
    ///
    /// # Errors
    /// When the model cannot be loaded, the store not opened, or the metrics address not bound.
    pub async fn start(config: Config, mut progress: impl FnMut(Progress<'_>)) -> Result<Self> {
        let started = Instant::now();
        if let Some(listen) = config.metrics_listen {
            telemetry::start_metrics(listen)?;
        }
        progress(Progress::Model(&config.model));
        let model = load_model(&config).await?;
        let info = model.info().clone();
        progress(Progress::ModelReady(&info));
        let (tokenizer, shape) = (model.tokenizer().clone(), model.shape());
        let encoder = shape.encoder;
        let classifier = model.head().map(|head| (head.clone(), info.labels.clone()));
        let chat_template = model.chat_template().clone();
        let engine_config = config.engine.clone();
        let (bench, guest) = training::bench(&model, &config.training);
        let engine = blocking::run("start", move || Engine::start_with(model, &engine_config, Some(guest))).await?;

        let (store, shipped) = open_store(&config).await?;
        let registry = Registry::new(config.limits.max_adapters);
        let loader = AdapterLoader::new(Parts {
            store,
            registry: Arc::clone(&registry),
            engine: engine.handle(),
            shape,
            tokenizer: tokenizer.clone(),
        });
        let total = loader.store().ids()?.len();
        let mut done = 0;
        let loaded = loader
            .load_all(|id, result| {
                done += 1;
                progress(Progress::Adapter { id, done, total, error: result.as_ref().err() });
            })
            .await?;

        let drain = Drain::default();
        let handle = engine.handle();
        let admission = Admission::new(admission::Parts {
            tokenizer,
            chat_template,
            registry: Arc::clone(&registry),
            limits: config.limits.clone(),
            max_model_len: handle.max_model_len(),
            vocab_size: info.vocab_size,
            encoder,
            classifier,
        });
        let inference = Inference { admission, engine: handle.clone(), drain: drain.clone() };
        let training = {
            let (loader, config) = (loader.clone(), config.clone());
            let (inference, drain) = (inference.clone(), drain.clone());
            blocking::run("start", move || training::service(bench, &config, loader, inference, drain)).await?
        };
        let (uploads, jobs) = (Default::default(), training.jobs.clone().ok());
        let work = Work { engine, jobs: Ending(jobs.clone()) };
        let services = Services {
            inference,
            training,
            adapters: Adapters { loader: loader.clone(), uploads, jobs, drain: drain.clone() },
            server: ServerInfo { facts: Arc::new(facts(&info, &config, &handle)), engine: handle, registry, started },
        };
        tracing::info!(
            model = info.name,
            adapters = loaded.ready,
            failed = loaded.failed.len(),
            seconds = started.elapsed().as_secs_f64(),
            "started"
        );
        Ok(Server { config, services, loader, drain, loaded, work, _shipped: shipped })
    }

    /// The model, the limits and the version, as `GetServerInfo` gives them.
    pub fn facts(&self) -> &proto::GetServerInfoResponse {
        &self.services.server.facts
    }

    /// The adapters of the store: how many serve, and which do not.
    pub fn loaded(&self) -> &LoadedAll {
        &self.loaded
    }

    /// The adapters in service.
    pub fn registry(&self) -> &Arc<Registry> {
        self.loader.registry()
    }

    /// The adapters on disk.
    pub fn store(&self) -> &Store {
        self.loader.store()
    }

    /// Serves on `listener` until `shutdown` is ready, then drains: no new work, health NOT_SERVING, and running
    /// requests have `drain_seconds` to finish. The same when the engine ends by itself, which is an error.
    ///
    /// # Errors
    /// `Internal` when the listener fails or the engine has ended.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
        let Server { config, services, loader, drain, work, _shipped, .. } = self;
        let (health, health_service) = tonic_health::server::health_reporter();
        for name in Services::NAMES {
            health.set_service_status(name, tonic_health::ServingStatus::Serving).await;
        }
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(rpc::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let routes = services
            .routes(config.limits.max_message_bytes)
            .add_service(health_service)
            .add_service(reflection().build_v1().or_kind(Kind::Internal, "reflection")?)
            .add_service(reflection().build_v1alpha().or_kind(Kind::Internal, "reflection")?);
        let _watching = if config.watch { Some(watching::start(loader.clone())?) } else { None };
        let _gauges = gauges::start(work.engine.handle(), Arc::clone(loader.registry()));

        let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
        let running = work.engine.handle();
        let stop = async {
            tokio::select! {
                () = shutdown => {}
                () = running.ended() => tracing::error!("the engine has ended: no request can be served"),
            }
        };
        let drained = drained::Drained { drain, health, grace: Duration::from_secs(config.drain_seconds) };
        let served = drained.serve(http2(), routes, incoming, stop).await;
        let lost = running.has_ended();
        // Joins a thread: not for the runtime's own.
        blocking::run("stop", move || {
            drop(work);
            Ok(())
        })
        .await?;
        served?;
        if lost { Err(Error::internal("the engine ended by itself: the log says why")) } else { Ok(()) }
    }
}

fn http2() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        // A client may cancel as many calls as it may start, without losing its connection.
        .http2_max_pending_accept_reset_streams(Some(STREAMS_PER_CONNECTION as usize))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

async fn load_model(config: &Config) -> Result<Model> {
    let name = config.model.clone();
    let options = LoadOptions {
        device: config.device,
        dtype: config.dtype,
        quantize: config.quantize,
        threads: config.engine.threads,
        max_model_len: config.engine.max_model_len,
        kv_cache_dtype: config.engine.kv_cache_dtype,
        enforce_eager: config.engine.enforce_eager,
    };
    blocking::run("start", move || Model::load(&source::resolve(&name)?, options)).await
}

/// The configured store, or the shipped adapters in a folder of their own.
async fn open_store(config: &Config) -> Result<(Store, Option<TempDir>)> {
    let (dir, max_bytes) = (config.adapters.clone(), config.limits.max_adapter_bytes);
    blocking::run("start", move || match dir {
        Some(dir) => Ok((Store::open(&dir)?.with_max_bytes(max_bytes), None)),
        None => {
            let folder = tempfile::Builder::new().prefix("prefixd-adapters-").tempdir();
            let folder = folder.or_kind(Kind::Internal, "folder for the shipped adapters")?;
            let store = Store::open(folder.path())?.with_max_bytes(max_bytes);
            shipped::write(&store)?;
            Ok((store, Some(folder)))
        }
    })
    .await
}

fn facts(info: &ModelInfo, config: &Config, engine: &EngineHandle) -> proto::GetServerInfoResponse {
    proto::GetServerInfoResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        model: Some(proto::ModelInfo {
            name: info.name.clone(),
            family: info.family.into(),
            num_parameters: info.num_parameters,
            num_layers: info.num_layers as u32,
            hidden_size: info.hidden_size as u32,
            num_attention_heads: info.num_attention_heads as u32,
            num_key_value_heads: info.num_kv_heads as u32,
            head_dim: info.head_dim as u32,
            vocab_size: info.vocab_size as u32,
            dtype: info.dtype.into(),
            kv_cache_dtype: info.kv_cache_dtype.into(),
            device: info.device.clone(),
            encoder: info.encoder,
            labels: info.labels.clone(),
        }),
        limits: Some(proto::Limits {
            max_model_len: engine.max_model_len() as u32,
            max_prompt_bytes: config.limits.max_prompt_bytes as u32,
            max_n: config.limits.max_n as u32,
            max_continuations: config.limits.max_continuations as u32,
            kv_tokens: engine.kv_tokens() as u64,
            max_sequences: config.engine.max_sequences as u32,
            max_batch_tokens: config.engine.max_batch_tokens as u32,
            max_queue: config.engine.max_queue as u32,
            max_adapters: config.limits.max_adapters as u32,
        }),
    }
}
