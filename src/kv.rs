//! The KV pool: slabs of pages, one pair a layer. Who owns which page is [`block_allocator`]'s business.
pub mod block_allocator;

use crate::error::Result;
use crate::ops::kv_write::{self, Part};
use crate::ops::prefix_attention::{KvLayout, PAGE};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

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
    layers: Vec<Layer>,
    layout: KvLayout,
    pages: usize,
}

struct Layer {
    /// `[pages, kv_heads, head_dim, PAGE]`
    keys: Tensor,
    /// `[pages, kv_heads, PAGE, head_dim]`
    values: Tensor,
}

impl KvPool {
    /// A pool of `pages`. Debug builds poison it with NaN: whatever reads a slot that nobody wrote shows at once.
    pub fn new(layout: KvLayout, num_layers: usize, pages: usize, device: &Device) -> Result<Self> {
        let slab = |shape: (usize, usize, usize, usize)| {
            if cfg!(debug_assertions) {
                Tensor::full(f32::NAN, shape, device)
            } else {
                Tensor::zeros(shape, DType::F32, device)
            }
        };
        let layers = (0..num_layers).map(|_| {
            Ok(Layer {
                keys: slab((pages, layout.kv_heads, layout.head_dim, PAGE))?,
                values: slab((pages, layout.kv_heads, PAGE, layout.head_dim))?,
            })
        });
        Ok(KvPool { layers: layers.collect::<Result<_>>()?, layout, pages })
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(layout: KvLayout, num_layers: usize) -> usize {
        2 * layout.page_len() * num_layers * size_of::<f32>()
    }

    /// Shape of the rows.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The slabs of `layer`: keys, values.
    pub fn layer(&self, layer: usize) -> (&Tensor, &Tensor) {
        (&self.layers[layer].keys, &self.layers[layer].values)
    }

    /// Writes K and V rows of `layer` into `slots`: K starts at `column` of `rows` `[m, width]`, V follows it.
    pub fn write(&self, layer: usize, rows: &Tensor, slots: &Arc<[u32]>, column: usize) -> Result<()> {
        let Layer { keys, values } = &self.layers[layer];
        let width = self.layout.kv_heads * self.layout.head_dim;
        kv_write::kv_write(keys, rows, Part::Key, self.layout, slots, column)?;
        kv_write::kv_write(values, rows, Part::Value, self.layout, slots, column + width)?;
        Ok(())
    }

    /// K and V of positions `0..len`, which lie in `pages`, of all layers: `[len, 2 * layers * kv_heads * head_dim]`, the
    /// layout that prefix-tuning stores.
    pub fn read(&self, pages: &[PageId], len: usize) -> Result<Tensor> {
        let (heads, dim) = (self.layout.kv_heads, self.layout.head_dim);
        let (width, page_len) = (heads * dim, self.layout.page_len());
        let columns = 2 * self.layers.len() * width;
        let mut rows = vec![0f32; len * columns];
        for (index, layer) in self.layers.iter().enumerate() {
            let (keys, values) = (layer.keys.flatten_all()?.to_vec1::<f32>()?, layer.values.flatten_all()?.to_vec1()?);
            for (i, row) in rows.chunks_exact_mut(columns).enumerate() {
                let (start, place) = (pages[i / PAGE].0 as usize * page_len, i % PAGE);
                let (k, v) = row[2 * index * width..][..2 * width].split_at_mut(width);
                for (head, (k, v)) in k.chunks_exact_mut(dim).zip(v.chunks_exact_mut(dim)).enumerate() {
                    let at = start + head * dim * PAGE;
                    k.iter_mut().enumerate().for_each(|(d, k)| *k = keys[at + d * PAGE + place]);
                    v.copy_from_slice(&values[at + place * dim..][..dim]);
                }
            }
        }
        Ok(Tensor::from_vec(rows, (len, columns), self.layers[0].keys.device())?)
    }

    /// Fills `page` with NaN, in debug builds: a recycled page must not pass for a fresh one.
    pub fn poison(&self, page: PageId) -> Result<()> {
        let width = 2 * self.layout.kv_heads * self.layout.head_dim;
        let slots: Arc<[u32]> = (0..PAGE as u32).map(|i| page.0 * PAGE as u32 + i).collect();
        let rows = Tensor::full(f32::NAN, (PAGE, width), self.layers[0].keys.device())?;
        (0..self.layers.len()).try_for_each(|layer| self.write(layer, &rows, &slots, 0))
    }
}
