//! Each method: together with others as alone, and where it fails.
use super::*;
use prefixd::rpc::proto::{PromptInit, PromptReparametrisation, TrainingMethod};

/// The methods, each with what makes it special.
fn methods() -> Vec<(&'static str, proto::CreateTrainingJobRequest)> {
    use PromptReparametrisation::{Lstm, Projection};
    let with = |id: &'static str, method: TrainingMethod, change: &dyn Fn(&mut proto::TrainingSettings)| {
        let mut request = job(id, 5);
        let settings = request.settings.as_mut().unwrap();
        settings.method = method.into();
        change(settings);
        (id, request)
    };
    let mut tasks = with("tasks", TrainingMethod::MultitaskPromptTuning, &|s| s.num_ranks = Some(2));
    let mut data = examples(24);
    data.iter_mut().enumerate().for_each(|(i, e)| e.task_id = Some(i as u32 % 3));
    tasks.1.data = inline(data);
    vec![
        with("prefix", TrainingMethod::PrefixTuning, &|_| ()),
        with("prefix-random", TrainingMethod::PrefixTuning, &|s| s.init = PromptInit::Random.into()),
        with("projection", TrainingMethod::PrefixTuning, &|s| s.reparametrisation = Projection.into()),
        with("prompt", TrainingMethod::PromptTuning, &|s| s.init = PromptInit::SampledVocabulary.into()),
        with("mlp", TrainingMethod::PTuning, &|s| s.accumulation_steps = Some(2)),
        with("lstm", TrainingMethod::PTuning, &|s| s.reparametrisation = Lstm.into()),
        with("restarts", TrainingMethod::PromptTuning, &|s| {
            (s.restarts, s.evaluation_share, s.evaluation_interval) = (Some(2), Some(0.25), Some(2));
        }),
        tasks,
    ]
}

/// All methods at once in shared batches, then one after the other with every layer computed again: the same adapters.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_together_give_what_each_gives_alone() {
    let mut digests = Vec::new();
    for (running, recomputation) in [(8, proto::Recomputation::Never), (1, proto::Recomputation::Always)] {
        let served = server(None, TrainingConfig { max_running: running, ..TrainingConfig::default() }).await;
        let mut client = client(&served).await;
        let mut ids = Vec::new();
        for (_, mut request) in methods() {
            request.settings.as_mut().unwrap().recomputation = recomputation.into();
            ids.push(create(&mut client, request).await.unwrap());
        }
        let mut all = Vec::new();
        for ((name, _), id) in methods().into_iter().zip(ids) {
            let (steps, _, job) = follow(&mut client, &id).await;
            assert_eq!(job.state(), TrainingJobState::Succeeded, "{name}: {}", job.error);
            let get = proto::GetAdapterRequest { adapter_id: name.into() };
            let adapter = served.adapters().await.get_adapter(get).await.unwrap().into_inner().adapter.unwrap();
            if name == "tasks" {
                // Each example is asked as its task; the bare base beside it has none.
                let data = methods().pop().unwrap().1.data;
                let evaluate = proto::EvaluateRequest { adapter_id: name.into(), data, ..Default::default() };
                let measured = client.evaluate(evaluate).await.unwrap().into_inner();
                let scores = [measured.scores.unwrap(), measured.base_scores.unwrap()];
                assert!(scores.iter().all(|s| s.perplexity.unwrap() > 1.0), "{scores:?}");
            }
            all.push((name, adapter.digest, steps.iter().map(|s| s.loss.to_bits()).collect::<Vec<_>>()));
        }
        digests.push(all);
    }
    for (together, alone) in digests[0].iter().zip(&digests[1]) {
        assert_eq!(together, alone);
    }
}

/// One job's loss is not a number; the job beside it, in the same batches, ends as if it had been alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_diverges_fails_alone() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let wild_job = || {
        let mut wild = job("wild", 60);
        let settings = wild.settings.as_mut().unwrap();
        (settings.learning_rate, settings.max_gradient_norm) = (Some(1000.0), Some(0.0));
        settings.weight_decay = Some(10.0);
        wild
    };
    let calm = create(&mut client, job("calm", 20)).await.unwrap();
    let wild = create(&mut client, wild_job()).await.unwrap();
    let job = follow(&mut client, &wild).await.2;
    assert_eq!(job.state(), TrainingJobState::Failed);
    assert!(job.error.contains("lower the learning rate"), "{}", job.error);
    // With several starts each is given up, and the job when none had a result.
    let mut again = wild_job();
    again.settings.as_mut().unwrap().restarts = Some(2);
    let watch = proto::WatchTrainingJobRequest { job_id: create(&mut client, again).await.unwrap() };
    let mut events = client.watch_training_job(watch).await.unwrap().into_inner();
    let (mut given_up, mut last) = (Vec::new(), None);
    while let Some(message) = events.message().await.unwrap() {
        match message.event.unwrap() {
            Event::Divergence(d) => given_up.push((d.restart, d.reason)),
            Event::Job(job) => last = Some(job),
            Event::Step(_) | Event::Evaluation(_) => {}
        }
    }
    assert!(given_up.len() == 1 && given_up[0].0 == 0 && given_up[0].1.contains("learning rate"), "{given_up:?}");
    let last = last.unwrap();
    assert_eq!(last.state(), TrainingJobState::Failed);
    assert!(last.error.contains("each of 2 restarts diverged"), "{}", last.error);
    assert_eq!(follow(&mut client, &calm).await.2.state(), TrainingJobState::Succeeded);
}
