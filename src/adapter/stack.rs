//! Several prefixes as one: the KV rows one after the other, then all input rows.
//!
//! It is what PEFT's `compose_cartridge_adapters` does to stored prefixes. Stored K was rotated when it was trained
//! and is used as stored, so each part keeps the angles it was trained with; text starts after all of them.
use super::{Digest, InputRow, KvRows, Prefix};
use crate::error::{Error, Result};
use std::sync::Arc;

impl Prefix {
    /// The digest that [`Prefix::stack`] gives its result: of the list of digests, in order.
    pub fn stack_digest(parts: &[Arc<Prefix>]) -> Digest {
        let mut h = blake3::Hasher::new();
        h.update(b"prefix stack").update(&(parts.len() as u64).to_le_bytes());
        for part in parts {
            h.update(&part.digest.0);
        }
        Digest(*h.finalize().as_bytes())
    }

    /// One prefix that is `parts` one after the other; a single part is itself.
    ///
    /// # Errors
    /// `FailedPrecondition` where stored K and V would follow input rows, `InvalidArgument` without a part.
    pub fn stack(parts: &[Arc<Prefix>]) -> Result<Arc<Prefix>> {
        let (first, more) = match parts {
            [] => return Err(Error::invalid("prefix_adapter_ids", "empty", "must name a prefix to stack")),
            [one] => return Ok(Arc::clone(one)),
            [first, more @ ..] => (first, more),
        };
        let mut rows_before = !first.rows.is_empty();
        for (i, part) in more.iter().enumerate() {
            if part.kv.is_some() && rows_before {
                return Err(Error::precondition(format!(
                    "prefix {} of the stack stores its K and V, and input rows (virtual tokens or text) stand before \
                     it; such rows are computed after all stored K and V, which they attend to, so they would not be \
                     what they are alone: put adapters with stored K and V first",
                    i + 1
                )));
            }
            rows_before |= !part.rows.is_empty();
        }
        let stored = || parts.iter().filter_map(|part| part.kv.as_ref());
        let kv = stored().next().is_some().then(|| KvRows {
            len: stored().map(|kv| kv.len).sum(),
            data: stored().flat_map(|kv| kv.data.iter().copied()).collect(),
        });
        let (mut rows, mut soft) = (Vec::new(), Vec::new());
        for part in parts {
            // Virtual tokens of a part are counted on from those of the parts before it.
            let moved = rows.iter().filter(|row| matches!(row, InputRow::Soft(_))).count() as u32;
            rows.extend(part.rows.iter().map(|row| match *row {
                InputRow::Soft(i) => InputRow::Soft(i + moved),
                token => token,
            }));
            soft.extend_from_slice(&part.soft);
        }
        Ok(Arc::new(Prefix { digest: Self::stack_digest(parts), kv, rows, soft: soft.into() }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Kind;

    fn kv(value: f32, len: usize, rows: Vec<InputRow>) -> Arc<Prefix> {
        let data = vec![value; len * 4].into();
        Arc::new(Prefix::new(Some(KvRows { len, data }), rows, Arc::new([])).unwrap())
    }

    fn soft(values: &[f32], text: &[u32]) -> Arc<Prefix> {
        let virtual_tokens = (0..values.len() as u32).map(InputRow::Soft);
        let rows = virtual_tokens.chain(text.iter().map(|&t| InputRow::Token(t))).collect();
        Arc::new(Prefix::new(None, rows, values.into()).unwrap())
    }

    #[test]
    fn stored_rows_come_one_after_the_other_then_input_rows() {
        let parts =
            [kv(1.0, 2, vec![]), kv(2.0, 1, vec![InputRow::Token(9)]), soft(&[5.0, 6.0], &[7]), soft(&[8.0], &[])];
        let stack = Prefix::stack(&parts).unwrap();
        let stored = stack.kv.as_ref().unwrap();
        assert_eq!((stored.len, stack.len()), (3, 8));
        assert_eq!(&stored.data[..], [[1.0; 8].as_slice(), &[2.0; 4]].concat());
        let (soft, token) = (InputRow::Soft, InputRow::Token);
        assert_eq!(stack.rows, [token(9), soft(0), soft(1), token(7), soft(2)]);
        assert_eq!(&stack.soft[..], [5.0, 6.0, 8.0]);
    }

    #[test]
    fn the_digest_is_that_of_the_list() {
        let (a, b) = (kv(1.0, 1, vec![]), kv(2.0, 1, vec![]));
        let digest = |parts: &[&Arc<Prefix>]| {
            Prefix::stack(&parts.iter().map(|p| Arc::clone(p)).collect::<Vec<_>>()).unwrap().digest
        };
        assert_eq!(digest(&[&a, &b]), digest(&[&a, &b]));
        assert_ne!(digest(&[&a, &b]), digest(&[&b, &a]));
        assert_ne!(digest(&[&a, &a]), digest(&[&a, &a, &a]));
        assert_eq!(digest(&[&a]), a.digest);
    }

    #[test]
    fn stored_rows_after_input_rows_are_refused() {
        for first in [soft(&[1.0], &[]), kv(1.0, 1, vec![InputRow::Token(1)])] {
            let e = Prefix::stack(&[first, soft(&[1.0], &[]), kv(1.0, 1, vec![])]).unwrap_err();
            assert_eq!(e.kind(), Kind::FailedPrecondition);
            assert!(e.to_string().contains("prefix 2 of the stack stores its K and V"), "{e}");
        }
        assert_eq!(Prefix::stack(&[]).unwrap_err().kind(), Kind::InvalidArgument);
    }
}
