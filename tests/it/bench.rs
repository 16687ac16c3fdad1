//! The load generator against a real server: what it says it did is what was done. No test looks at how long it took.
use crate::served::Served;
use prefixd::bench::{
    self, Limits, Load, Method, Plan, Point, Progress, Recipe, Report, Requests, Setup, Stop, Stopper, Sweep,
    Synthetic, Tasks, Until,
};
use prefixd::config::EngineConfig;
use prefixd::error::Result;
use prefixd::rpc::proto::ListAdaptersRequest;
use std::time::Duration;

fn plan(adapters: usize, load: Load, requests: u64) -> Plan {
    Plan {
        requests: Requests::Synthetic {
            adapters,
            recipe: Recipe { method: Method::PrefixTuning, prefix_len: "uniform:4:20".parse().unwrap() },
            synthetic: Synthetic {
                prompt_len: "uniform:2:30".parse().unwrap(),
                output_len: "uniform:1:9".parse().unwrap(),
            },
        },
        popularity: Some("zipf:1".parse().unwrap()),
        load,
        until: Until::Requests(requests),
        warmup: 2,
        seed: 7,
        sampling: None,
        timeout: Duration::from_secs(600),
        goodput: Limits::default(),
        sweep: None,
        sample_every: Duration::from_millis(5),
        setup: Setup { command: "prefixd bench".into(), ..Setup::default() },
    }
}

async fn run(served: &Served, plan: &Plan, stop: &Stop, watch: &mut dyn FnMut(Progress)) -> Result<Report> {
    let channels = [served.channel().await, served.channel().await];
    let report = bench::run(&channels, plan, stop, watch).await;
    let page = ListAdaptersRequest { page_size: 1000, ..Default::default() };
    let left = served.adapters().await.list_adapters(page).await.unwrap().into_inner().adapters;
    assert!(left.iter().all(|a| !a.adapter_id.starts_with("bench-")), "its adapters are gone: {left:?}");
    report
}

async fn finished(served: &Served, plan: &Plan) -> Report {
    let (_stopper, stop) = Stopper::new();
    run(served, plan, &stop, &mut |_| {}).await.unwrap()
}

fn accounted(point: &Point) {
    let m = &point.metrics;
    assert_eq!(m.sent, m.completed + m.failures() + m.interrupted);
    assert_eq!(point.of_tenants.iter().map(|t| t.sent).sum::<usize>(), m.sent);
    assert_eq!(point.of_tenants.iter().map(|t| t.completed).sum::<usize>(), m.completed);
    assert_eq!(point.wrong_length, 0, "each answer is as long as was drawn");
    assert_eq!((m.ttft.count, m.e2el.count), (m.completed, m.completed));
    assert_eq!(m.itl.count, m.output_tokens - m.completed);
    assert!(m.ttft.median <= m.e2el.median && m.e2el.median <= m.e2el.p99 && m.e2el.p99 <= m.e2el.max);
    assert!(point.fairness.jain > 0.0 && point.fairness.jain <= 1.0 + 1e-9);
}

/// What a seed asks for does not depend on how it is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_sends_the_same_requests_in_a_closed_and_an_open_loop() {
    let served = Served::start(EngineConfig::default()).await;
    let closed = finished(&served, &plan(3, Load::Concurrency(4), 24)).await;
    let open = finished(&served, &plan(3, Load::Rate { rate: 400.0, cv: 2.0 }, 24)).await;
    let method = |plan: &mut Plan| {
        if let Requests::Synthetic { recipe, .. } = &mut plan.requests {
            recipe.method = Method::PromptTuning;
        }
    };
    let mut soft = plan(3, Load::Concurrency(30), 24);
    method(&mut soft);
    let soft = finished(&served, &soft).await;
    let asked = |report: &Report| {
        let point = &report.points[0];
        accounted(point);
        assert_eq!((report.points.len(), point.metrics.sent, point.metrics.completed), (1, 24, 24));
        // Every request has one of the adapters; warm-up and measured ones both find its pages.
        let (hits, misses) = (point.server.prefix_hits, point.server.prefix_misses);
        assert_eq!((hits + misses, point.server.generated_tokens as usize), (24, point.metrics.output_tokens));
        assert!(point.timeline.len() >= 2 && point.server.kv_pages_total > 0);
        let of_tenants: Vec<_> = point.of_tenants.iter().map(|t| (t.sent, t.output_tokens)).collect();
        (point.metrics.input_tokens, point.metrics.output_tokens, of_tenants)
    };
    assert_eq!(asked(&closed), asked(&open));
    assert_eq!(asked(&closed), asked(&soft));
    let other = finished(&served, &Plan { seed: 8, ..plan(3, Load::Concurrency(4), 24) }).await;
    assert_ne!(asked(&closed), asked(&other));
    // Exact lengths add up to what was drawn.
    let fixed = Requests::Synthetic {
        adapters: 0,
        recipe: Recipe { method: Method::PrefixTuning, prefix_len: "20".parse().unwrap() },
        synthetic: Synthetic { prompt_len: "11".parse().unwrap(), output_len: "7".parse().unwrap() },
    };
    let bare = finished(&served, &Plan { requests: fixed, ..plan(0, Load::Concurrency(5), 10) }).await;
    let m = &bare.points[0].metrics;
    assert_eq!((m.input_tokens, m.output_tokens, bare.points[0].server.prefix_hits), (110, 70, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_counts_failures_by_their_status() {
    let served = Served::start(EngineConfig::default()).await;
    let lines = "{\"adapter\":\"sentiment\",\"prompt\":\"the soup was fine\"}\n{\"adapter\":\"nobody\",\"prompt\":\"x\"}\n\
                 {\"adapter\":null,\"prompt\":\"on monday\",\"max_new_tokens\":5}";
    let requests = Requests::Tasks(Tasks::parse(lines, None, false).unwrap());
    let plan = Plan { requests, popularity: None, ..plan(0, Load::Concurrency(3), 12) };
    let report = finished(&served, &plan).await;
    let (point, m) = (&report.points[0], &report.points[0].metrics);
    assert_eq!((m.sent, m.completed, m.failed["NOT_FOUND"]), (12, 8, 4));
    let sent: Vec<_> = point.of_tenants.iter().map(|t| (t.name.as_str(), t.sent, t.completed)).collect();
    assert_eq!(sent, [("sentiment", 4, 4), ("nobody", 4, 0), ("(bare base)", 4, 4)]);
    assert!(report.text(100).contains("4 failed (4 NOT_FOUND)"), "{}", report.text(100));
    assert_eq!(report.to_json()["failures"]["NOT_FOUND"], 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_stopped_early_reports_what_there_is() {
    let served = Served::start(EngineConfig::default()).await;
    let (stopper, stop) = Stopper::new();
    let plan = Plan { until: Until::Elapsed(Duration::from_secs(3600)), ..plan(2, Load::Concurrency(8), 0) };
    let mut watch = |progress: Progress| {
        if let Progress::Running { done: 10, .. } = progress {
            stopper.stop();
        }
    };
    let report = run(&served, &plan, &stop, &mut watch).await.unwrap();
    let point = &report.points[0];
    accounted(point);
    assert!(report.interrupted && point.metrics.completed >= 10 && point.metrics.sent < 60, "{:?}", point.metrics);
    assert!(report.text(100).contains("Ended early") && report.html().unwrap().contains("Ended early"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_sweeps_make_a_page_that_stands_alone() {
    let served = Served::start(EngineConfig::default()).await;
    let adapters = Plan { sweep: Some("adapters:1,5,3".parse().unwrap()), ..plan(1, Load::Concurrency(4), 12) };
    let report = finished(&served, &adapters).await;
    report.points.iter().for_each(accounted);
    let swept: Vec<_> = report.points.iter().map(|p| (p.swept, p.tenants)).collect();
    assert_eq!(swept, [(Some(1.0), 1), (Some(5.0), 5), (Some(3.0), 3)]);
    assert_eq!(report.shown().unwrap().tenants, 5);
    let json = report.to_json();
    assert_eq!(
        (json["points"][1]["adapters"].as_f64(), json["points"][1]["completed"].as_u64()),
        (Some(5.0), Some(12))
    );
    page(&report, &["throughput", "latency", "ttft", "tpot", "e2el", "batch", "kv", "tenants"]);

    // Limits that everything keeps: the rate is raised to the end of the range, and no further. (What a sweep makes of
    // rates that fail later on, `bench::report` tests on requests whose times are given.)
    let goodput = Limits { e2el: Some(Duration::from_secs(600)), ..Limits::default() };
    let rates = Plan { sweep: Some("rate:100..300".parse().unwrap()), goodput, ..plan(2, Load::Concurrency(1), 8) };
    let report = finished(&served, &rates).await;
    assert_eq!(report.points.iter().filter_map(|p| p.swept).collect::<Vec<_>>(), [100.0, 200.0, 300.0]);
    assert_eq!(report.highest_rate().and_then(|p| p.swept), Some(300.0));
    assert!(report.points.iter().all(|p| (p.metrics.good_share, p.metrics.unsent) == (Some(1.0), 0)));
    page(&report, &["throughput", "latency", "ttft", "tpot", "e2el", "batch", "kv", "tenants"]);

    // Limits that nothing keeps: the first rate fails, and that is all there is to know.
    let goodput = Limits { ttft: Some(Duration::from_nanos(1)), ..Limits::default() };
    let report = finished(&served, &Plan { goodput, ..rates }).await;
    accounted(&report.points[0]);
    assert_eq!((report.points.len(), report.points[0].metrics.good_share), (1, Some(0.0)));
    assert!(report.highest_rate().is_none() && report.text(100).contains("not even at 100 requests/s"));
    page(&report, &["throughput", "latency", "ttft", "tpot", "e2el", "batch", "kv", "tenants"]);

    let single = finished(&served, &plan(2, Load::Concurrency(4), 8)).await;
    page(&single, &["ttft", "tpot", "e2el", "batch", "kv", "tenants"]);
}

/// The server's prefix cache is on: prompts that a run of a sweep has in common with one before it would come from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_runs_of_a_sweep_have_prompts_of_their_own_in_the_same_sizes() {
    let served = Served::start(EngineConfig::default()).await;
    // Prompts of two blocks of the cache at least.
    let requests = Requests::Synthetic {
        adapters: 0,
        recipe: Recipe { method: Method::PrefixTuning, prefix_len: "20".parse().unwrap() },
        synthetic: Synthetic { prompt_len: "uniform:33:60".parse().unwrap(), output_len: "3".parse().unwrap() },
    };
    let goodput = Limits { e2el: Some(Duration::from_secs(600)), ..Limits::default() };
    let plan = Plan { requests, goodput, ..plan(0, Load::Concurrency(1), 8) };
    let rates = Plan { sweep: Some("rate:100..300".parse().unwrap()), ..plan.clone() };
    let report = finished(&served, &rates).await;
    let read: Vec<_> = report.points.iter().map(|p| (p.metrics.input_tokens, p.metrics.cached_tokens)).collect();
    assert_eq!(read, [(read[0].0, 0); 3]);
    assert!(report.text(100).contains(&format!("0 of {} tokens, 0 %", read[0].0)), "{}", report.text(100));
    // A run by itself is the first of a sweep: on the same server it finds all but the rest of a block, and says so.
    let again = finished(&served, &plan).await;
    let m = &again.points[0].metrics;
    assert_eq!(m.input_tokens, read[0].0);
    assert!(m.cached_tokens >= 8 * 32, "{} of {}", m.cached_tokens, m.input_tokens);
    let said = format!("{} of {} tokens", m.cached_tokens, m.input_tokens);
    assert!(again.text(100).contains(&said) && again.html().unwrap().contains(&said), "{said}");
}

/// Each chart is there once, and nothing is fetched from elsewhere.
fn page(report: &Report, plots: &[&str]) {
    let html = report.html().unwrap();
    let found = html.match_indices("<figure id=\"plot-").count();
    assert_eq!(found, plots.len());
    for plot in plots {
        let (_, rest) = html.split_once(&format!("<figure id=\"plot-{plot}\">")).unwrap_or_else(|| panic!("no {plot}"));
        let figure = rest.split_once("</figure>").unwrap().0;
        assert!(figure.contains("<svg ") && figure.contains("</svg>") && figure.contains("<figcaption>"), "{plot}");
        assert!(figure.contains("<polyline") || figure.contains("<circle"), "{plot} shows nothing");
        assert!(!figure.contains("NaN") && !figure.contains("inf"), "{plot}");
    }
    let own = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["<script", "<link", "src=", "href=", "url(", "@import", "http:", "https:", "//"] {
        assert!(!own.contains(outside), "{outside} in the page");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench_refuses_what_the_server_cannot_do() {
    let served = Served::start(EngineConfig::default()).await;
    let (_stopper, stop) = Stopper::new();
    let long = Requests::Synthetic {
        adapters: 1,
        recipe: Recipe { method: Method::PrefixTuning, prefix_len: "20".parse().unwrap() },
        synthetic: Synthetic { prompt_len: "100000".parse().unwrap(), output_len: "7".parse().unwrap() },
    };
    let base = plan(1, Load::Concurrency(1), 1);
    let rates = Some(Sweep::Rate { from: 1.0, to: None });
    for (plan, part) in [
        (Plan { requests: long, ..base.clone() }, "up to 100027 tokens"),
        (plan(1_000_000, Load::Concurrency(1), 1), "max_adapters"),
        (Plan { sweep: rates, ..base.clone() }, "--goodput"),
    ] {
        let message = run(&served, &plan, &stop, &mut |_| {}).await.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}
