#![allow(clippy::unwrap_used)]
use super::*;
use crate::adapter::{InputRow, Method, Prefix, TaskCard};
use crate::error::Kind;

fn id(text: &str) -> AdapterId {
    AdapterId::parse(text).unwrap()
}

fn adapter(ticket: &Ticket) -> Adapter {
    Adapter {
        id: ticket.id().clone(),
        generation: ticket.generation(),
        method: Method::Text,
        num_virtual_tokens: 0,
        card: TaskCard::parse("description = 'd'").unwrap(),
        prefix: Prefix::new(None, vec![InputRow::Token(1), InputRow::Token(2)], Arc::new([])).map(Arc::new),
        soft: None,
        head: None,
        tasks: None,
    }
}

fn load(registry: &Arc<Registry>, name: &str) -> Arc<Adapter> {
    let ticket = registry.begin_load(&id(name)).unwrap();
    let adapter = adapter(&ticket);
    ticket.publish(adapter)
}

fn state(registry: &Registry, name: &str) -> (State, u64) {
    let status = registry.get(&id(name)).unwrap();
    (status.state, status.generation.0)
}

#[test]
fn a_load_passes_through_every_state() {
    let registry = Registry::new(8);
    let ticket = registry.begin_load(&id("a")).unwrap();
    assert_eq!(state(&registry, "a"), (State::Loading, 1));
    assert_eq!(registry.resolve(&id("a")).unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(registry.unload(&id("a"), None).unwrap_err().kind(), Kind::Unavailable);
    let made = adapter(&ticket);
    drop(ticket.publish(made));

    let held = registry.resolve(&id("a")).unwrap();
    let status = registry.get(&id("a")).unwrap();
    assert_eq!((status.state, status.users, status.error), (State::Ready, 1, None));
    let details = status.serving.unwrap();
    assert_eq!((details.prefix_len, details.bytes, details.digest), (2, 16, held.prefix.as_ref().map(|p| p.digest)));
    assert_eq!((details.description.as_str(), details.method), ("d", Method::Text));
    assert!(status.loaded_at.is_some());

    drop(registry.unload(&id("a"), None).unwrap());
    assert_eq!(state(&registry, "a"), (State::Unloading, 1));
    assert_eq!(registry.get(&id("a")).unwrap().users, 1);
    assert_eq!(registry.resolve(&id("a")).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(registry.list().len(), 1);
    drop(held);
    assert_eq!(registry.get(&id("a")).unwrap_err().kind(), Kind::NotFound);
    assert!(registry.list().is_empty() && registry.entries.is_empty());
}

#[test]
fn the_old_generation_serves_until_the_new_one_is_ready() {
    let registry = Registry::new(8);
    load(&registry, "a");
    let second = registry.begin_load(&id("a")).unwrap();
    assert_eq!(state(&registry, "a"), (State::Loading, 2));
    let status = registry.get(&id("a")).unwrap();
    assert_eq!(status.serving.unwrap().generation, Generation(1));
    assert_eq!(registry.resolve(&id("a")).unwrap().generation, Generation(1));

    second.fail(Error::precondition("64 columns, needs 128"));
    assert_eq!(state(&registry, "a"), (State::Ready, 1));
    assert_eq!(registry.get(&id("a")).unwrap().error.as_deref(), Some("64 columns, needs 128"));
    load(&registry, "a");
    assert_eq!(state(&registry, "a"), (State::Ready, 3));
    assert_eq!(registry.get(&id("a")).unwrap().error, None);
}

#[test]
fn a_later_generation_wins_whatever_the_order() {
    let registry = Registry::new(8);
    let first = registry.begin_load(&id("a")).unwrap();
    let second = registry.begin_load(&id("a")).unwrap();
    let third = registry.begin_load(&id("a")).unwrap();
    let made = adapter(&second);
    second.publish(made);
    let made = adapter(&first);
    assert_eq!(first.publish(made).generation, Generation(1));
    assert_eq!(registry.resolve(&id("a")).unwrap().generation, Generation(2));
    // What was unloaded does not come back by a load begun before.
    registry.unload(&id("a"), None).unwrap();
    let made = adapter(&third);
    third.publish(made);
    assert_eq!(registry.resolve(&id("a")).unwrap_err().kind(), Kind::NotFound);
    assert!(registry.list().is_empty());
}

#[test]
fn a_failed_load_says_why_until_it_is_forgotten() {
    let registry = Registry::new(8);
    registry.begin_load(&id("a")).unwrap().fail(Error::precondition("64 columns, needs 128"));
    let e = registry.resolve(&id("a")).unwrap_err();
    assert_eq!(e.kind(), Kind::FailedPrecondition);
    assert!(e.to_string().contains("64 columns, needs 128") && e.to_string().contains("generation 1"), "{e}");
    assert_eq!(state(&registry, "a"), (State::Failed, 1));
    drop(registry.begin_load(&id("a")).unwrap());
    assert!(registry.get(&id("a")).unwrap().error.unwrap().contains("without a result"));
    assert_eq!(registry.unload(&id("a"), None).unwrap_err().kind(), Kind::NotFound);
    assert!(registry.list().is_empty());
}

#[test]
fn unload_may_name_its_generation() {
    let registry = Registry::new(8);
    load(&registry, "a");
    let e = registry.unload(&id("a"), Some(Generation(7))).unwrap_err();
    assert_eq!(e.kind(), Kind::FailedPrecondition);
    assert!(e.to_string().contains("generation 1, not 7"), "{e}");
    registry.unload(&id("a"), Some(Generation(1))).unwrap();
}

#[test]
fn an_unknown_id_names_ids_that_look_alike() {
    let registry = Registry::new(100);
    let e = registry.resolve(&id("a")).unwrap_err();
    assert_eq!(e.to_string(), "adapter `a` is not loaded; none is");
    for name in ["sentiment-en", "sentiment-de", "zebra", "b", "c", "d", "e"] {
        load(&registry, name);
    }
    let e = registry.resolve(&id("Sentiment")).unwrap_err();
    let expected = "`Sentiment` is not loaded; loaded are `sentiment-de`, `sentiment-en`, `b`, `c`, `d`";
    assert!(e.to_string().ends_with(expected), "{e}");
    let ids: Vec<_> = registry.list().iter().map(|s| s.id.to_string()).collect();
    assert_eq!(ids, ["b", "c", "d", "e", "sentiment-de", "sentiment-en", "zebra"]);
}

#[test]
fn the_table_is_bounded_and_failures_do_not_fill_it() {
    let registry = Registry::new(2);
    for i in 0..10 {
        drop(registry.begin_load(&id(&format!("bad{i}"))).unwrap());
    }
    assert!(registry.list().len() <= 2, "{:?}", registry.list());
    load(&registry, "a");
    load(&registry, "b");
    let e = registry.begin_load(&id("c")).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceExhausted);
    assert!(e.to_string().contains("the limit is 2"), "{e}");
    load(&registry, "a"); // a new generation takes no more room
    let held = registry.unload(&id("a"), None).unwrap();
    assert!(registry.begin_load(&id("c")).is_err(), "memory that requests hold counts");
    drop(held);
    load(&registry, "c");
}

#[test]
fn threads_load_unload_and_resolve_without_deadlock_or_leftovers() {
    let registry = Registry::new(8);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let registry = &registry;
            scope.spawn(move || {
                for i in 0..500 {
                    let name = id(["a", "b", "c"][(i + worker) % 3]);
                    let ticket = registry.begin_load(&name).unwrap();
                    let made = adapter(&ticket);
                    ticket.publish(made);
                    registry.resolve(&name).ok();
                    registry.list();
                    registry.unload(&name, None).ok();
                }
            });
        }
    });
    for name in ["a", "b", "c"] {
        registry.unload(&id(name), None).ok();
    }
    assert!(registry.list().is_empty(), "{:?}", registry.list());
}
