//! Where virtual tokens and prefix text end up: in a prefix that is computed once, or among a request's own rows.
use super::{InputRow, KvRows, Prefix, SoftPrompt};
use std::sync::Arc;

/// What an adapter's virtual tokens and text became.
#[derive(Clone, Debug, Default)]
pub struct Placed {
    /// What every request attends to.
    pub prefix: Option<Arc<Prefix>>,
    /// What stands among a request's own rows.
    pub soft: Option<Arc<SoftPrompt>>,
}

/// How to place them.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Prefix text in front of the virtual tokens.
    pub before: Vec<InputRow>,
    /// Prefix text behind them.
    pub after: Vec<InputRow>,
    /// The virtual tokens are no part of the prefix: the template places them, or the base is an encoder.
    pub among_rows: bool,
}

impl Placement {
    /// Tokens of prefix text.
    pub fn text_len(&self) -> usize {
        self.before.len() + self.after.len()
    }

    /// Places virtual token embeddings `rows` `[len, hidden_size]`.
    pub fn soft(&self, rows: Vec<f32>, len: usize) -> Placed {
        let text = || self.before.iter().chain(&self.after).copied().collect();
        if self.among_rows {
            let soft = Some(Arc::new(SoftPrompt::new(rows, len)));
            return Placed { prefix: Prefix::new(None, text(), Arc::new([])).map(Arc::new), soft };
        }
        let soft = (0..len as u32).map(InputRow::Soft);
        let all = self.before.iter().copied().chain(soft).chain(self.after.iter().copied()).collect();
        Placed { prefix: Prefix::new(None, all, rows.into()).map(Arc::new), soft: None }
    }

    /// Places stored K and V: nothing can stand before them.
    pub fn kv(&self, kv: KvRows) -> Placed {
        let prefix = Prefix::new(Some(kv), self.after.clone(), Arc::new([])).map(Arc::new);
        Placed { prefix, soft: None }
    }

    /// Places text alone.
    pub fn text(&self) -> Placed {
        Placed { prefix: Prefix::new(None, self.after.clone(), Arc::new([])).map(Arc::new), soft: None }
    }
}
