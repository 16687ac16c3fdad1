//! A multitask prompt: one shared prompt, and for each task a matrix of low rank that scales it.
use super::peft::{fits, must_fit};
use super::placed::{Placed, Placement};
use crate::error::{Error, Result};
use candle_core::DType;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// Tasks kept composed; composing one again takes milliseconds, its pages stay keyed by their content.
const KEPT: usize = 16;

/// The tasks of one adapter. Prompt of task t = E * (cols\[t\] @ rows\[t\]), elementwise.
pub struct Tasks {
    /// Number of tasks.
    pub(super) count: usize,
    /// Virtual tokens n.
    pub(super) len: usize,
    /// Rank r of the scaling matrices.
    pub(super) rank: usize,
    /// E `[n, d]`.
    pub(super) shared: Vec<f32>,
    /// `[count, n, r]`
    pub(super) cols: Vec<f32>,
    /// `[count, r, d]`
    pub(super) rows: Vec<f32>,
    /// Type that composed prompts are held in.
    pub(super) held: DType,
    pub(super) placement: Placement,
    /// Most recently used last, at most [`KEPT`].
    pub(super) composed: Mutex<VecDeque<(u32, Placed)>>,
}

/// A value of a composed prompt that the base cannot hold: its row, column and value.
pub(super) type Misfit = (usize, usize, f32);

impl Tasks {
    /// Number of tasks, counted from 0.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What the virtual tokens of `task` became.
    ///
    /// # Errors
    /// `InvalidArgument` naming `task_id`, its value and the number of tasks, or a value that the base cannot hold.
    pub fn placed(&self, task: u32) -> Result<Placed> {
        if task as usize >= self.count {
            let rule = format!("the adapter has {} tasks, counted from 0", self.count);
            return Err(Error::invalid("task_id", task, rule));
        }
        if let Some(placed) = self.recall(task) {
            return Ok(placed);
        }
        // Outside the lock: others' tasks do not wait for this one. Two at once compose the same content.
        let placed = self.compose(task as usize).map_err(|(row, col, value)| {
            let rule = format!("its composed prompt at [{row}, {col}] is {value}, {}", must_fit(self.held));
            Error::invalid("task_id", task, rule)
        })?;
        self.keep(task, placed.clone());
        Ok(placed)
    }

    /// Scales the shared prompt to `task`, which must be below [`Tasks::count`].
    pub(super) fn compose(&self, task: usize) -> Result<Placed, Misfit> {
        let (n, r) = (self.len, self.rank);
        let d = self.shared.len() / n;
        // cols[t]: [n, r], rows[t]: [r, d].
        let (cols, rows) = (&self.cols[task * n * r..][..n * r], &self.rows[task * r * d..][..r * d]);
        let mut prompt = self.shared.clone();
        for (row, values) in prompt.chunks_exact_mut(d).enumerate() {
            for (col, value) in values.iter_mut().enumerate() {
                let scale: f32 = (0..r).map(|k| cols[row * r + k] * rows[k * d + col]).sum();
                *value *= scale;
                if !fits(*value, self.held) {
                    return Err((row, col, *value));
                }
            }
        }
        Ok(self.placement.soft(prompt, n))
    }

    fn recall(&self, task: u32) -> Option<Placed> {
        let mut composed = self.composed.lock().unwrap_or_else(PoisonError::into_inner);
        let at = composed.iter().position(|(other, _)| *other == task)?;
        let entry = composed.remove(at)?;
        composed.push_back(entry.clone());
        Some(entry.1)
    }

    /// Keeps a composed task, and lets the one go that was used the longest ago.
    fn keep(&self, task: u32, placed: Placed) {
        let mut composed = self.composed.lock().unwrap_or_else(PoisonError::into_inner);
        composed.retain(|(other, _)| *other != task);
        if composed.len() >= KEPT {
            composed.pop_front();
        }
        composed.push_back((task, placed));
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tasks({} of {} virtual tokens, rank {})", self.count, self.len, self.rank)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Kind;
    use std::sync::Arc;

    /// 40 tasks of one virtual token of width 2; task t scales by t. Task 39 overflows.
    fn tasks() -> Tasks {
        Tasks {
            count: 40,
            len: 1,
            rank: 1,
            shared: vec![1.0, 2.0],
            cols: (0..40).map(|t| if t == 39 { f32::MAX } else { t as f32 }).collect(),
            rows: [1.0; 80].to_vec(),
            held: DType::F32,
            placement: Placement::default(),
            composed: Mutex::default(),
        }
    }

    #[test]
    fn tasks_are_composed_once_and_a_bounded_number_is_kept() {
        let tasks = tasks();
        let first = tasks.placed(3).unwrap().prefix.unwrap();
        assert_eq!(&first.soft[..], [3.0, 6.0]);
        assert!(Arc::ptr_eq(&first, &tasks.placed(3).unwrap().prefix.unwrap()));
        for task in 4..4 + KEPT as u32 {
            tasks.placed(task).unwrap();
        }
        assert_eq!(tasks.composed.lock().unwrap().len(), KEPT);
        let again = tasks.placed(3).unwrap().prefix.unwrap();
        assert!(!Arc::ptr_eq(&first, &again));
        assert_eq!(first.digest, again.digest);
    }

    #[test]
    fn a_task_that_is_not_there_is_named_with_their_number() {
        let e = tasks().placed(40).unwrap_err();
        assert_eq!((e.kind(), e.field()), (Kind::InvalidArgument, Some("task_id")));
        assert_eq!(e.to_string(), "`task_id` is 40, the adapter has 40 tasks, counted from 0");
        let e = tasks().placed(39).unwrap_err().to_string();
        assert!(e.contains("`task_id` is 39") && e.contains("[0, 1] is inf"), "{e}");
    }
}
