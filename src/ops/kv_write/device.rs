//! The launches of `kernels/kv_write.cu`: what a projection becomes, and stored prefixes, into the pool of a device.
use crate::ops::gpu::{Buffer, DeviceRows, Fresh, Gpu, Grid, KernelOp, View};
use crate::ops::norm::HeadNorm;
use crate::ops::prefix_attention::{KvLayout, MAX_HEAD_DIM};
use crate::ops::rope::Frequencies;
use candle_core::{DType, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// K and V of one layer on the device: `[slots, kv_heads, head_dim]` each, of one type.
#[derive(Clone)]
pub struct Slabs {
    /// K, turned.
    pub keys: Arc<Buffer>,
    /// V.
    pub values: Arc<Buffer>,
    /// Type of their elements: that of the activations.
    pub dtype: DType,
    /// How many slots each has.
    pub slots: usize,
    /// Shape of a slot.
    pub layout: KvLayout,
}

/// What happens to q and k on the way.
#[derive(Clone)]
pub struct Projection {
    /// Query heads.
    pub heads: usize,
    /// Norms of q and k heads, before they turn.
    pub norm: Option<HeadNorm>,
    /// By what they turn.
    pub rope: Option<Arc<Frequencies>>,
}

struct Write {
    rows: Arc<DeviceRows>,
    slabs: Slabs,
    projection: Projection,
}

/// `qkv` `[m, (heads + 2 * kv_heads) * head_dim]` -> normed and turned queries `[m, heads * head_dim]`; K and V go to the slots of
/// `rows`.
pub fn project(
    gpu: &Gpu,
    qkv: &Tensor,
    rows: &Arc<DeviceRows>,
    slabs: &Slabs,
    projection: &Projection,
) -> Result<Tensor> {
    gpu.apply1(Write { rows: rows.clone(), slabs: slabs.clone(), projection: projection.clone() }, qkv)
}

impl KernelOp for Write {
    const NAME: &'static str = "kv_write";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, Projection { heads, norm, rope }) = (&inputs[0], &self.projection);
        let KvLayout { kv_heads, head_dim } = self.slabs.layout;
        let ((m, width), all) = (x.dims2()?, heads + 2 * kv_heads);
        if m != self.rows.len() || width != all * head_dim || head_dim > MAX_HEAD_DIM {
            bail!("kv_write: x is [{m}, {width}], {} rows, {all} heads of {head_dim}", self.rows.len());
        }
        self.slabs.fits(&self.rows)?;
        if x.dtype() != self.slabs.dtype {
            bail!("kv_write: x is {:?}, the pool {:?}", x.dtype(), self.slabs.dtype);
        }
        let half = rope.as_ref().map_or(0, |r| r.inv_freq.len());
        if 2 * half > head_dim {
            bail!("kv_write: {} of a head of {head_dim} turn", 2 * half);
        }
        let mut q = gpu.fresh(x.dtype(), m * heads * head_dim)?;
        let (slot, position) = (self.rows.slot(), self.rows.position());
        let call = gpu.call("kv_write", x.dtype()).view(x).buffer(slot.0, slot.1, 4).buffer(position.0, position.1, 4);
        let call = call.optional(rope.as_ref().and_then(|r| r.inv_freq.buffer()));
        let call = call.optional(norm.as_ref().and_then(HeadNorm::q_buffer));
        let call = call.optional(norm.as_ref().and_then(HeadNorm::k_buffer));
        let call = call.fresh(&mut q).buffer(&self.slabs.keys, 0, 1).buffer(&self.slabs.values, 0, 1);
        let call = call.int(m).int(*heads).int(kv_heads).int(head_dim).int(half);
        let call = call.float(rope.as_ref().map_or(1.0, |r| r.scale)).float(norm.as_ref().map_or(0.0, HeadNorm::eps));
        let grid = Grid { blocks: [(m * all).div_ceil(4) as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments; `Slabs::fits` saw the slots.
        unsafe { call.launch(grid)? };
        Ok((q, (m, heads * head_dim).into()))
    }
}

impl Slabs {
    /// Slots for `slots` positions.
    pub fn new(gpu: &Gpu, dtype: DType, slots: usize, layout: KvLayout) -> Result<Self> {
        let bytes = slots * layout.kv_heads * layout.head_dim * dtype.size_in_bytes();
        let slab = || Ok::<_, candle_core::Error>(Arc::new(Buffer::poisoned(gpu, bytes)?));
        Ok(Slabs { keys: slab()?, values: slab()?, dtype, slots, layout })
    }

    /// # Errors
    /// If one of `slots` is outside of the pool.
    pub fn check(&self, slots: &[u32]) -> Result<()> {
        match slots.iter().find(|slot| **slot as usize >= self.slots) {
            None => Ok(()),
            Some(slot) => bail!("kv_write: slot {slot} is outside the pool of {}", self.slots),
        }
    }

    /// # Errors
    /// If one of `rows` has no slot here.
    pub fn fits(&self, rows: &DeviceRows) -> Result<()> {
        match rows.largest_slot() {
            Some(slot) => self.check(&[slot]),
            None => bail!("kv_write: {} rows without slots", rows.len()),
        }
    }

    /// Writes stored rows, `[slots.len(), stride]` of which the first `2 * kv_heads * head_dim` from `column` on are K, then V.
    pub fn copy(&self, gpu: &Gpu, rows: &Buffer, column: usize, stride: usize, slots: &[u32]) -> Result<()> {
        self.check(slots)?;
        let width = self.layout.kv_heads * self.layout.head_dim;
        let values = slots.len() * stride;
        if column + 2 * width > stride || values * 4 > rows.bytes() {
            bail!("kv_write: {} rows of {stride} from {column} on in {} bytes", slots.len(), rows.bytes());
        }
        let table = Buffer::new(gpu, slots)?;
        let call = gpu.call("kv_copy", self.dtype).buffer(rows, column, 4).buffer(&table, 0, 4);
        let call = call.buffer(&self.keys, 0, 1).buffer(&self.values, 0, 1).int(width).int(stride);
        let grid = Grid { blocks: [slots.len() as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments; slots and rows were checked.
        unsafe { call.launch(grid) }
    }

    /// K and V of `slots` as f32: `[slots.len(), 2 * kv_heads * head_dim]`.
    pub fn read(&self, slots: &[u32]) -> Result<Vec<f32>> {
        self.check(slots)?;
        let width = self.layout.kv_heads * self.layout.head_dim;
        let mut rows = Vec::with_capacity(2 * width * slots.len());
        for &slot in slots {
            for slab in [&self.keys, &self.values] {
                let at = slot as usize * width;
                match self.dtype {
                    DType::F32 => rows.extend(slab.read::<f32>(at, width)?),
                    DType::BF16 => rows.extend(slab.read::<half::bf16>(at, width)?.iter().map(|v| v.to_f32())),
                    DType::F16 => rows.extend(slab.read::<half::f16>(at, width)?.iter().map(|v| v.to_f32())),
                    other => bail!("kv_write: no pool is {other:?}"),
                }
            }
        }
        Ok(rows)
    }

    /// Every slot of a page becomes NaN.
    pub fn poison(&self, page: usize, page_slots: usize) -> Result<()> {
        let width = self.layout.kv_heads * self.layout.head_dim * page_slots * self.dtype.size_in_bytes();
        let nan = vec![u32::MAX; width / 4];
        [&self.keys, &self.values].into_iter().try_for_each(|slab| slab.write(page * nan.len(), &nan))
    }
}
