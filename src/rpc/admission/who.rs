//! Who answers a request: an adapter, or the bare base, and what stands before the request's own text.
use crate::adapter::{Adapter, Generation, InputRow, Prefix, Registry, SoftPrompt};
use crate::error::{Error, Result};
use crate::rpc::convert::Target;
use std::sync::Arc;
use tracing::Span;

/// Who answers. Holding it pins the generations.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// None: the bare base.
    pub adapter: Option<Arc<Adapter>>,
    /// Those whose prefixes stand before the adapter's, in order.
    pub stacked: Vec<Arc<Adapter>>,
    /// All prefixes as one.
    pub prefix: Option<Arc<Prefix>>,
    /// Virtual tokens among the request's own rows.
    pub soft: Option<Arc<SoftPrompt>>,
}

impl Who {
    /// Finds everyone in the registry.
    ///
    /// # Errors
    /// As [`Registry::resolve`]; `FailedPrecondition` for another generation and for prefixes that cannot be stacked;
    /// `InvalidArgument` for a task that is not there.
    pub fn resolve(registry: &Registry, target: &Target) -> Result<Self> {
        let adapter = match &target.adapter {
            Some(id) => Some(registry.resolve(id)?),
            None => None,
        };
        let mut who = Who { adapter, ..Who::default() };
        if let Some(adapter) = &who.adapter {
            check_generation(adapter, target.generation)?;
            let span = Span::current();
            span.record("adapter", adapter.id.as_str());
            span.record("generation", adapter.generation.0);
            let placed = adapter.placed(target.task_id)?;
            (who.prefix, who.soft) = (placed.prefix, placed.soft);
        }
        if target.prefix_adapters.is_empty() {
            return Ok(who);
        }
        let mut parts = Vec::with_capacity(target.prefix_adapters.len() + 1);
        for id in &target.prefix_adapters {
            let adapter = registry.resolve(id)?;
            parts.push(stackable(&adapter)?);
            who.stacked.push(adapter);
        }
        parts.extend(who.prefix.take());
        who.prefix = Some(registry.stack(&parts)?);
        Ok(who)
    }

    /// Positions of the prefix.
    pub fn prefix_len(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.len())
    }

    /// Whether the request's own text gets the tokenizer's special tokens (BOS).
    pub fn adds_special_tokens(&self) -> bool {
        let card = self.adapter.as_ref().map(|a| (&a.card, a.method));
        let own = card.is_none_or(|(card, method)| card.adds_special_tokens(method));
        // Text that a stack begins with has them already; a card that says so has the last word.
        let decided = card.is_some_and(|(card, _)| card.add_special_tokens.is_some());
        own && (decided || !self.stacked.iter().any(|a| a.card.begins_with_text(a.method)))
    }

    /// Whether the adapter's template has places for its virtual tokens.
    pub fn places_virtual_tokens(&self) -> bool {
        self.adapter.as_ref().is_some_and(|a| a.card.places_virtual_tokens())
    }

    /// Virtual tokens in front of all text: an encoder's.
    pub fn leading_rows(&self) -> Vec<InputRow> {
        let len = self.soft.as_ref().filter(|_| !self.places_virtual_tokens()).map_or(0, |soft| soft.len);
        (0..len as u32).map(InputRow::Soft).collect()
    }
}

fn check_generation(adapter: &Adapter, asked: Option<Generation>) -> Result<()> {
    match asked {
        Some(Generation(asked)) if asked != adapter.generation.0 => {
            let (id, serving) = (&adapter.id, adapter.generation.0);
            Err(Error::precondition(format!(
                "`adapter_generation` is {asked}, but generation {serving} of adapter {id} serves"
            )))
        }
        _ => Ok(()),
    }
}

/// The prefix of an adapter that stands before another one's.
fn stackable(adapter: &Adapter) -> Result<Arc<Prefix>> {
    let id = &adapter.id;
    if adapter.soft.is_some() {
        return Err(Error::precondition(format!(
            "`prefix_adapter_ids`: the virtual tokens of adapter `{id}` stand among its requests' own rows, so they are \
             no prefix that could stand before another adapter"
        )));
    }
    adapter.prefix.clone().ok_or_else(|| {
        Error::precondition(format!("`prefix_adapter_ids`: adapter `{id}` has no prefix, only a task card"))
    })
}
