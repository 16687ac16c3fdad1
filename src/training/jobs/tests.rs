#![allow(clippy::unwrap_used)]
use super::*;
use crate::model::{LoadOptions, Model, source};
use crate::training::dataset::Record;
use crate::training::run::Progress;
use crate::training::settings::Settings;
use std::sync::mpsc::channel;

fn base() -> Base {
    let model = Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap();
    Base {
        shape: model.shape(),
        info: model.info().clone(),
        tokenizer: model.tokenizer().clone(),
        chat_template: model.chat_template().clone(),
        eos: model.eos_token_ids().first().copied(),
        row_bytes: model.activation_bytes_per_row(),
    }
}

fn job(name: &str) -> NewJob {
    let record =
        |i: usize| Record { input: Some(format!("on day {i}")), target: Some("we meet".into()), ..Record::default() };
    NewJob {
        adapter_id: AdapterId::parse(name).unwrap(),
        settings: Settings { max_steps: 10, ..Settings::default() },
        card: String::new(),
        load: false,
        pinned: false,
        data: (0..20).map(record).collect(),
        evaluation: Vec::new(),
    }
}

/// Waits until `id` is in `state`.
fn until(jobs: &Jobs, id: &str, state: JobState) -> JobStatus {
    for _ in 0..2000 {
        let status = jobs.get(id).unwrap();
        if status.state == state {
            return status;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{id} is {:?}, not {state:?}", jobs.get(id).unwrap().state);
}

/// A checkpoint for which the disk has no room ends its job with that reason; the job beside it goes on, and is kept.
#[test]
fn a_full_disk_ends_the_job_that_meets_it() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(&dir.path().join("jobs.sqlite")).unwrap();
    journal.limit_pages(60);
    let (orders, taken) = channel();
    let (clerk, events) = channel();
    let wires = Wires {
        orders,
        clerk: clerk.clone(),
        events,
        wake: Box::new(|| ()),
        publish: Box::new(|_| panic!("nothing is published here")),
    };
    let limits =
        Limits { running: 2, queued: 2, kept: 10, examples: 100, batch_bytes: usize::MAX, weight_bytes: usize::MAX };
    let jobs = Jobs::start(base(), limits, journal, wires).unwrap();
    let large = jobs.create(job("large")).unwrap().id;
    let small = jobs.create(job("small")).unwrap().id;
    until(&jobs, &large, JobState::Running);
    until(&jobs, &small, JobState::Running);
    clerk.send(Event::Checkpoint(large.clone(), Progress::default(), vec![7; 4 << 20])).unwrap();
    let failed = until(&jobs, &large, JobState::Failed);
    assert!(failed.error.contains("checkpoint") && failed.error.contains("full"), "{}", failed.error);
    let cancelled = taken.try_iter().any(|order| matches!(order, Order::Cancel(id) if id == large));
    assert!(cancelled, "the trainer is told");
    let mut progress = Progress::default();
    progress.step = 3;
    clerk.send(Event::Checkpoint(small.clone(), progress, vec![9; 1000])).unwrap();
    clerk.send(Event::Stopped).unwrap();
    assert_eq!(until(&jobs, &small, JobState::Running).error, "");
    // What is on disk after all: the reason of the one, the checkpoint of the other.
    let journal = loop {
        drop(jobs.list());
        let journal = jobs.inner.journal();
        if journal.checkpoint(&small).unwrap().is_some() {
            break journal;
        }
        drop(journal);
        std::thread::sleep(Duration::from_millis(5));
    };
    let rows = journal.jobs().unwrap();
    let of = |id: &str| rows.iter().find(|row| row.id == id).unwrap();
    assert!(of(&large).state == JobState::Failed && of(&large).error.contains("full"));
    assert_eq!(of(&small).progress.as_ref().unwrap().step, 3);
}

/// A batch that could not be held is refused before anything is written.
#[test]
fn a_batch_that_does_not_fit_into_memory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(&dir.path().join("jobs.sqlite")).unwrap();
    let ((orders, _taken), (clerk, events)) = (channel(), channel());
    let publish: Publish = Box::new(|_| panic!("nothing is published here"));
    let wires = Wires { orders, clerk, events, wake: Box::new(|| ()), publish };
    let limits =
        Limits { running: 1, queued: 2, kept: 10, examples: 100, batch_bytes: 100_000, weight_bytes: usize::MAX };
    let jobs = Jobs::start(base(), limits, journal, wires).unwrap();
    let e = jobs.create(job("wide")).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceExhausted, "{e}");
    assert!(e.to_string().contains("batch_size"), "{e}");
    assert!(jobs.list().is_empty());
}
