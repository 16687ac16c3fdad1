#![allow(clippy::unwrap_used)]
use super::*;
use crate::model::background::Background;
use crate::model::{LoadOptions, Model, source};
use crate::training::dataset::Record;
use crate::training::run::Progress;
use crate::training::settings::Settings;
use crate::training::trainer::{Bounds, Trainer};
use std::path::Path;

const LIMITS: Limits = Limits {
    running: 2,
    queued: 2,
    kept: 10,
    examples: 10_000,
    batch_bytes: usize::MAX,
    activation_bytes: usize::MAX,
    weight_bytes: usize::MAX,
};

fn model() -> Model {
    Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap()
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

/// Jobs, and the other ends of their channels.
struct Desk {
    jobs: Jobs,
    orders: Receiver<Order>,
    clerk: Sender<Event>,
}

impl Desk {
    fn open(model: &Model, dir: &Path, limits: Limits, publish: Publish) -> Desk {
        let journal = Journal::open(&dir.join("jobs.sqlite")).unwrap();
        let ((orders, taken), (clerk, events)) = (channel(), channel());
        let wires = Wires { orders, clerk: clerk.clone(), events, wake: Box::new(|| ()), publish };
        Desk { jobs: Jobs::start(Base::of(model), limits, journal, wires).unwrap(), orders: taken, clerk }
    }

    /// One on which nothing is published.
    fn new(model: &Model, dir: &Path) -> Desk {
        Desk::open(model, dir, LIMITS, Box::new(|_| panic!("nothing is published here")))
    }

    /// The next job that the trainer is told to begin.
    fn started(&self) -> JobId {
        loop {
            match self.orders.recv_timeout(Duration::from_secs(60)).unwrap() {
                Order::Start(id, ..) => return id,
                Order::Cancel(_) => {}
            }
        }
    }

    /// Waits until the clerk has done all that it was told: it hears of an evaluation of `witness` that nobody else makes.
    fn settled(&self, witness: &str) {
        let mark = rand::random_range(1_000_000..usize::MAX >> 12);
        let what = Happened::Evaluation { loss: 0.0, token_accuracy: 0.0, exact_match: 0.0 };
        self.clerk.send(Event::Reported(witness.into(), Report { restart: 0, step: mark, what })).unwrap();
        for _ in 0..30_000 {
            if self.jobs.get(witness).unwrap().last_evaluation.is_some_and(|e| e.step == mark) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("the clerk does not answer");
    }

    /// After everything that the clerk was told before, nothing was told to begin.
    fn nothing_starts(&self, witness: &str) {
        self.settled(witness);
        assert!(!self.orders.try_iter().any(|order| matches!(order, Order::Start(..))), "it must wait");
    }

    /// A checkpoint after `step` steps.
    fn checkpoint(&self, id: &JobId, step: usize, bytes: usize) {
        self.clerk.send(Event::Checkpoint(id.clone(), after(step), vec![7; bytes], Default::default())).unwrap();
    }

    /// Waits until `id` is in `state`.
    fn until(&self, id: &str, state: JobState) -> JobStatus {
        for _ in 0..4000 {
            let status = self.jobs.get(id).unwrap();
            if status.state == state {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{id} is {:?}, not {state:?}", self.jobs.get(id).unwrap().state);
    }

    /// What lies on disk now, elsewhere: what a kill would leave. The journal is held, so that nothing is half written.
    fn left_by_a_kill(&self, dir: &Path) -> tempfile::TempDir {
        let (copy, _held) = (tempfile::tempdir().unwrap(), self.jobs.inner.journal());
        for file in std::fs::read_dir(dir).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
        copy
    }
}

fn after(steps: usize) -> Progress {
    let mut progress = Progress::default();
    progress.step = steps;
    progress
}

fn bounds() -> Bounds {
    Bounds { batch_rows: 2048, activation_bytes: 1 << 30, checkpoint_every: Duration::MAX }
}

/// A checkpoint for which the disk has no room ends its job with that reason; the job beside it goes on, and is kept.
#[test]
fn a_full_disk_ends_the_job_that_meets_it() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    desk.jobs.inner.journal().limit_pages(60);
    let large = desk.jobs.create(job("large")).unwrap().id;
    let small = desk.jobs.create(job("small")).unwrap().id;
    desk.until(&large, JobState::Running);
    desk.until(&small, JobState::Running);
    desk.checkpoint(&large, 1, 4 << 20);
    let failed = desk.until(&large, JobState::Failed);
    assert!(failed.error.contains("checkpoint") && failed.error.contains("full"), "{}", failed.error);
    let cancelled = desk.orders.try_iter().any(|order| matches!(order, Order::Cancel(id) if id == large));
    assert!(cancelled, "the trainer is told");
    desk.checkpoint(&small, 3, 1000);
    desk.clerk.send(Event::Stopped { orderly: true }).unwrap();
    assert!(desk.jobs.stopped(Duration::from_secs(60)));
    assert_eq!(desk.jobs.get(&small).unwrap().state, JobState::Running);
    // What is on disk after all: the reason of the one, the checkpoint of the other.
    let journal = desk.jobs.inner.journal();
    assert!(journal.checkpoint(&small).unwrap().is_some());
    let rows = journal.jobs().unwrap();
    let of = |id: &str| rows.iter().find(|row| row.id == id).unwrap();
    assert!(of(&large).state == JobState::Failed && of(&large).error.contains("full"));
    assert_eq!(of(&small).progress.as_ref().unwrap().step, 3);
}

/// A job whose data the disk cannot take is refused, and nothing of it is left.
#[test]
fn a_full_disk_refuses_a_new_job() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    desk.jobs.inner.journal().limit_pages(20);
    let large = || {
        let mut large = job("large");
        large.data.iter_mut().for_each(|record| record.input = Some("on day ".repeat(30)));
        large.data = large.data.iter().cycle().take(2000).cloned().collect();
        large
    };
    let e = desk.jobs.create(large()).unwrap_err();
    assert!(e.kind() == Kind::ResourceExhausted && e.to_string().contains("full"), "{e}");
    assert!(desk.jobs.list().is_empty() && desk.jobs.inner.journal().jobs().unwrap().is_empty());
    let small = desk.jobs.create(job("small")).unwrap().id;
    assert_eq!(desk.started(), small);
    desk.jobs.inner.journal().limit_pages(100_000);
    let large = desk.jobs.create(large()).unwrap().id;
    assert_eq!(desk.started(), large);
}

/// Trained, but not written down: the job says why, and nothing is published that a restart would not know of.
#[test]
fn a_full_disk_at_the_end_is_said() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let Desk { jobs, orders, clerk } = Desk::new(&model, dir.path());
    // One step: no checkpoint comes before the end.
    let short = NewJob { settings: Settings { max_steps: 1, ..Settings::default() }, ..job("trained") };
    let id = jobs.create(short).unwrap().id;
    jobs.inner.journal().limit_pages(1);
    let mut trainer = Trainer::new(orders, clerk.clone(), bounds());
    while !jobs.get(&id).unwrap().state.ended() {
        trainer.slice(&model);
    }
    let failed = jobs.get(&id).unwrap();
    assert_eq!(failed.state, JobState::Failed);
    assert!(failed.error.contains("publishing") && failed.error.contains("full"), "{}", failed.error);
}

/// A batch that could not be held is refused before anything is written.
#[test]
fn a_batch_that_does_not_fit_into_memory_is_refused() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let limits = Limits { batch_bytes: 100_000, ..LIMITS };
    let desk = Desk::open(&model, dir.path(), limits, Box::new(|_| panic!("nothing is published here")));
    let e = desk.jobs.create(job("wide")).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceExhausted, "{e}");
    assert!(e.to_string().contains("batch_size"), "{e}");
    assert!(desk.jobs.list().is_empty());
}

/// A batch that goes on into the next epoch may hold the longest example twice, unless the order is the data's.
#[test]
fn the_largest_batch_is_that_of_two_epochs() {
    let model = model();
    let create = |most_rows: usize, keep_order: bool| {
        let dir = tempfile::tempdir().unwrap();
        let info = model.info();
        // Of each sequence of the batch, in the gradient of the prefix's K and V.
        let share = 4 * Settings::default().num_virtual_tokens * 2 * info.num_kv_heads * info.head_dim;
        let limits = Limits { batch_bytes: most_rows * model.activation_bytes_per_row() + 12 * share, ..LIMITS };
        let desk = Desk::open(&model, dir.path(), limits, Box::new(|_| panic!("nothing is published here")));
        let mut long = job("long");
        (long.settings.batch_size, long.settings.keep_order) = (12, keep_order);
        long.data[3].target = Some("we meet ".repeat(40));
        desk.jobs.create(long)
    };
    let rows = |keep_order: bool| -> usize {
        let text = create(0, keep_order).unwrap_err().to_string();
        text.split("make ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    let (once, twice) = (rows(true), rows(false));
    assert!(twice > once + 60, "{once} {twice}");
    create(twice, false).unwrap();
    create(twice - 1, false).unwrap_err();
}

/// Killed when the adapter was on its way into the store: the next process publishes the same files, and trains nothing.
#[test]
fn a_kill_while_publishing_publishes_again() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let (sent, published) = channel();
    let publish = |result: Option<u64>| -> Publish {
        let sent = sent.clone();
        Box::new(move |trained| {
            sent.send(trained.files.files().unwrap()).unwrap();
            match result {
                Some(generation) => Ok(Published::Serving(generation)),
                // Its thread stays behind, as that of a killed process would.
                None => loop {
                    std::thread::park();
                },
            }
        })
    };
    let first = Desk::open(&model, dir.path(), LIMITS, publish(None));
    let id = first.jobs.create(job("trained")).unwrap().id;
    let (orders, none) = (first.orders, channel().1);
    let mut trainer = Trainer::new(orders, first.clerk.clone(), bounds());
    let files = loop {
        trainer.slice(&model);
        if let Ok(files) = published.try_recv() {
            break files;
        }
    };
    let first = Desk { orders: none, ..first };
    let left = first.left_by_a_kill(dir.path());
    assert_eq!(first.jobs.get(&id).unwrap().state, JobState::Publishing);

    let Desk { jobs, orders, clerk } = Desk::open(&model, left.path(), LIMITS, publish(Some(7)));
    let mut trainer = Trainer::new(orders, clerk.clone(), bounds());
    while !jobs.get(&id).unwrap().state.ended() {
        assert!(!trainer.slice(&model), "there is nothing to train");
    }
    let job = jobs.get(&id).unwrap();
    assert_eq!((job.state, job.generation, job.at), (JobState::Succeeded, 7, (0, 10)), "{}", job.error);
    assert!(published.recv().unwrap() == files, "the files differ");
    assert_eq!(jobs.news(&id, 0).unwrap().reports.len(), 10);
}

/// An adapter that finds no room in service is in the store, and its job says so.
#[test]
fn what_cannot_be_served_is_not_lost() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let publish = |_| Ok(Published::Waiting(Error::exhausted("the KV pool is full", None)));
    let Desk { jobs, orders, clerk } = Desk::open(&model, dir.path(), LIMITS, Box::new(publish));
    let id = jobs.create(job("trained")).unwrap().id;
    let mut trainer = Trainer::new(orders, clerk, bounds());
    while !jobs.get(&id).unwrap().state.ended() {
        trainer.slice(&model);
    }
    let job = jobs.get(&id).unwrap();
    assert_eq!((job.state, job.generation), (JobState::Succeeded, 0));
    assert!(job.error.contains("in the store, but not in service: the KV pool is full"), "{}", job.error);
}

/// Virtual tokens and the text beside them count for each task of a batch, and so do the sequences' shares in their gradient.
#[test]
fn prefixes_count_in_a_batch() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let limits = Limits { batch_bytes: 8000 * model.activation_bytes_per_row(), ..LIMITS };
    let desk = Desk::open(&model, dir.path(), limits, Box::new(|_| panic!("nothing is published here")));
    let refused = |name: &str, method: TrainMethod, tasks: usize, n: usize| {
        let mut new = job(name);
        let s = &mut new.settings;
        (s.method, s.num_tasks, s.num_virtual_tokens, s.batch_size) = (method, tasks, n, 512);
        new.data.iter_mut().enumerate().for_each(|(i, r)| r.task_id = Some((i % tasks.max(1)) as u32));
        desk.jobs.create(new).err().map(|e| e.to_string())
    };
    let many = refused("a", TrainMethod::MultitaskPromptTuning, 200, 100).unwrap();
    assert!(many.contains("20000 rows in front of them") && many.contains("training.batch_mib"), "{many}");
    // As many tasks as prompts fit.
    assert_eq!(refused("b", TrainMethod::MultitaskPromptTuning, 2, 100), None);
    let shares = refused("c", TrainMethod::PrefixTuning, 0, 250);
    assert_eq!(refused("d", TrainMethod::PrefixTuning, 0, 2), None, "{shares:?}");
}

/// A job that ends the process each time it runs is given up after a while; the one beside it is not blamed, and goes on.
#[test]
fn a_job_that_ends_the_process_each_time_is_given_up() {
    let (model, mut dir) = (model(), tempfile::tempdir().unwrap());
    let mut desk = Desk::new(&model, dir.path());
    let good = desk.jobs.create(job("good")).unwrap().id;
    let fatal = desk.jobs.create(job("fatal")).unwrap().id;
    assert_eq!([desk.started(), desk.started()], [good.clone(), fatal.clone()]);
    for life in 2..7 {
        let left = desk.left_by_a_kill(dir.path());
        desk = Desk::new(&model, left.path());
        dir = left;
        // Either may have been it, so each has to get further by itself: the other waits.
        if life == 2 {
            assert_eq!(desk.started(), good);
            desk.nothing_starts(&good);
            desk.checkpoint(&good, 1, 100);
        }
        if life == 6 {
            break;
        }
        assert_eq!(desk.started(), fatal, "life {life}");
        if life > 2 {
            desk.nothing_starts(&fatal);
        }
    }
    let failed = desk.until(&fatal, JobState::Failed);
    assert!(failed.error.contains("5 times") && failed.error.contains("memory"), "{}", failed.error);
    assert_eq!(desk.started(), good);
    // A checkpoint without a step is no progress, one with a step is.
    let starts = || desk.jobs.inner.journal().jobs().unwrap().into_iter().find(|r| r.id == *good).unwrap().starts;
    desk.checkpoint(&good, 1, 100);
    desk.settled(&good);
    assert_eq!(starts(), 1);
    desk.checkpoint(&good, 2, 100);
    desk.settled(&good);
    assert_eq!(starts(), 0);
}

/// Reports up to the last checkpoint lie on disk alone, and a watcher sees all of them, a page at a time.
#[test]
fn reports_leave_memory_and_are_all_there() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    let evaluated = NewJob { evaluation: job("x").data, ..job("long") };
    let id = desk.jobs.create(evaluated).unwrap().id;
    assert_eq!(desk.started(), id);
    let what = |step| match step {
        7 | 2500 => Happened::Evaluation { loss: 0.5, token_accuracy: 0.25, exact_match: 0.0 },
        _ => Happened::Step { loss: 0.1, learning_rate: 0.0, gradient_norm: 1.0, tokens_per_second: 2.0 },
    };
    let told: Vec<Report> = (1..2600).map(|step| Report { restart: 0, step, what: what(step) }).collect();
    let tell = |reports: &[Report]| {
        reports.iter().for_each(|r| desk.clerk.send(Event::Reported(id.clone(), r.clone())).unwrap());
    };
    let watch = |jobs: &Jobs, mut from: usize| -> Vec<Report> {
        let mut all = Vec::new();
        loop {
            let news = jobs.news(&id, from).unwrap();
            from += news.reports.len();
            all.extend(news.reports);
            if !news.more {
                return all;
            }
        }
    };
    tell(&told[..2500]);
    desk.checkpoint(&id, 2500, 10);
    tell(&told[2500..]);
    desk.settled(&id);
    let in_memory = desk.jobs.inner.lock()[&*id].reports.len();
    assert_eq!(in_memory, told.len() - 2500 + 1, "and what `settled` tells");
    let seen = watch(&desk.jobs, 0);
    assert_eq!(&seen[..told.len()], told);
    assert_eq!(watch(&desk.jobs, 1700), seen[1700..]);
    assert_eq!(watch(&desk.jobs, 2550), seen[2550..]);
    // The next process knows those of the checkpoint, and the last of each kind: of steps, though every report has a `step`.
    let left = desk.left_by_a_kill(dir.path());
    let next = Desk::new(&model, left.path());
    assert_eq!(watch(&next.jobs, 0), told[..2500]);
    let job = next.jobs.get(&id).unwrap();
    assert_eq!((job.at, job.last_step.as_ref()), ((0, 2499), Some(&told[2498])));
    assert_eq!(job.last_evaluation.as_ref(), Some(&told[2499]));
    assert!(next.jobs.inner.lock()[&*id].reports.is_empty());
}

/// What the first layout was.
const LAYOUT_1: &str = "
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, created_at INTEGER NOT NULL, ended_at INTEGER, adapter_id TEXT NOT NULL, spec TEXT NOT NULL,
        base TEXT NOT NULL, data BLOB NOT NULL, state TEXT NOT NULL, error TEXT NOT NULL DEFAULT '',
        generation INTEGER NOT NULL DEFAULT 0, progress TEXT, checkpoint BLOB
    ) STRICT;
    CREATE TABLE reports (
        job TEXT NOT NULL, number INTEGER NOT NULL, report TEXT NOT NULL, PRIMARY KEY (job, number)
    ) STRICT, WITHOUT ROWID;
";

/// Jobs of the first layout go on from where they were.
#[test]
fn a_journal_of_the_first_layout_is_read() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    let id = desk.jobs.create(job("old")).unwrap().id;
    assert_eq!(desk.started(), id);
    let (row, lines) = {
        let journal = desk.jobs.inner.journal();
        (journal.jobs().unwrap().remove(0), journal.data(&id).unwrap())
    };
    // A version-1 process that was killed right after it made its tables left the number 0.
    for version in [1, 0] {
        let dir = tempfile::tempdir().unwrap();
        let old = rusqlite::Connection::open(dir.path().join("jobs.sqlite")).unwrap();
        old.execute_batch(LAYOUT_1).unwrap();
        old.pragma_update(None, "user_version", version).unwrap();
        let sql = "INSERT INTO jobs (id, created_at, adapter_id, spec, base, data, state, progress, checkpoint)
                   VALUES (?,?,?,?,?,?,'running',?,?)";
        let progress = serde_json::to_string(&after(4)).unwrap();
        let (data, weights) = (lines.as_bytes(), &[7u8; 100][..]);
        old.execute(
            sql,
            rusqlite::params![row.id, row.created_at, row.adapter_id, row.spec, row.base, data, progress, weights],
        )
        .unwrap();
        let step = Happened::Step { loss: 0.5, learning_rate: 0.0, gradient_norm: 1.0, tokens_per_second: 2.0 };
        let report = serde_json::to_string(&Report { restart: 0, step: 4, what: step }).unwrap();
        old.execute("INSERT INTO reports VALUES (?, 0, ?)", rusqlite::params![row.id, report]).unwrap();
        drop(old);
        let desk = Desk::new(&model, dir.path());
        match desk.orders.recv_timeout(Duration::from_secs(60)).unwrap() {
            Order::Start(started, plan, Some((progress, bytes))) => {
                assert_eq!((&started, plan.train.len(), progress.step, &bytes[..]), (&id, 20, 4, weights));
            }
            _ => panic!("it does not go on"),
        }
        assert_eq!(desk.jobs.news(&id, 0).unwrap().reports.len(), 1);
        // Once more, as the second layout.
        let left = desk.left_by_a_kill(dir.path());
        assert_eq!(Desk::new(&model, left.path()).started(), id);
    }
    let later = rusqlite::Connection::open(dir.path().join("later.sqlite")).unwrap();
    later.pragma_update(None, "user_version", 99).unwrap();
    drop(later);
    let e = Journal::open(&dir.path().join("later.sqlite")).err().unwrap();
    assert!(e.kind() == Kind::FailedPrecondition && e.to_string().contains("layout 99"), "{e}");
}

/// A process that ends as it was told to blames no job; one whose trainer fell with its thread does not say that.
#[test]
fn an_orderly_stop_blames_no_job() {
    let model = model();
    for (orderly, starts) in [(true, 0), (false, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let desk = Desk::new(&model, dir.path());
        let id = desk.jobs.create(job("new")).unwrap().id;
        assert_eq!(desk.started(), id);
        desk.settled(&id);
        assert!(!desk.jobs.stopped(Duration::from_millis(1)), "the clerk is there");
        desk.clerk.send(Event::Stopped { orderly }).unwrap();
        assert!(desk.jobs.stopped(Duration::from_secs(60)), "it is gone");
        assert_eq!(desk.jobs.inner.journal().jobs().unwrap()[0].starts, starts);
    }
}

/// Four processes that a job has ended are not forgotten for one that stops in order; a job that waits keeps its count.
#[test]
fn an_orderly_stop_forgives_its_own_start() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    let ids = [desk.jobs.create(job("runs")).unwrap().id, desk.jobs.create(job("waits")).unwrap().id];
    assert_eq!([desk.started(), desk.started()], ids);
    desk.settled(&ids[0]);
    let left = desk.left_by_a_kill(dir.path());
    let desk = Desk::new(&model, left.path());
    assert_eq!(desk.started(), ids[0]);
    desk.settled(&ids[0]);
    desk.jobs.stop();
    desk.clerk.send(Event::Look).unwrap();
    desk.clerk.send(Event::Stopped { orderly: true }).unwrap();
    assert!(desk.jobs.stopped(Duration::from_secs(60)));
    let rows = desk.jobs.inner.journal().jobs().unwrap();
    assert_eq!(rows.iter().map(|row| row.starts).collect::<Vec<_>>(), [1, 1]);
}

/// A cancellation beside a checkpoint that is under way is the last word on disk.
#[test]
fn a_checkpoint_does_not_undo_a_cancellation() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    let witness = desk.jobs.create(job("witness")).unwrap().id;
    for step in 0..60 {
        let id = desk.jobs.create(job("brief")).unwrap().id;
        desk.settled(&witness);
        desk.checkpoint(&id, step, 200_000);
        std::thread::sleep(Duration::from_micros(step as u64 * 20));
        desk.jobs.cancel(&id).unwrap();
        desk.settled(&witness);
        let rows = desk.jobs.inner.journal().jobs().unwrap();
        let row = rows.iter().find(|row| row.id == *id).unwrap();
        assert!(row.state == JobState::Cancelled && row.ended_at.is_some(), "{:?}", row.state);
    }
}

/// Cancelled while it was on its way to the trainer, or before: it does not train.
#[test]
fn a_cancellation_comes_after_the_start_or_instead_of_it() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let desk = Desk::new(&model, dir.path());
    for _ in 0..20 {
        let id = desk.jobs.create(job("brief")).unwrap().id;
        desk.jobs.cancel(&id).unwrap();
        let witness = desk.jobs.create(job("witness")).unwrap().id;
        desk.settled(&witness);
        desk.jobs.cancel(&witness).unwrap();
        let mut under_way = false;
        for order in desk.orders.try_iter() {
            match order {
                Order::Start(started, ..) => under_way |= started == id,
                Order::Cancel(ended) => under_way &= ended != id,
            }
        }
        assert!(!under_way, "nobody ends it");
        assert_eq!(
            desk.jobs.inner.journal().jobs().unwrap().iter().find(|r| r.id == *id).unwrap().state,
            JobState::Cancelled
        );
    }
}
