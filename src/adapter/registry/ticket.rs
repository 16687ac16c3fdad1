//! One load under way. Whatever way it ends, the registry hears of it.
use super::{Ready, Registry};
use crate::adapter::{Adapter, AdapterId, Generation};
use crate::error::Error;
use std::sync::Arc;
use std::time::SystemTime;

/// The right to publish one generation. Dropped unused, the load counts as failed.
#[derive(Debug)]
pub struct Ticket {
    registry: Arc<Registry>,
    id: AdapterId,
    generation: Generation,
    used: bool,
}

impl Ticket {
    pub(super) fn new(registry: Arc<Registry>, id: AdapterId, generation: Generation) -> Self {
        Ticket { registry, id, generation, used: false }
    }

    /// The id being loaded.
    pub fn id(&self) -> &AdapterId {
        &self.id
    }

    /// The generation that [`Adapter::generation`] must carry.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Makes `adapter` the one that serves, unless a later generation already does or the id was unloaded
    /// meanwhile: then it is not kept, and lives only as long as the returned [`Arc`].
    pub fn publish(mut self, adapter: Adapter) -> Arc<Adapter> {
        debug_assert!(adapter.id == self.id && adapter.generation == self.generation, "another load's");
        self.used = true;
        let (id, generation, adapter) = (&self.id, self.generation, Arc::new(adapter));
        let mut replaced = None;
        let published = self.registry.entries.get_mut(id).is_some_and(|mut entry| {
            let wanted = entry.loading.remove(&generation);
            let newest = entry.ready.as_ref().is_none_or(|r| r.adapter.generation < generation);
            if !(wanted && newest) {
                return false;
            }
            entry.failed.take_if(|(failed, _)| *failed < generation);
            replaced = entry.ready.replace(Ready { adapter: adapter.clone(), since: SystemTime::now() });
            true
        });
        drop(replaced); // large, and outside the table's lock
        if published {
            let (method, bytes) = (adapter.method.as_str(), adapter.prefix.as_ref().map_or(0, |p| p.bytes()));
            tracing::info!(%id, generation = generation.0, method, bytes, "adapter ready");
        } else {
            tracing::debug!(%id, generation = generation.0, "adapter superseded before it was ready");
        }
        adapter
    }

    /// Ends the load with `error`, which requests then see unless another generation serves.
    pub fn fail(mut self, error: Error) {
        self.end_with(error);
    }

    fn end_with(&mut self, error: Error) {
        self.used = true;
        let (id, generation) = (&self.id, self.generation);
        tracing::info!(%id, generation = generation.0, %error, "adapter failed");
        let Some(mut entry) = self.registry.entries.get_mut(id) else { return };
        let wanted = entry.loading.remove(&generation);
        let newer_ready = entry.ready.as_ref().is_some_and(|r| r.adapter.generation > generation);
        let newer_failed = entry.failed.as_ref().is_some_and(|(failed, _)| *failed > generation);
        if wanted && !newer_ready && !newer_failed {
            entry.failed = Some((generation, error));
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.used {
            self.end_with(Error::internal("the load ended without a result"));
        }
    }
}
