//! The launches of `kernels/prefix_attention.cu`: over the pool of a device, and over packed rows.
mod plan;
mod step;

pub use plan::{Cut, Group, Split, Step, WorkList, capacity};

pub use step::{OnDevice, Uploads};

use super::super::gpu::{Buffer, Call, Fresh, Gpu, Grid, KernelOp, View, Words};
use super::super::kv_write::device::Slabs;
use super::{Attention, KvLayout, PackedPlan, PackedSequence, SequenceView};
use crate::ops::prefix_attention::PAGE;
use candle_core::{DType, Result, Shape, Tensor, bail};
use plan::width;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Warps of a block.
const WARPS: usize = 4;

/// The work list of the layers of one kind, on the device.
pub struct DevicePlan {
    list: WorkList,
    data: Arc<Buffer>,
    /// Elements of `data` at which the list and the table start.
    at: (usize, usize),
    /// (m, l) of all partial results, then their o. The layers of a step use it one after the other.
    scratch: Arc<Buffer>,
    layout: KvLayout,
    heads: usize,
    slots: usize,
    attention: Attention,
}

/// Everything about a plan that its launches depend on, but for what they read from the device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Launched {
    rows: usize,
    units: usize,
    combines: bool,
    vectors: usize,
    at: (usize, usize),
}

impl DevicePlan {
    /// One upload of its own. `scratch` is for what is split; nothing else may use it while kernels run that are not on the device's stream.
    ///
    /// # Errors
    /// As of [`WorkList::new`].
    pub fn new(gpu: &Gpu, step: &Step<'_>, split: Split, group: Group, scratch: &Arc<Buffer>) -> Result<Self> {
        let list = WorkList::new(step, Cut { split, group, scratch: scratch.bytes() })?;
        let mut words = Words::default();
        let at = (words.add(&list.data), words.add(step.table));
        Ok(Self::within(&Arc::new(words.upload(gpu)?), at, list, step, scratch))
    }

    /// `list`, of `step`, and the step's table lie in `data`, from the elements `at` on.
    fn within(data: &Arc<Buffer>, at: (usize, usize), list: WorkList, step: &Step<'_>, scratch: &Arc<Buffer>) -> Self {
        let (data, scratch) = (data.clone(), scratch.clone());
        let Step { layout, heads, slots, attention, .. } = *step;
        DevicePlan { list, data, at, scratch, layout, heads, slots, attention }
    }

    /// Equal ones have equal launches on the same buffers.
    pub fn launched(&self) -> Launched {
        let WorkList { m, units, combines, vectors, .. } = self.list;
        Launched { rows: m, units, combines, vectors, at: self.at }
    }

    /// Whether rows of sequences share units, or spans of a row are split: whether there is a second launch.
    pub fn combines(&self) -> bool {
        self.list.combines
    }

    /// Where the o of partial results start, in f32.
    fn scratch_at(&self) -> usize {
        (2 * self.list.room * self.heads).next_multiple_of(4)
    }

    /// Name, width and row tiles of the kernel.
    fn variant(&self, dtype: DType) -> Result<(&'static str, usize, usize)> {
        let (width, most) = (width(self.layout.head_dim), capacity(self.layout.head_dim) / 16);
        if dtype == DType::F32 {
            return Ok(("prefix_attention", width, most));
        }
        if !self.layout.head_dim.is_multiple_of(8) {
            bail!("prefix_attention: heads of {} in {dtype:?}: only multiples of 8", self.layout.head_dim);
        }
        // One tile where it will do: fewer registers, more blocks. A row's bits are the same.
        let narrow = self.list.vectors <= 16;
        Ok(match (width, narrow) {
            (32, _) => ("prefix_attention_32x4", 32, 4),
            (64, true) => ("prefix_attention_64x1", 64, 1),
            (64, false) => ("prefix_attention_64x4", 64, 4),
            (96, true) => ("prefix_attention_96x1", 96, 1),
            (96, false) => ("prefix_attention_96x2", 96, 2),
            (128, true) => ("prefix_attention_128x1", 128, 1),
            (128, false) => ("prefix_attention_128x2", 128, 2),
            _ => ("prefix_attention_256x1", 256, 1),
        })
    }

    /// Bytes, as the kernel's header counts them.
    fn shared(&self, dtype: DType, width: usize, tiles: usize) -> usize {
        if dtype == DType::F32 {
            let dim = self.layout.head_dim;
            return 4 * (WARPS * dim + WARPS * 32 + self.list.vectors * dim);
        }
        let all = width * tiles;
        32 * all + 2048 * (all / 8).min(16) + 64 * all + 1600 * tiles
    }

    /// `q` `[m, stride]` with the query heads first; `kv` adds K and V. Returns `[m, heads * head_dim]`.
    ///
    /// # Safety
    /// `kv` adds two pointers to as many slots as the plan was made for, of its layout and of the type of `q`.
    unsafe fn launch<'a>(
        &self,
        gpu: &'a Gpu,
        q: &View<'_>,
        kv: impl FnOnce(Call<'a>) -> Call<'a>,
        lse: Option<&Buffer>,
    ) -> Result<(Fresh, Shape)> {
        let (m, stride) = q.dims2()?;
        let (dtype, KvLayout { kv_heads, head_dim }) = (q.dtype(), self.layout);
        let out_width = self.heads * head_dim;
        if m != self.list.m || stride < out_width || dtype != DType::F32 && !stride.is_multiple_of(8) {
            bail!("prefix_attention: q is [{m}, {stride}], the plan [{}, {out_width}]", self.list.m);
        }
        if lse.is_some_and(|lse| lse.bytes() < m * self.heads * size_of::<f32>()) {
            bail!("prefix_attention: no room for {m} rows of {} sums", self.heads);
        }
        let (kernel, width, tiles) = self.variant(dtype)?;
        let mut out = gpu.fresh(dtype, m * out_width)?;
        let list = &self.list;
        let partial = |call: Call<'a>| call.buffer(&self.scratch, self.scratch_at(), 4).buffer(&self.scratch, 0, 4);
        let call = kv(gpu.call(kernel, dtype).view(q).aligned()).fresh(&mut out).aligned().optional(lse);
        let (at, table) = self.at;
        let call = partial(call).buffer(&self.data, 0, 4).int(at).int(at + list.rows_at()).int(table);
        let call = call.int(stride).int(self.heads).int(kv_heads).int(head_dim);
        let call = call.float(self.attention.scale).float(self.attention.soft_cap.unwrap_or(0.0));
        let blocks = [list.units as u32, kv_heads as u32, 1];
        let shared = self.shared(dtype, width, tiles) as u32;
        // SAFETY: the kernel's arguments; the list was made from a checked step, scratch has room for its partial results, and K
        // and V are the caller's.
        unsafe { call.launch(Grid { blocks, threads: 32 * WARPS as u32, shared })? };
        let call = gpu.call("prefix_attention_combine", dtype).fresh(&mut out).optional(lse);
        let call = partial(call).buffer(&self.data, 0, 4).int(at + list.combine_at()).int(self.heads).int(head_dim);
        let blocks = [if list.combines { m as u32 } else { 0 }, self.heads.div_ceil(WARPS) as u32, 1];
        // SAFETY: as above.
        unsafe { call.launch(Grid { blocks, threads: 32 * WARPS as u32, shared: 0 })? };
        Ok((out, (m, out_width).into()))
    }
}

struct OverPool {
    plan: Arc<DevicePlan>,
    slabs: Slabs,
}

/// `q` `[m, width]`, the query heads first -> `[m, heads * head_dim]`, over the slots of one layer.
pub fn attend(gpu: &Gpu, q: &Tensor, slabs: &Slabs, plan: &Arc<DevicePlan>) -> Result<Tensor> {
    gpu.apply1(OverPool { plan: plan.clone(), slabs: slabs.clone() }, q)
}

impl KernelOp for OverPool {
    const NAME: &'static str = "prefix_attention";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (q, Slabs { keys, values, dtype, slots, layout }) = (&inputs[0], &self.slabs);
        if *layout != self.plan.layout || *slots < self.plan.slots || *dtype != q.dtype() {
            bail!(
                "prefix_attention: {slots} slots of {layout:?}, {dtype:?}; the plan has {} of {:?}, q is {:?}",
                self.plan.slots,
                self.plan.layout,
                q.dtype()
            );
        }
        // SAFETY: checked above.
        unsafe {
            self.plan.launch(gpu, q, |call| call.buffer(keys, 0, 1).aligned().buffer(values, 0, 1).aligned(), None)
        }
    }
}

/// What packed rows look like to the kernel: views whose page ranges index the table of first rows.
pub fn packed_views(plan: &PackedPlan) -> (Vec<SequenceView>, Vec<u32>) {
    let mut table = Vec::new();
    let mut runs = |rows: &Range<usize>| {
        let at = table.len();
        table.extend(rows.clone().step_by(PAGE).map(|row| row as u32));
        at..table.len()
    };
    let mut prefixes: HashMap<Range<usize>, Range<usize>> = HashMap::new();
    let view = |s: &PackedSequence| SequenceView {
        rows: s.queries.clone(),
        first: 0,
        prefix_len: s.prefix.len(),
        prefix_pages: prefixes.entry(s.prefix.clone()).or_insert_with(|| runs(&s.prefix)).clone(),
        own_pages: runs(&s.own),
    };
    (plan.sequences.iter().map(view).collect(), table)
}

/// Attention over packed rows: q `[m, heads * head_dim]`, k and v `[n, kv_heads * head_dim]` with n the plan's slots. The logarithms of
/// the sums of exponentials `[m, heads]` go to `lse` if it is there: a gradient needs them. It has none itself.
pub struct OverRows {
    /// Made from [`packed_views`].
    pub plan: Arc<DevicePlan>,
    /// f32.
    pub lse: Option<Arc<Buffer>>,
}

impl KernelOp for OverRows {
    const NAME: &'static str = "packed_attention";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let [q, k, v] = inputs else { bail!("packed_attention: q, k and v are wanted") };
        self.over(gpu, q, k, v)
    }
}

impl OverRows {
    /// q may have longer rows than its heads.
    pub(super) fn over(&self, gpu: &Gpu, q: &View<'_>, k: &View<'_>, v: &View<'_>) -> Result<(Fresh, Shape)> {
        let want = (self.plan.slots, self.plan.layout.kv_heads * self.plan.layout.head_dim);
        if k.dims2()? != want || v.dims2()? != want || [k.dtype(), v.dtype()] != [q.dtype(); 2] {
            bail!("packed_attention: k is {:?}, v {:?}, the plan has {want:?}", k.dims2()?, v.dims2()?);
        }
        // SAFETY: checked above.
        unsafe { self.plan.launch(gpu, q, |call| call.view(k).aligned().view(v).aligned(), self.lse.as_deref()) }
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
