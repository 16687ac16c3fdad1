//! What is no job.
use super::*;
use prefixd::rpc::proto::{PromptInit, PromptReparametrisation, TrainingMethod};

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_trained_is_refused_with_its_reason() {
    let (batch_mib, activation_mib) = (64, 16);
    let bounds = TrainingConfig { batch_mib, activation_mib, ..TrainingConfig::default() };
    let served = server(None, TrainingConfig { max_queued: 0, max_running: 1, ..bounds }).await;
    let mut client = client(&served).await;
    let refused = async |client: &mut Client,
                         code: Code,
                         said: &[&str],
                         change: &dyn Fn(&mut proto::CreateTrainingJobRequest)| {
        let mut request = job("new", 3);
        change(&mut request);
        let status = create(client, request).await.expect_err(said[0]);
        assert_eq!(status.code(), code, "{status:?}");
        said.iter().for_each(|said| assert!(status.message().contains(said), "{said}: {}", status.message()));
    };
    let c = &mut client;
    let invalid = Code::InvalidArgument;
    refused(c, Code::AlreadyExists, &["sentiment", "replace"], &|r| r.adapter_id = "sentiment".into()).await;
    refused(c, invalid, &["adapter_id"], &|r| r.adapter_id = "../x".into()).await;
    refused(c, invalid, &["data", "missing"], &|r| r.data = None).await;
    refused(c, invalid, &["example 1", "no `target`"], &|r| {
        let mut all = examples(3);
        all[1].targets.clear();
        r.data = inline(all);
    })
    .await;
    let named = |name: &'static str| {
        move |r: &mut proto::CreateTrainingJobRequest| {
            r.data = Some(proto::Dataset { source: Some(Source::DatasetId(name.into())) })
        }
    };
    refused(c, Code::NotFound, &["nonesuch"], &named("nonesuch")).await;
    refused(c, invalid, &["dataset_id"], &named("../../etc/passwd")).await;
    refused(c, invalid, &["settings.method", "99"], &|r| r.settings.as_mut().unwrap().method = 99).await;
    refused(c, invalid, &["settings.num_virtual_tokens", "0"], &|r| {
        r.settings.as_mut().unwrap().num_virtual_tokens = Some(0)
    })
    .await;
    refused(c, invalid, &["settings.learning_rate", "NaN"], &|r| {
        r.settings.as_mut().unwrap().learning_rate = Some(f64::NAN)
    })
    .await;
    refused(c, invalid, &["settings.reparametrisation", "P_TUNING"], &|r| {
        r.settings.as_mut().unwrap().reparametrisation = PromptReparametrisation::Lstm.into();
    })
    .await;
    refused(c, invalid, &["pinned", "load"], &|r| (r.load, r.pinned) = (false, true)).await;
    refused(c, invalid, &["settings.encoder_hidden_size", "network"], &|r| {
        r.settings.as_mut().unwrap().encoder_hidden_size = Some(8)
    })
    .await;
    refused(c, invalid, &["settings.encoder_num_layers", "LSTM"], &|r| {
        r.settings.as_mut().unwrap().encoder_num_layers = Some(3)
    })
    .await;
    refused(c, invalid, &["settings.num_ranks", "MULTITASK"], &|r| r.settings.as_mut().unwrap().num_ranks = Some(2))
        .await;
    for init in [PromptInit::Text, PromptInit::SampledVocabulary] {
        refused(c, invalid, &["settings.init", "PROJECTION", "RANDOM"], &|r| {
            let settings = r.settings.as_mut().unwrap();
            (settings.init, settings.reparametrisation) = (init.into(), PromptReparametrisation::Projection.into());
        })
        .await;
    }
    refused(c, invalid, &["settings.init_text", "TEXT"], &|r| {
        let settings = r.settings.as_mut().unwrap();
        settings.init_text = "the soup".into();
        settings.reparametrisation = PromptReparametrisation::Projection.into();
    })
    .await;
    refused(c, invalid, &["settings.early_stopping_patience"], &|r| {
        r.settings.as_mut().unwrap().early_stopping_patience = Some(2)
    })
    .await;
    refused(c, invalid, &["settings.target_template"], &|r| {
        r.settings.as_mut().unwrap().target_template = Some("x".into())
    })
    .await;
    refused(c, invalid, &["task.toml", "templat"], &|r| r.task_card = "templat = 1".into()).await;
    refused(c, invalid, &["longer than"], &|r| r.settings.as_mut().unwrap().max_length = Some(3)).await;
    refused(c, invalid, &["none of the card's `labels`", "weird"], &|r| {
        let mut all = examples(3);
        all[2].targets = vec!["weird".into()];
        r.data = inline(all);
        r.settings.as_mut().unwrap().classification_head = true;
        r.task_card = r.task_card.replace("verbalizers = [\" positive\", \" negative\"]\n", "");
    })
    .await;
    refused(c, Code::ResourceExhausted, &["settings.batch_size", "training.batch_mib"], &|r| {
        r.settings.as_mut().unwrap().batch_size = Some(4096);
    })
    .await;
    refused(c, Code::ResourceExhausted, &["NEVER", "training.activation_mib", "AUTO"], &|r| {
        let settings = r.settings.as_mut().unwrap();
        (settings.batch_size, settings.recomputation) = (Some(64), proto::Recomputation::Never.into());
    })
    .await;
    // Weights that no memory could hold, by what the data says and by what the settings say.
    let multitask = |r: &mut proto::CreateTrainingJobRequest| {
        r.settings.as_mut().unwrap().method = TrainingMethod::MultitaskPromptTuning.into();
        let mut all = examples(3);
        all[1].task_id = Some(9_999);
        r.data = inline(all);
    };
    refused(c, Code::ResourceExhausted, &["num_tasks", "training.weights_mib"], &|r| {
        multitask(r);
        r.settings.as_mut().unwrap().num_ranks = Some(1024);
    })
    .await;
    refused(c, invalid, &["task_id", "4294967295", "10000"], &|r| {
        multitask(r);
        let mut all = examples(3);
        all[1].task_id = Some(u32::MAX);
        r.data = inline(all);
    })
    .await;
    refused(c, Code::ResourceExhausted, &["encoder_hidden_size", "training.weights_mib"], &|r| {
        let settings = r.settings.as_mut().unwrap();
        (settings.method, settings.encoder_hidden_size) = (TrainingMethod::PTuning.into(), Some(65_536));
    })
    .await;
    // One that is too long is left out and counted.
    let mut request = job("new", 100_000);
    let mut all = examples(9);
    all[4].input = "the soup ".repeat(300);
    request.data = inline(all);
    let made = client.create_training_job(request).await.unwrap().into_inner().job.unwrap();
    assert_eq!((made.train_examples, made.too_long_examples), (8, 1));
    let twice = create(&mut client, job("new", 3)).await.unwrap_err();
    assert!(twice.code() == Code::AlreadyExists && twice.message().contains(&made.job_id), "{twice:?}");
    let full = create(&mut client, job("another", 3)).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    let unknown = client.get_training_job(proto::GetTrainingJobRequest { job_id: "job-x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}
