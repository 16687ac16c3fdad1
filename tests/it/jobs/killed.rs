//! Jobs of a server whose process is killed.
use super::*;
use prefixd::rpc::proto::TrainingMethod;
use std::process::{Child, Command, Stdio};

/// A server in a process of its own, to be killed.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(dir: &Path) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let child = Command::new(env!("CARGO_BIN_EXE_prefixd"))
            .args(["serve", "--listen", &address, "--adapters"])
            .arg(dir)
            // Between any two steps there is a checkpoint.
            .env("PREFIXD_TRAINING__CHECKPOINT_SECONDS", "0")
            .env("PREFIXD_LOG", "error")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Process { child, address: format!("http://{address}") }
    }

    async fn client(&self) -> Client {
        loop {
            if let Ok(channel) = Channel::from_shared(self.address.clone()).unwrap().connect().await {
                return TrainingServiceClient::new(channel);
            }
            tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        }
    }
}

impl Drop for Process {
    /// SIGKILL.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Killed after several steps of three jobs that share batches, each goes on by itself and leaves the files and the losses of one
/// that was let alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_ends_with_the_same_weights() {
    let request = |name: &str, method: TrainingMethod| {
        let mut request = job(name, 40);
        let settings = request.settings.as_mut().unwrap();
        settings.method = method.into();
        (settings.restarts, settings.evaluation_share, settings.evaluation_interval) = (Some(2), Some(0.25), Some(7));
        request
    };
    let requests = [
        request("kept", TrainingMethod::PTuning),
        request("stored", TrainingMethod::PrefixTuning),
        request("tasks", TrainingMethod::MultitaskPromptTuning),
    ];
    let mut results = Vec::new();
    for kills in [0, 4] {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::start(dir.path());
        let mut client = process.client().await;
        let mut ids = Vec::new();
        for request in &requests {
            ids.push(create(&mut client, request.clone()).await.unwrap());
        }
        for kill in 0..kills {
            let watch = proto::WatchTrainingJobRequest { job_id: ids[0].clone() };
            let mut events = client.watch_training_job(watch).await.unwrap().into_inner();
            let mut seen = 0;
            while seen < 9 * (kill + 1) {
                let message = events.message().await.unwrap().expect("the job ended before it was killed");
                seen += usize::from(matches!(message.event, Some(Event::Step(_))));
            }
            drop(process);
            process = Process::start(dir.path());
            client = process.client().await;
        }
        let mut all = Vec::new();
        for (request, id) in requests.iter().zip(&ids) {
            let (steps, evaluations, job) = follow(&mut client, id).await;
            assert_eq!(job.state(), TrainingJobState::Succeeded, "{}", job.error);
            let file = dir.path().join(&request.adapter_id).join("adapter_model.safetensors");
            let losses: Vec<_> = steps.iter().map(|s| (s.restart, s.step, s.loss.to_bits())).collect();
            let scores: Vec<_> = evaluations.iter().map(|e| (e.restart, e.step, e.loss.to_bits())).collect();
            assert_eq!(losses.len(), 80);
            all.push((losses, scores, std::fs::read(file).unwrap()));
        }
        results.push(all);
    }
    for ((quiet, killed), request) in results[0].iter().zip(&results[1]).zip(&requests) {
        assert_eq!(quiet.0, killed.0, "{}: losses", request.adapter_id);
        assert_eq!(quiet.1, killed.1, "{}: evaluations", request.adapter_id);
        assert!(quiet.2 == killed.2, "{}: the weights differ", request.adapter_id);
    }
}
