//! Attention over packed rows on a device, with its gradient: what training runs there.
use super::device::{DevicePlan as BackwardPlan, Rows};
use super::{Attention, PackedPlan};
use crate::ops::gpu::{Buffer, Fresh, Gpu, KernelOp, View};
use crate::ops::prefix_attention::device::{DevicePlan, Group, OverRows, Split, Step, packed_views};
use candle_core::{DType, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// The work lists of one pass: one forward for each sort of attention that layers have, and those of the way back.
pub struct PackedOnDevice {
    plan: Arc<PackedPlan>,
    forward: Vec<(Attention, Arc<DevicePlan>)>,
    backward: Arc<BackwardPlan>,
    /// Rows of K and V before the own ones: the stored prefixes of all jobs.
    stored: usize,
}

impl PackedOnDevice {
    /// `stored` rows of K and V come before as many as there are queries.
    pub fn new(
        gpu: &Gpu,
        plan: &Arc<PackedPlan>,
        stored: usize,
        attentions: impl Iterator<Item = Attention>,
        scratch: &Arc<Buffer>,
    ) -> Result<Self> {
        let (sequences, table) = packed_views(plan);
        let queries = plan.sequences.last().map_or(0, |s| s.queries.end);
        let mut forward: Vec<(Attention, Arc<DevicePlan>)> = Vec::new();
        for attention in attentions {
            if forward.iter().any(|(other, _)| *other == attention) {
                continue;
            }
            let step = Step {
                sequences: &sequences,
                table: &table,
                slots: stored + queries,
                layout: plan.layout,
                heads: plan.heads,
                attention,
            };
            let split = Split::Auto { sms: gpu.multiprocessors() };
            forward.push((attention, Arc::new(DevicePlan::new(gpu, &step, split, Group::Auto, scratch)?)));
        }
        let backward = Arc::new(BackwardPlan::new(plan));
        Ok(PackedOnDevice { plan: plan.clone(), forward, backward, stored })
    }

    /// `qkv` `[m, (heads + 2 * kv_heads) * head_dim]`, turned, and `stored` rows `[stored, 2 * kv_heads * head_dim]` f32, K then V ->
    /// `[m, heads * head_dim]`, differentiable in both.
    pub fn attention(
        self: &Arc<Self>,
        gpu: &Gpu,
        qkv: &Tensor,
        stored: Option<&Tensor>,
        attention: Attention,
    ) -> Result<Tensor> {
        let (m, heads) = (qkv.dim(0)?, self.plan.heads);
        let width = self.plan.layout.kv_heads * self.plan.layout.head_dim;
        if stored.map_or(Ok(0), |s| s.dim(0))? != self.stored {
            bail!("packed_attention: the plan has {} stored rows", self.stored);
        }
        let rows = |part: usize| -> Result<Tensor> {
            let own = qkv.detach().narrow(1, heads * self.plan.layout.head_dim + part * width, width)?;
            let Some(stored) = stored else { return own.contiguous() };
            let stored = stored.detach().narrow(1, part * width, width)?.to_dtype(qkv.dtype())?;
            Tensor::cat(&[&stored, &own], 0)?.contiguous()
        };
        let lse = Arc::new(Buffer::poisoned(gpu, m * heads * size_of::<f32>())?);
        let op = Op { pass: self.clone(), attention, k: rows(0)?, v: rows(1)?, lse };
        match stored {
            Some(stored) => gpu.apply2(op, qkv, stored),
            None => gpu.apply1(op, qkv),
        }
    }
}

struct Op {
    pass: Arc<PackedOnDevice>,
    attention: Attention,
    /// `[stored + m, kv_heads * head_dim]`
    k: Tensor,
    v: Tensor,
    /// `[m, heads]` f32, written on the way forward.
    lse: Arc<Buffer>,
}

impl KernelOp for Op {
    const NAME: &'static str = "packed_attention";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let plan = self.pass.forward.iter().find(|(attention, _)| *attention == self.attention);
        let Some((_, plan)) = plan else { bail!("packed_attention: no plan for {:?}", self.attention) };
        let over = OverRows { plan: plan.clone(), lse: Some(self.lse.clone()) };
        gpu.with(Self::NAME, &[&self.k, &self.v], |kv| over.over(gpu, &inputs[0], &kv[0], &kv[1]))
    }

    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], y: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let rows = Rows { q: inputs[0], k: &self.k, v: &self.v, out: y, lse: &self.lse, grad: dy };
        let of = self.pass.backward.gradients(gpu, &rows, self.attention, self.pass.stored)?;
        let qkv = Tensor::cat(&[of.q, of.k, of.v], 1)?;
        match (inputs.get(1), of.prefix) {
            (None, _) => Ok(vec![Some(qkv)]),
            (Some(_), Some([k, v])) => Ok(vec![Some(qkv), Some(Tensor::cat(&[k, v], 1)?.to_dtype(DType::F32)?)]),
            (Some(_), None) => bail!("packed_attention: stored rows without a gradient"),
        }
    }
}
