//! The decoder over packed sequences, with gradients: what training runs.
use super::{At, Decoder, Pass, View};
use crate::error::Result;
use crate::model::batch::PackedBatch;
use crate::ops::cross_entropy::{CrossEntropy, cross_entropy};
use crate::ops::embed::RowSource;
use crate::ops::prefix_attention::{PackedOnDevice, PackedPlan};
use candle_core::Tensor;
use std::sync::Arc;

/// What one pass over packed sequences shares between its layers.
pub struct PackedRows {
    inputs: Vec<RowSource>,
    at: At,
    plan: Arc<PackedPlan>,
    /// Its work lists, on a GPU.
    device: Option<Arc<PackedOnDevice>>,
    /// Which rows the last layer gives; `None`: all.
    wanted: Option<Tensor>,
}

impl Decoder {
    /// Prepares a pass over packed sequences; `stored` rows of K and V come before their own.
    pub fn packed(&self, batch: &PackedBatch, stored: usize) -> Result<PackedRows> {
        let plan =
            PackedPlan { sequences: batch.sequences.clone(), layout: self.kv_layout(), heads: self.config.num_heads };
        let at = self.at(&batch.inputs, &batch.positions)?;
        let plan = Arc::new(plan);
        let device = match (self.machine.gpu(), &self.scratch) {
            (Some(gpu), Some(scratch)) => {
                let attentions = self.config.layers.iter().map(|facts| facts.attention);
                Some(Arc::new(PackedOnDevice::new(gpu, &plan, stored, attentions, scratch)?))
            }
            _ => None,
        };
        let wanted = self.some(&batch.wanted, batch.inputs.len())?;
        Ok(PackedRows { inputs: batch.inputs.clone(), at, plan, device, wanted })
    }

    /// The input of the first layer `[rows, hidden]`, differentiable in `soft` `[num_soft, hidden]`.
    pub fn packed_inputs(&self, rows: &PackedRows, soft: &Tensor) -> Result<Tensor> {
        self.embed(&rows.inputs, soft, &rows.at)
    }

    /// One layer of packed rows `[rows, hidden]`, in the bits of [`Decoder::forward`]; differentiable in them and in the
    /// layer's `stored` rows `[stored, 2 * kv_heads * head_dim]`, K then V. The last layer gives [`PackedBatch::wanted`] rows alone.
    pub fn packed_layer(&self, index: usize, x: &Tensor, rows: &PackedRows, stored: Option<&Tensor>) -> Result<Tensor> {
        let view = View::Packed { stored, plan: rows.plan.clone(), device: rows.device.clone() };
        let pass = Pass { at: rows.at.clone(), view };
        match rows.wanted.as_ref().filter(|_| index + 1 == self.config.num_layers()) {
            // There few rows have products of their own, with other bits: more would then depend on who shares a job's batch.
            Some(wanted) if self.machine.gpu().is_some() => {
                Ok(self.layer(index, x, &pass, None)?.index_select(wanted, 0)?)
            }
            wanted => self.layer(index, x, &pass, wanted),
        }
    }

    /// Hidden rows `[n, hidden]`, a target token each -> their losses, and with `gradient` that of their sum.
    ///
    /// # Errors
    /// `Internal` for an encoder.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[u32], gradient: bool) -> Result<CrossEntropy> {
        Ok(cross_entropy(hidden, targets, self.vocabulary()?, self.config.logit_cap, gradient)?)
    }
}
