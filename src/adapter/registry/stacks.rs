//! Stacked prefixes in use: equal stacks share one host copy.
use crate::adapter::{Digest, Prefix};
use crate::error::Result;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Stacks kept though no request holds them. Each is a copy of its parts on the host.
const KEPT: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Stacks {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// All that somebody holds.
    alive: HashMap<Digest, Weak<Prefix>>,
    /// Used last at the end.
    recent: VecDeque<Arc<Prefix>>,
}

impl Stacks {
    /// The one copy of the stack of `parts`, made if there is none.
    pub fn get(&self, parts: &[Arc<Prefix>]) -> Result<Arc<Prefix>> {
        if let [one] = parts {
            return Ok(Arc::clone(one));
        }
        let digest = Prefix::stack_digest(parts);
        if let Some(stack) = self.find(&digest) {
            return Ok(stack);
        }
        // Copied outside the lock; who comes second takes the first one's.
        let stack = Prefix::stack(parts)?;
        Ok(self.table.lock().unwrap_or_else(PoisonError::into_inner).insert(stack))
    }

    fn find(&self, digest: &Digest) -> Option<Arc<Prefix>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let stack = table.alive.get(digest)?.upgrade()?;
        table.touch(&stack);
        Some(stack)
    }
}

impl Table {
    fn insert(&mut self, stack: Arc<Prefix>) -> Arc<Prefix> {
        let stack = self.alive.get(&stack.digest).and_then(Weak::upgrade).unwrap_or(stack);
        self.touch(&stack);
        self.alive.retain(|_, weak| weak.strong_count() > 0);
        self.alive.insert(stack.digest, Arc::downgrade(&stack));
        stack
    }

    fn touch(&mut self, stack: &Arc<Prefix>) {
        self.recent.retain(|other| other.digest != stack.digest);
        if self.recent.len() >= KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(Arc::clone(stack));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::adapter::InputRow;

    fn text(id: u32) -> Arc<Prefix> {
        Arc::new(Prefix::new(None, vec![InputRow::Token(id)], Arc::new([])).unwrap())
    }

    #[test]
    fn equal_stacks_share_one_copy_and_few_outlive_their_requests() {
        let stacks = Stacks::default();
        let first = stacks.get(&[text(0), text(1)]).unwrap();
        assert!(Arc::ptr_eq(&first, &stacks.get(&[text(0), text(1)]).unwrap()));
        for i in 2..100 {
            stacks.get(&[text(0), text(i)]).unwrap();
        }
        // Held by a request: found though it is no longer among the recent ones.
        assert!(Arc::ptr_eq(&first, &stacks.get(&[text(0), text(1)]).unwrap()));
        let table = stacks.table.lock().unwrap();
        assert_eq!((table.recent.len(), table.alive.len()), (KEPT, KEPT + 1));
    }

    #[test]
    fn a_single_part_is_itself() {
        let one = text(1);
        assert!(Arc::ptr_eq(&one, &Stacks::default().get(std::slice::from_ref(&one)).unwrap()));
    }
}
