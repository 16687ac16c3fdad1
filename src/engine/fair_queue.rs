//! Who is next: a virtual token counter for each tenant (Sheng et al. 2024, "Fairness in Serving Large Language
//! Models").
//!
//! A tenant is an adapter (the bare base is one too). Each tenant's counter grows by the work done for it, and the
//! waiting tenant with the smallest counter goes first; so a flood on one adapter delays another by no more than
//! the work in the batch. A tenant that comes back after a pause is lifted to the smallest counter of those at work:
//! idle time is not saved up.
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;

/// Counters kept for tenants that are not at work, before those that a lift would erase anyway are dropped.
const MAX_IDLE: usize = 1 << 14;

/// Queues of `Id`s, one a tenant.
#[derive(Debug)]
pub struct FairQueue<Id> {
    tenants: HashMap<Arc<str>, Tenant<Id>>,
    waiting: usize,
}

#[derive(Debug)]
struct Tenant<Id> {
    queue: VecDeque<Id>,
    /// Work done, in tokens.
    counter: u64,
    /// Sequences waiting or running.
    active: usize,
}

impl<Id: Copy + Eq + Hash> FairQueue<Id> {
    /// Empty.
    pub fn new() -> Self {
        FairQueue { tenants: HashMap::new(), waiting: 0 }
    }

    /// Waiting ids.
    pub fn len(&self) -> usize {
        self.waiting
    }

    /// Waiting ids of one tenant.
    pub fn len_of(&self, tenant: &str) -> usize {
        self.tenants.get(tenant).map_or(0, |t| t.queue.len())
    }

    /// A new id, behind its tenant's others.
    pub fn push(&mut self, tenant: &Arc<str>, id: Id) {
        let floor = self.floor();
        if self.tenants.len() > MAX_IDLE {
            self.tenants.retain(|_, t| t.active > 0 || floor.is_some_and(|f| t.counter > f));
        }
        let entry = self.tenants.entry(tenant.clone());
        let t = entry.or_insert_with(|| Tenant { queue: VecDeque::new(), counter: 0, active: 0 });
        if t.active == 0 {
            t.counter = t.counter.max(floor.unwrap_or(t.counter));
        }
        t.active += 1;
        t.queue.push_back(id);
        self.waiting += 1;
    }

    /// A preempted id goes back to the front; it never stopped being active.
    pub fn push_front(&mut self, tenant: &str, id: Id) {
        if let Some(t) = self.tenants.get_mut(tenant) {
            t.queue.push_front(id);
            self.waiting += 1;
        }
    }

    /// Heads of the queues, the tenant with the least work first.
    pub fn heads(&self) -> Vec<(Arc<str>, Id)> {
        let mut heads: Vec<_> =
            self.tenants.iter().filter_map(|(name, t)| t.queue.front().map(|id| (t.counter, name, *id))).collect();
        heads.sort_unstable_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
        heads.into_iter().map(|(_, name, id)| (name.clone(), id)).collect()
    }

    /// Takes the head of a tenant's queue: it runs now.
    pub fn pop(&mut self, tenant: &str) -> Option<Id> {
        let id = self.tenants.get_mut(tenant)?.queue.pop_front()?;
        self.waiting -= 1;
        Some(id)
    }

    /// An id ended; if it still waited, it is taken out.
    pub fn end(&mut self, tenant: &str, id: Id) {
        if let Some(t) = self.tenants.get_mut(tenant) {
            t.active -= 1;
            let before = t.queue.len();
            t.queue.retain(|i| *i != id);
            self.waiting -= before - t.queue.len();
        }
    }

    /// Work was done for a tenant.
    pub fn charge(&mut self, tenant: &str, tokens: u64) {
        if let Some(t) = self.tenants.get_mut(tenant) {
            t.counter += tokens;
        }
    }

    /// The smallest counter of those at work.
    fn floor(&self) -> Option<u64> {
        self.tenants.values().filter(|t| t.active > 0).map(|t| t.counter).min()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn name(s: &str) -> Arc<str> {
        s.into()
    }

    #[test]
    fn least_served_first_and_no_credit_for_idling() {
        let mut q = FairQueue::new();
        q.push(&name("a"), 1);
        q.push(&name("a"), 2);
        q.charge("a", 100);
        q.push(&name("b"), 3);
        // b starts where a stands, not at 0.
        assert_eq!(q.heads()[0].1, 1);
        q.charge("a", 1);
        assert_eq!(q.heads()[0].1, 3);
        assert_eq!((q.pop("b"), q.len(), q.len_of("a")), (Some(3), 2, 2));
    }

    /// The same tenant coming and going does not wash its counter clean.
    #[test]
    fn a_counter_is_never_lowered() {
        let mut q = FairQueue::new();
        q.push(&name("b"), 0);
        for id in 1..10 {
            q.push(&name("a"), id);
            q.charge("a", 10);
            q.end("a", id);
        }
        q.push(&name("a"), 99);
        assert_eq!(q.heads().iter().map(|h| h.1).collect::<Vec<_>>(), [0, 99]);
    }
}
