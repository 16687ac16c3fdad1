//! The KV pool: slabs of pages, one pair a layer. Who owns which page is [`block_allocator`]'s business.
pub mod block_allocator;

use crate::error::{Error, Result};
use crate::ops::Machine;
use crate::ops::gpu::{Buffer, Gpu};
use crate::ops::kv_write::device::Slabs;
use crate::ops::kv_write::{self, Part};
use crate::ops::memory::sparse;
use crate::ops::prefix_attention::{KvLayout, PAGE};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use crate::ops::prefix_attention::PAGE as PAGE_TOKENS;

/// A page of the pool: K and V of [`PAGE_TOKENS`] positions in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// Pages that hold `tokens` positions.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// K and V of all layers. Written in place by the engine thread, which owns it.
pub struct KvPool {
    id: u64,
    layers: Layers,
    layout: KvLayout,
    pages: usize,
}

/// Pools made so far.
static POOLS: AtomicU64 = AtomicU64::new(0);

/// Where the layers' K and V are.
enum Layers {
    /// Laid out for the processor's lanes.
    Host(Vec<Layer>),
    /// On a GPU, slot by slot, in the type of its activations.
    Device(Gpu, Vec<Slabs>),
}

struct Layer {
    /// `[pages, kv_heads, head_dim, PAGE]`
    keys: Tensor,
    /// `[pages, kv_heads, PAGE, head_dim]`
    values: Tensor,
}

impl KvPool {
    /// A pool of `pages` of elements of `dtype`, where `machine` runs. Debug builds poison it with NaN:
    /// whatever reads a slot that nobody wrote shows at once.
    pub fn new(layout: KvLayout, num_layers: usize, pages: usize, machine: &Machine, dtype: DType) -> Result<Self> {
        let id = POOLS.fetch_add(1, Ordering::Relaxed);
        if let Some(gpu) = machine.gpu() {
            let slabs = (0..num_layers).map(|_| Slabs::new(gpu, dtype, pages * PAGE, layout));
            let layers = Layers::Device(gpu.clone(), slabs.collect::<candle_core::Result<_>>()?);
            return Ok(KvPool { id, layers, layout, pages });
        }
        let slab = |shape: (usize, usize, usize, usize)| {
            if cfg!(debug_assertions) {
                return Tensor::full(f32::NAN, (), &Device::Cpu)?.to_dtype(dtype)?.broadcast_as(shape)?.contiguous();
            }
            let len = pages * layout.page_len();
            match dtype {
                DType::F32 => Tensor::from_vec(sparse::<f32>(len), shape, &Device::Cpu),
                DType::BF16 => Tensor::from_vec(sparse::<bf16>(len), shape, &Device::Cpu),
                DType::F16 => Tensor::from_vec(sparse::<f16>(len), shape, &Device::Cpu),
                other => candle_core::bail!("K and V are not held in {other:?}"),
            }
        };
        let layers = (0..num_layers).map(|_| {
            Ok(Layer {
                keys: slab((pages, layout.kv_heads, layout.head_dim, PAGE))?,
                values: slab((pages, layout.kv_heads, PAGE, layout.head_dim))?,
            })
        });
        Ok(KvPool { id, layers: Layers::Host(layers.collect::<Result<_>>()?), layout, pages })
    }

    /// Bytes of one page over all layers, of elements of `dtype`.
    pub fn page_bytes(layout: KvLayout, num_layers: usize, dtype: DType) -> usize {
        2 * layout.page_len() * num_layers * dtype.size_in_bytes()
    }

    /// Its own, of all pools of the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Shape of the rows.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The slabs of `layer` on the processor: keys, values.
    pub fn host(&self, layer: usize) -> Result<(&Tensor, &Tensor)> {
        match &self.layers {
            Layers::Host(layers) => Ok((&layers[layer].keys, &layers[layer].values)),
            Layers::Device(..) => Err(Error::internal("the KV pool is on a GPU, the model is not")),
        }
    }

    /// The slabs of `layer` on the GPU.
    pub fn device(&self, layer: usize) -> Result<&Slabs> {
        match &self.layers {
            Layers::Device(_, layers) => Ok(&layers[layer]),
            Layers::Host(_) => Err(Error::internal("the model is on a GPU, the KV pool is not")),
        }
    }

    /// Writes K and V rows of `layer` into `slots`: K starts at `column` of `rows` `[m, width]`, V follows it. On the processor;
    /// a GPU's projections write there themselves.
    pub fn write(&self, layer: usize, rows: &Tensor, slots: &Arc<[u32]>, column: usize) -> Result<()> {
        let (keys, values) = self.host(layer)?;
        let width = self.layout.kv_heads * self.layout.head_dim;
        kv_write::kv_write(keys, rows, Part::Key, self.layout, slots, column)?;
        kv_write::kv_write(values, rows, Part::Value, self.layout, slots, column + width)?;
        Ok(())
    }

    /// Puts stored rows `[len, 2 * layers * kv_heads * head_dim]`, the layout that prefix-tuning stores, at positions `0..len`, which
    /// lie in `pages`.
    pub fn store(&self, data: &[f32], len: usize, pages: &[PageId]) -> Result<()> {
        let width = 2 * self.layout.kv_heads * self.layout.head_dim;
        let slots = slots(pages, len);
        match &self.layers {
            Layers::Host(layers) => {
                let all = Tensor::from_slice(data, (len, layers.len(), width), &Device::Cpu)?;
                for layer in 0..layers.len() {
                    // Rows 2l and 2l + 1 are neighbours: K of the layer, then V.
                    let rows = all.narrow(1, layer, 1)?.squeeze(1)?.contiguous()?;
                    self.write(layer, &rows, &slots, 0)?;
                }
            }
            Layers::Device(gpu, layers) => {
                let rows = Buffer::new(gpu, data)?;
                for (index, slabs) in layers.iter().enumerate() {
                    slabs.copy(gpu, &rows, index * width, layers.len() * width, &slots)?;
                }
            }
        }
        Ok(())
    }

    /// K and V of positions `0..len`, which lie in `pages`, of all layers, as [`KvPool::store`] takes them: f32 on the processor.
    pub fn read(&self, pages: &[PageId], len: usize) -> Result<Tensor> {
        let dim = self.layout.head_dim;
        let width = self.layout.kv_heads * dim;
        let count = match &self.layers {
            Layers::Host(layers) => layers.len(),
            Layers::Device(_, layers) => layers.len(),
        };
        let columns = 2 * count * width;
        let mut rows = vec![0f32; len * columns];
        match &self.layers {
            Layers::Host(layers) => {
                let of = |slab: &Tensor, page: PageId| -> Result<Vec<f32>> {
                    let page = slab.narrow(0, page.0 as usize, 1)?.to_dtype(DType::F32)?;
                    Ok(page.flatten_all()?.to_vec1()?)
                };
                for (index, layer) in layers.iter().enumerate() {
                    for (rows, page) in rows.chunks_mut(PAGE * columns).zip(pages) {
                        let (keys, values) = (of(&layer.keys, *page)?, of(&layer.values, *page)?);
                        for (place, row) in rows.chunks_exact_mut(columns).enumerate() {
                            let (k, v) = row[2 * index * width..][..2 * width].split_at_mut(width);
                            for (head, (k, v)) in k.chunks_exact_mut(dim).zip(v.chunks_exact_mut(dim)).enumerate() {
                                let at = head * dim * PAGE;
                                k.iter_mut().enumerate().for_each(|(d, k)| *k = keys[at + d * PAGE + place]);
                                v.copy_from_slice(&values[at + place * dim..][..dim]);
                            }
                        }
                    }
                }
            }
            Layers::Device(_, layers) => {
                let slots = slots(pages, len);
                for (index, slabs) in layers.iter().enumerate() {
                    let kv = slabs.read(&slots)?;
                    for (row, kv) in rows.chunks_exact_mut(columns).zip(kv.chunks_exact(2 * width)) {
                        row[2 * index * width..][..2 * width].copy_from_slice(kv);
                    }
                }
            }
        }
        Ok(Tensor::from_vec(rows, (len, columns), &Device::Cpu)?)
    }

    /// Fills `page` with NaN, in debug builds: a recycled page must not pass for a fresh one.
    pub fn poison(&self, page: PageId) -> Result<()> {
        match &self.layers {
            Layers::Host(layers) => {
                let width = 2 * self.layout.kv_heads * self.layout.head_dim;
                let rows = Tensor::full(f32::NAN, (PAGE, width), &Device::Cpu)?;
                (0..layers.len()).try_for_each(|layer| self.write(layer, &rows, &slots(&[page], PAGE), 0))
            }
            Layers::Device(_, layers) => Ok(layers.iter().try_for_each(|slabs| slabs.poison(page.0 as usize, PAGE))?),
        }
    }
}

/// Slots of positions `0..len` in `pages`.
fn slots(pages: &[PageId], len: usize) -> Arc<[u32]> {
    (0..len).map(|i| pages[i / PAGE].0 * PAGE as u32 + (i % PAGE) as u32).collect()
}
