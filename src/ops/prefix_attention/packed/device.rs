//! The launches of `kernels/prefix_attention_backward.cu`: gradients of attention over packed rows.
mod plan;

use super::{Attention, PackedPlan};
use crate::ops::gpu::{Buffer, Gpu, Grid};
use crate::ops::prefix_attention::{KvLayout, MAX_HEAD_DIM};
use candle_core::{DType, Result, Tensor, bail};
use plan::Lists;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What the gradient reads. All but `lse` are of one type; rows of q, out and grad may be longer than their heads.
pub struct Rows<'a> {
    /// `[m, >= heads * head_dim]`
    pub q: &'a Tensor,
    /// `[n, kv_heads * head_dim]`
    pub k: &'a Tensor,
    /// `[n, kv_heads * head_dim]`
    pub v: &'a Tensor,
    /// What the forward pass made, `[m, >= heads * head_dim]`.
    pub out: &'a Tensor,
    /// From the forward pass: log of the sum of e^score over the keys that a row sees, `[m, heads]` f32.
    pub lse: &'a Buffer,
    /// Of `out`.
    pub grad: &'a Tensor,
}

/// Of the sum that `grad` is the gradient of.
pub struct Gradients {
    /// `[m, heads * head_dim]`, in the type of q.
    pub q: Tensor,
    /// `[n - prefix_rows, kv_heads * head_dim]`, in the type of k.
    pub k: Tensor,
    /// `[n - prefix_rows, kv_heads * head_dim]`, in the type of v.
    pub v: Tensor,
    /// Of K and V of the first `prefix_rows` rows, f32.
    pub prefix: Option<[Tensor; 2]>,
}

/// A plan with its work lists on the device. They are made when a layer first needs them: all layers with one window share.
pub struct DevicePlan {
    plan: Arc<PackedPlan>,
    lists: Mutex<HashMap<Key, Arc<DeviceLists>>>,
}

/// What the lists depend on besides the plan.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    rows: usize,
    window: Option<usize>,
    causal: bool,
    /// Sizes of tiles of keys and of queries.
    sizes: [usize; 2],
}

struct DeviceLists {
    keys: Work,
    queries: Work,
}

/// The list of one launch.
struct Work {
    /// `[items | runs | sums]`
    buffer: Buffer,
    /// Where runs and sums start.
    starts: [usize; 2],
    items: usize,
    sums: usize,
    parts: usize,
}

impl Work {
    fn new(gpu: &Gpu, lists: &Lists) -> Result<Self> {
        let [items, runs, sums] = lists.encode()?;
        let (starts, counts) = ([items.len(), items.len() + runs.len()], [items.len() / 5, sums.len() / 4]);
        let buffer = Buffer::new(gpu, &[items, runs, sums].concat())?;
        Ok(Work { buffer, starts, items: counts[0], sums: counts[1], parts: lists.parts() })
    }
}

/// How the kernels cut: as `Tiles` in the kernel's source has it.
struct Tiles {
    threads: usize,
    /// Rows that a block owns.
    fixed: usize,
    shared: usize,
}

impl Tiles {
    /// For heads of `dim`, which is 64, 128 or 256.
    fn new(dim: usize, dtype: DType, keys: bool) -> Self {
        let (wide, broad, size) = (dtype == DType::F32, dim > 128, dtype.size_in_bytes());
        let column_warps = if broad { 2 } else { 1 };
        let row_warps = if wide && broad { 2 } else { 4 };
        let stream = match (wide, broad) {
            (true, false) => 16,
            (true, true) => 8,
            (false, true) => 16,
            (false, false) if keys => 32,
            (false, false) => 64,
        };
        let (fixed, warps) = (16 * row_warps, row_warps * column_warps);
        let queries = if keys { stream } else { fixed };
        let room = if wide { warps * 16 * (stream + 4) * 4 } else { 0 };
        let shared = 2 * (fixed + stream) * (dim + 16 / size) * size + 12 * queries + room;
        Tiles { threads: 32 * warps, fixed, shared }
    }

    fn grid(&self, items: usize, kv_heads: usize) -> Grid {
        Grid { blocks: [items as u32, kv_heads as u32, 1], threads: self.threads as u32, shared: self.shared as u32 }
    }
}

impl DevicePlan {
    /// Nothing is computed yet.
    pub fn new(plan: &Arc<PackedPlan>) -> Self {
        DevicePlan { plan: plan.clone(), lists: Mutex::default() }
    }

    fn lists(&self, gpu: &Gpu, key: Key, attention: Attention) -> Result<Arc<DeviceLists>> {
        let mut all = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lists) = all.get(&key) {
            return Ok(lists.clone());
        }
        let [keys, queries] = key.sizes;
        let lists = Arc::new(DeviceLists {
            keys: Work::new(gpu, &Lists::keys(&self.plan, attention, key.rows, keys))?,
            queries: Work::new(gpu, &Lists::queries(&self.plan, attention, queries))?,
        });
        all.insert(key, lists.clone());
        Ok(lists)
    }

    /// Gradients of q, k and v. A row of K or V that several sequences see gets the sum of their shares, in their order.
    /// `prefix_rows`: those of the first so many rows come apart, in f32; they are weights of adapters.
    ///
    /// # Errors
    /// For shapes and types that do not fit the plan.
    pub fn gradients(&self, gpu: &Gpu, rows: &Rows<'_>, attention: Attention, prefix_rows: usize) -> Result<Gradients> {
        let (plan, KvLayout { kv_heads, head_dim }) = (&*self.plan, self.plan.layout);
        let heads = plan.heads;
        let ((m, q_width), (n, kv_width)) = (rows.q.dims2()?, rows.k.dims2()?);
        let widths = [rows.out.dims2()?, rows.grad.dims2()?];
        plan.check(m, n, [heads * head_dim, kv_width, rows.v.dims2()?.1])?;
        let dtype = rows.q.dtype();
        let short = widths.iter().any(|(r, w)| *r != m || *w < heads * head_dim) || q_width < heads * head_dim;
        let mixed = [rows.k, rows.v, rows.out, rows.grad].iter().any(|t| t.dtype() != dtype);
        let lse = rows.lse.bytes() == m * heads * size_of::<f32>();
        if short || mixed || !lse || rows.v.dim(0)? != n || prefix_rows > n || head_dim > MAX_HEAD_DIM {
            bail!(
                "packed_attention: q [{m}, {q_width}], k [{n}, {kv_width}], out and its gradient {widths:?}, {} bytes of lse, {prefix_rows} \
                 rows of prefixes",
                rows.lse.bytes()
            );
        }
        let padded = head_dim.next_power_of_two().max(64);
        let [by_keys, by_queries] = [true, false].map(|keys| Tiles::new(padded, dtype, keys));
        let Attention { window, causal, .. } = attention;
        let key = Key { rows: n, window, causal, sizes: [by_keys.fixed, by_queries.fixed] };
        let lists = self.lists(gpu, key, attention)?;

        let fresh = |dtype, rows: usize, width: usize| gpu.fresh(dtype, rows * width);
        let own = n - prefix_rows;
        let (mut dq, mut dots) = (fresh(dtype, m, heads * head_dim)?, fresh(DType::F32, m, heads)?);
        let (mut dk, mut dv) = (fresh(dtype, own, kv_width)?, fresh(dtype, own, kv_width)?);
        let (mut pk, mut pv) = (fresh(DType::F32, prefix_rows, kv_width)?, fresh(DType::F32, prefix_rows, kv_width)?);
        let mut partial = fresh(DType::F32, lists.keys.parts * kv_heads * 2 * by_keys.fixed, head_dim)?;
        let cap = attention.soft_cap.unwrap_or(0.0);
        let window = attention.window.unwrap_or(usize::MAX).min(i32::MAX as usize);
        let [keys_kernel, queries_kernel] = match padded {
            64 => ["prefix_attention_backward_keys_64", "prefix_attention_backward_queries_64"],
            128 => ["prefix_attention_backward_keys_128", "prefix_attention_backward_queries_128"],
            _ => ["prefix_attention_backward_keys_256", "prefix_attention_backward_queries_256"],
        };
        let tensors = [rows.q, rows.k, rows.v, rows.out, rows.grad];
        gpu.with("packed_attention_gradient", &tensors, |views| {
            let [q, k, v, out, grad] = views else { bail!("packed_attention: five inputs") };
            let grid = Grid { blocks: [(m * heads).div_ceil(4) as u32, 1, 1], threads: 128, shared: 0 };
            let call = gpu.call("prefix_attention_backward_dots", dtype).view(out).view(grad).fresh(&mut dots);
            let call = call.int(m * heads).int(heads).int(head_dim).int(widths[0].1).int(widths[1].1);
            // SAFETY: the kernel's arguments; the shapes were checked above.
            unsafe { call.launch(grid)? };

            let Work { buffer, starts, items, .. } = &lists.keys;
            let call =
                gpu.call(keys_kernel, dtype).view(q).view(k).view(v).view(grad).buffer(rows.lse, 0, 4).fresh(&mut dots);
            let call = call.buffer(buffer, 0, 4).buffer(buffer, starts[0], 4);
            let call = call.fresh(&mut pk).fresh(&mut pv).fresh(&mut dk).fresh(&mut dv).fresh(&mut partial);
            let call = call.int(heads).int(kv_heads).int(head_dim).int(q_width).int(widths[1].1);
            let call = call.int(prefix_rows).int(kv_width).int(usize::from(causal)).int(window);
            // SAFETY: as above; the lists were made from the plan, which was checked against m and n.
            unsafe { call.float(attention.scale).float(cap).launch(by_keys.grid(*items, kv_heads))? };

            let call =
                gpu.call("prefix_attention_backward_sum", dtype).buffer(buffer, starts[1], 4).fresh(&mut partial);
            let call = call.fresh(&mut pk).fresh(&mut pv).fresh(&mut dk).fresh(&mut dv);
            let call = call.int(kv_heads).int(head_dim).int(by_keys.fixed).int(prefix_rows).int(kv_width);
            let grid = Grid { blocks: [lists.keys.sums as u32, kv_heads as u32, 1], threads: 256, shared: 0 };
            // SAFETY: as above.
            unsafe { call.launch(grid)? };

            let Work { buffer, starts, items, .. } = &lists.queries;
            let call = gpu
                .call(queries_kernel, dtype)
                .view(q)
                .view(k)
                .view(v)
                .view(grad)
                .buffer(rows.lse, 0, 4)
                .fresh(&mut dots);
            let call = call.buffer(buffer, 0, 4).buffer(buffer, starts[0], 4).fresh(&mut dq);
            let call = call.int(heads).int(kv_heads).int(head_dim).int(q_width).int(widths[1].1);
            let call = call.int(heads * head_dim).int(usize::from(causal)).int(window);
            // SAFETY: as above.
            unsafe { call.float(attention.scale).float(cap).launch(by_queries.grid(*items, kv_heads)) }
        })?;
        Ok(Gradients {
            q: dq.tensor((m, heads * head_dim)),
            k: dk.tensor((own, kv_width)),
            v: dv.tensor((own, kv_width)),
            prefix: (prefix_rows > 0).then(|| [pk, pv].map(|p| p.tensor((prefix_rows, kv_width)))),
        })
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
