//! Work that shares the thread which owns the model.
use super::Model;

/// What runs between the steps of serving, a slice at a time. Serving keeps priority: it decides when a slice may run.
pub trait Background: Send {
    /// Runs one slice, short beside a step of serving. False: there is nothing to do until someone wakes the engine.
    fn slice(&mut self, model: &Model) -> bool;
}
