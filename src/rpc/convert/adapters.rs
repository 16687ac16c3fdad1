//! Adapters and their states to protobuf.
use crate::adapter::{Adapter, State, Status};
use crate::engine::loader::AdapterLoader;
use crate::rpc::proto;
use std::sync::Arc;

/// Which adapter answers; the bare base has neither id nor generation.
pub fn adapter_ref(adapter: &Option<Arc<Adapter>>) -> proto::AdapterRef {
    adapter.as_ref().map_or_else(proto::AdapterRef::default, |a| proto::AdapterRef {
        adapter_id: a.id.to_string(),
        generation: a.generation.0,
    })
}

/// The same for the adapters whose prefixes stand before.
pub fn adapter_refs(adapters: &[Arc<Adapter>]) -> Vec<proto::AdapterRef> {
    adapters.iter().map(|a| adapter_ref(&Some(Arc::clone(a)))).collect()
}

/// An adapter as the server sees it.
pub fn status_of(status: Status, loader: &AdapterLoader) -> proto::Adapter {
    let state = match status.state {
        State::Loading => proto::AdapterState::Loading,
        State::Ready => proto::AdapterState::Ready,
        State::Failed => proto::AdapterState::Failed,
        State::Unloading => proto::AdapterState::Unloading,
    };
    // The labels are in the card only; a load that ends in between leaves them out.
    let labels = loader.registry().resolve(&status.id).map(|a| a.card.labels.clone()).unwrap_or_default();
    let mut adapter = proto::Adapter {
        pinned: loader.is_pinned(&status.id),
        adapter_id: status.id.to_string(),
        state: state.into(),
        generation: status.generation.0,
        error: status.error.unwrap_or_default(),
        loaded_at: status.loaded_at.map(Into::into),
        labels,
        ..Default::default()
    };
    if let Some(serving) = status.serving {
        adapter.method = serving.method.as_str().into();
        adapter.description = serving.description;
        adapter.num_virtual_tokens = serving.num_virtual_tokens as u32;
        adapter.prefix_tokens = serving.prefix_len as u32;
        adapter.digest = serving.digest.map(|d| d.to_string()).unwrap_or_default();
        adapter.resident = loader.is_resident(serving.digest);
    }
    adapter
}

/// One generation that its holder has in hand, in a state the holder knows.
pub fn adapter(adapter: &Adapter, state: proto::AdapterState, loader: &AdapterLoader) -> proto::Adapter {
    let digest = adapter.prefix.as_ref().map(|p| p.digest);
    proto::Adapter {
        adapter_id: adapter.id.to_string(),
        state: state.into(),
        generation: adapter.generation.0,
        method: adapter.method.as_str().into(),
        description: adapter.card.description.clone(),
        num_virtual_tokens: adapter.num_virtual_tokens as u32,
        prefix_tokens: adapter.prefix.as_ref().map_or(0, |p| p.len()) as u32,
        digest: digest.map(|d| d.to_string()).unwrap_or_default(),
        pinned: loader.is_pinned(&adapter.id),
        resident: loader.is_resident(digest),
        error: String::new(),
        loaded_at: loader.registry().get(&adapter.id).ok().and_then(|s| s.loaded_at).map(Into::into),
        labels: adapter.card.labels.clone(),
    }
}
