//! `prefixd bench`: arguments in, the report out. What is done lies in [`crate::bench`].
mod files;
mod shown;

use super::client::connect;
use super::serve::{Hosted, Loading};
use super::{Failure, Terminal};
use crate::bench::{
    self, Lengths, Limits, Load, Method, Plan, Popularity, Recipe, Requests, Setup, Stop, Stopper, Sweep, Synthetic,
    Tasks, Until,
};
use crate::error::Error;
use crate::rpc::proto;
use crate::server::{Server, terminated};
use clap::Args;
use shown::Shown;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::transport::Channel;

/// Connections to the server: streams of one share a flow control window and a task on each side.
const CHANNELS: usize = 4;

/// Seconds of a run of a sweep over rates, where nothing else ends it.
const SWEEP_SECONDS: f64 = 10.0;

/// Requests of a run, where nothing else ends it.
const REQUESTS: u64 = 100;

/// Requests at once, where nobody says when to send.
const CONCURRENCY: usize = 16;

/// Adapters that are made, where nobody says how many.
const ADAPTERS: usize = 10;

/// Coefficient of variation of the gaps between requests: Poisson.
const CV: f64 = 1.0;

/// Measure a server under load: throughput, latencies, fairness, over adapters and rates.
#[derive(Debug, Args)]
pub(super) struct Bench {
    /// A running server; without it, one is started in this process.
    #[arg(
        long,
        value_name = "URL",
        conflicts_with_all = ["model", "adapters", "device", "dtype", "quantize", "max_sequences", "max_batch_tokens", "max_queue",
            "max_model_len", "kv_tokens", "kv_memory_mib", "kv_cache_dtype",
            "gpu_memory_utilization", "enforce_eager", "threads"]
    )]
    server: Option<String>,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Runs one after the other: adapters:1,10,100,1000, or rate:2.. (doubles until under 90 % of the requests are
    /// within --goodput, then closes in), or rate:2..64.
    #[arg(long, value_name = "SWEEP")]
    sweep: Option<Sweep>,
    /// Limits that a request must keep to count as goodput, in ms: ttft:MS tpot:MS e2el:MS.
    #[arg(long, num_args = 1..=3, value_name = "WHAT:MS")]
    goodput: Vec<Limits>,
    /// Write the report as one self-contained page.
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE.json")]
    save: Option<PathBuf>,
    #[command(flatten)]
    hosted: Hosted,
}

/// What requests say.
#[derive(Debug, Args)]
#[command(next_help_heading = "Requests")]
struct RequestArgs {
    /// JSON lines {"adapter": id or null, "prompt": text, "max_new_tokens": N}, the last optional; without it, random
    /// prompts for adapters that are made for the run.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["num_adapters", "method", "prefix_len", "prompt_len"])]
    tasks: Option<PathBuf>,
    /// Random adapters to make, upload and remove again; 0: the bare base [default: 10].
    #[arg(long, value_name = "N")]
    num_adapters: Option<usize>,
    /// What they are.
    #[arg(long, value_enum, default_value_t)]
    method: Method,
    /// Virtual tokens of each: N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SD.
    #[arg(long, value_name = "TOKENS", default_value = "20")]
    prefix_len: Lengths,
    /// Length of random prompts, likewise.
    #[arg(long, value_name = "TOKENS", default_value = "64")]
    prompt_len: Lengths,
    /// Length of outputs, likewise: exact for random prompts; for tasks the most, where a line does not say
    /// [default: 32; for tasks: the task card's].
    #[arg(long, value_name = "TOKENS")]
    output_len: Option<Lengths>,
    /// Go on after end-of-sequence tokens; random prompts always do.
    #[arg(long, requires = "tasks")]
    ignore_eos: bool,
    /// Which adapter a request names: identical, distinct (in turn), uniform or zipf:A [default: uniform; for tasks:
    /// the order of the file].
    #[arg(long, value_name = "HOW")]
    popularity: Option<Popularity>,
    /// Draw tokens at this temperature; 0 is greedy [default: the task card's, else greedy].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Draw from the smallest set whose probability reaches this.
    #[arg(long, value_name = "P", requires = "temperature", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Where every draw comes from. A running server that has seen a seed's random prompts has them in its cache: give
    /// another seed, or the second run is faster than the first.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// When requests are sent.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load")]
struct LoadArgs {
    /// Send so many requests a second, whatever the server does. Times then count from when a request was due, so that
    /// a sending that comes late is no gain.
    #[arg(long, value_name = "R", conflicts_with = "concurrency")]
    request_rate: Option<f64>,
    /// Coefficient of variation of the gaps between them, which are gamma distributed: 1 is Poisson, 0 is even
    /// [default: 1].
    #[arg(long, value_name = "C")]
    cv: Option<f64>,
    /// Keep so many requests under way [default: 16].
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// End after so many requests [default: 100].
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    num_requests: Option<u64>,
    /// Send for so many seconds [default: 10 for each run of a sweep over rates].
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Requests before each run that are not counted.
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: u64,
    /// A request that takes longer has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    timeout: f64,
    /// Milliseconds between two looks at the server's figures.
    #[arg(long, value_name = "MS", default_value_t = 50.0)]
    sample_ms: f64,
}

impl Bench {
    pub async fn run(self, terminal: &Terminal) -> Result<(), Failure> {
        let mut plan = self.plan()?;
        // Before anything runs: an hour's figures must not end at a folder that is not there.
        for path in [&self.report, &self.save].into_iter().flatten() {
            files::writable(path)?;
        }
        let (stopper, stop) = Stopper::new();
        let interrupts = tokio::spawn(interrupts(stopper));
        let report = match &self.server {
            Some(server) => {
                plan.setup.server = format!("at {server}");
                drive(server, &plan, &stop, terminal).await
            }
            None => {
                plan.setup.server = "in the process of the load generator, over loopback".to_owned();
                self.host(&plan, &stop, terminal).await
            }
        };
        interrupts.abort();
        let report = report?;
        terminal.line(report.text(terminal.width()));
        let object = report.to_json();
        if let Some(path) = &self.save {
            files::write(path, &format!("{object:#}\n"))?;
            terminal.note(format!("figures: {}", path.display()));
        }
        if let Some(path) = &self.report {
            files::write(path, &report.html()?)?;
            terminal.note(format!("report: {}", path.display()));
        }
        terminal.json(&object);
        match report.points.iter().map(|p| p.metrics.completed).sum::<usize>() {
            0 => Err(Failure::local("no request was completed")),
            _ => Ok(()),
        }
    }

    fn plan(&self) -> Result<Plan, Failure> {
        let (r, l) = (&self.requests, &self.load);
        let cv = within("cv", l.cv.unwrap_or(CV), 0.0, 100.0)?;
        let load = match (l.request_rate, l.concurrency) {
            (Some(rate), _) => Load::Rate { rate: within("request_rate", rate, 1e-3, 1e6)?, cv },
            (None, Some(0)) => return Err(wrong("concurrency", 0, "must be at least 1")),
            (None, n) => Load::Concurrency(n.unwrap_or(CONCURRENCY)),
        };
        let load = match self.sweep {
            Some(Sweep::Rate { .. }) if l.concurrency.is_some() || l.request_rate.is_some() => {
                let rule = "sets the rates itself: leave --request-rate and --concurrency out";
                return Err(wrong("sweep", "over rates", rule));
            }
            Some(Sweep::Rate { from, .. }) => Load::Rate { rate: from, cv },
            _ => load,
        };
        if let (Some(cv), Load::Concurrency(_)) = (l.cv, load) {
            let rule = "which spreads the gaps of a rate: give one by --request-rate or --sweep, or leave --cv out";
            return Err(wrong("cv", cv, rule));
        }
        if let (Some(n), Some(Sweep::Adapters(_))) = (r.num_adapters, &self.sweep) {
            return Err(wrong("num_adapters", n, "but --sweep adapters: sets the numbers: leave --num-adapters out"));
        }
        let seconds = |field, s| within(field, s, 1e-3, 1e6).map(Duration::from_secs_f64);
        let until = match (l.num_requests, l.duration, &self.sweep) {
            (Some(0), ..) => return Err(wrong("num_requests", 0, "must be at least 1")),
            (Some(n), ..) => Until::Requests(n),
            (None, Some(s), _) => Until::Elapsed(seconds("duration", s)?),
            (None, None, Some(Sweep::Rate { .. })) => Until::Elapsed(Duration::from_secs_f64(SWEEP_SECONDS)),
            (None, None, _) => Until::Requests(REQUESTS),
        };
        let requests = match &r.tasks {
            Some(path) => Requests::Tasks(Tasks::read(path, r.output_len, r.ignore_eos).map_err(Failure::Usage)?),
            None => Requests::Synthetic {
                adapters: r.num_adapters.unwrap_or(ADAPTERS),
                recipe: Recipe { method: r.method, prefix_len: r.prefix_len },
                synthetic: Synthetic {
                    prompt_len: r.prompt_len,
                    output_len: r.output_len.unwrap_or(Lengths::Fixed(32)),
                },
            },
        };
        let sampling = match r.temperature {
            None => None,
            Some(t) => {
                within("temperature", f64::from(t), 0.0, 100.0)?;
                Some(proto::Sampling { temperature: Some(t), top_p: r.top_p, ..Default::default() })
            }
        };
        Ok(Plan {
            requests,
            popularity: r.popularity,
            load,
            until,
            warmup: l.warmup,
            seed: r.seed,
            sampling,
            timeout: seconds("timeout", l.timeout)?,
            goodput: Limits::all(&self.goodput).map_err(Failure::Usage)?,
            sweep: self.sweep.clone(),
            sample_every: Duration::from_secs_f64(within("sample_ms", l.sample_ms, 1.0, 1e6)? * 1e-3),
            setup: Setup { command: command(), server: String::new(), host: bench::describe_host() },
        })
    }

    /// Starts a server on a free port, and drives that.
    async fn host(&self, plan: &Plan, stop: &Stop, terminal: &Terminal) -> Result<bench::Report, Failure> {
        let config = self.hosted.config()?;
        let mut loading = Loading::new(terminal);
        let server = tokio::select! {
            server = Server::start(config, |step| loading.step(step)) => server?,
            () = stop.stopped() => return Err(Failure::local("stopped before the server was ready")),
        };
        loading.done();
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        let listener = listener.map_err(|e| Failure::local(format!("a free port: {e}")))?;
        let address = listener.local_addr().map_err(|e| Failure::local(format!("listener: {e}")))?;
        let (end, ended) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(listener, async {
            // Told, or the bench is gone: both end the server.
            let _ = ended.await;
        }));
        let report = drive(&address.to_string(), plan, stop, terminal).await;
        drop(end);
        serving.await.map_err(|e| Failure::local(format!("server: {e}")))??;
        report
    }
}

async fn drive(server: &str, plan: &Plan, stop: &Stop, terminal: &Terminal) -> Result<bench::Report, Failure> {
    let mut channels: Vec<Channel> = Vec::with_capacity(CHANNELS);
    for _ in 0..CHANNELS {
        channels.push(connect(server).await?);
    }
    let mut shown = Shown::new(terminal);
    let report = bench::run(&channels, plan, stop, &mut |progress| shown.step(&progress)).await;
    shown.bar.finish_and_clear();
    Ok(report?)
}

/// The first interrupt ends the run and keeps its figures; whoever asks twice does not want to wait.
async fn interrupts(stopper: Stopper) {
    terminated().await;
    stopper.stop();
    terminated().await;
    std::process::exit(130);
}

/// The command as it can be given again.
fn command() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@+".contains(c);
    let quoted = |arg: String| match arg.is_empty() || !arg.chars().all(plain) {
        true => format!("'{}'", arg.replace('\'', "'\\''")),
        false => arg,
    };
    // Where the program lies says nothing about the run.
    std::iter::once("prefixd".to_owned())
        .chain(std::env::args_os().skip(1).map(|arg| quoted(arg.to_string_lossy().into_owned())))
        .collect::<Vec<_>>()
        .join(" ")
}

fn within(field: &'static str, value: f64, low: f64, high: f64) -> Result<f64, Failure> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(wrong(field, value, &format!("must be from {low} to {high}")))
}

fn wrong(field: &'static str, value: impl std::fmt::Display, rule: &str) -> Failure {
    Failure::Usage(Error::invalid(field, value, rule))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        bench: Bench,
    }

    fn plan(arguments: &str) -> Result<Plan, String> {
        let arguments = std::iter::once("bench").chain(arguments.split_whitespace());
        let only = Only::try_parse_from(arguments).map_err(|e| e.to_string())?;
        only.bench.plan().map_err(|e| e.to_string())
    }

    #[test]
    fn bench_defaults_depend_on_the_sweep() {
        let usual = plan("").unwrap();
        assert_eq!((usual.load, usual.until), (Load::Concurrency(16), Until::Requests(100)));
        let rates = plan("--sweep rate:2.. --goodput ttft:200 tpot:50").unwrap();
        assert_eq!(rates.load, Load::Rate { rate: 2.0, cv: 1.0 });
        assert_eq!(rates.until, Until::Elapsed(Duration::from_secs(10)));
        assert_eq!(rates.goodput.describe(), "ttft:200 tpot:50");
        let open = plan("--request-rate 5 --cv 0 --duration 2.5").unwrap();
        assert_eq!(
            (open.load, open.until),
            (Load::Rate { rate: 5.0, cv: 0.0 }, Until::Elapsed(Duration::from_millis(2500)))
        );
        let both = plan("--sweep adapters:1,2 --request-rate 5 --cv 2").unwrap();
        assert_eq!(both.load, Load::Rate { rate: 5.0, cv: 2.0 });
        let adapters = |plan: &Plan| match plan.requests {
            Requests::Synthetic { adapters, .. } => adapters,
            Requests::Tasks(_) => panic!("no tasks were given"),
        };
        assert_eq!((adapters(&usual), adapters(&plan("--num-adapters 3").unwrap())), (10, 3));
    }

    #[test]
    fn bench_arguments_that_exclude_each_other_are_refused_by_name() {
        for (arguments, part) in [
            ("--server http://x --model y", "--model"),
            ("--server http://x --kv-tokens 5", "--kv-tokens"),
            ("--tasks x --prompt-len 5", "--prompt-len"),
            ("--request-rate 5 --concurrency 5", "--concurrency"),
            ("--num-requests 5 --duration 5", "--duration"),
            ("--ignore-eos", "--tasks"),
            ("--prompt-len uniform:5", "uniform:LOW:HIGH"),
            ("--request-rate 0", "`request_rate` is 0, must be from 0.001"),
            ("--concurrency 0", "`concurrency` is 0"),
            ("--sweep rate:2.. --request-rate 5", "leave --request-rate"),
            ("--concurrency 5 --cv 2", "leave --cv out"),
            ("--cv 1", "leave --cv out"),
            ("--sweep adapters:1,2 --cv 2", "leave --cv out"),
            ("--request-rate 5 --cv 101", "`cv` is 101"),
            ("--sweep adapters:1,2 --num-adapters 5", "leave --num-adapters out"),
            ("--tasks x --num-adapters 5", "--num-adapters"),
            ("--tasks nowhere.jsonl", "nowhere.jsonl"),
        ] {
            let message = plan(arguments).unwrap_err();
            assert!(message.contains(part), "{arguments}: {message}");
        }
    }
}
