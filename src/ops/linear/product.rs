//! y = x W^T: the blocked product that streams the panels, and what is added to y on its way out.
use super::buffer::Buffer;
use super::pack::{RowScale, pack_rows};
use super::packed::Packed;
use super::tile::{COLUMNS, Kind, LINE, Tile};
use crate::ops::{Pool, Shared};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Packed x kept hot in L2 while a chunk of panels streams by.
pub(super) const X_BLOCK_BYTES: usize = 256 << 10;
/// Distance of the prefetch when one tile covers all rows.
const PREFETCH_BYTES: usize = 8192;
/// W of one step of k, and of one line.
const STEP_BYTES: usize = COLUMNS * 4;
const LINE_BYTES: usize = LINE * STEP_BYTES;
/// W of one panel in a block of k, where x is larger than L2.
pub(super) const BLOCK_BYTES: usize = 64 << 10;
const BLOCK_LINES: usize = BLOCK_BYTES / LINE_BYTES;
/// W in one unit of work and block of k: L2 holds it beside a block of x.
pub(super) const CHUNK_BYTES: usize = 7 * BLOCK_BYTES;
/// Below so many elements of x the caller packs alone.
const PARALLEL_PACK: usize = 1 << 14;

/// Where x is packed; grows to the largest call.
pub struct Scratch {
    x: Buffer,
    scales: Vec<RowScale>,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { x: Buffer::zeroed(0), scales: Vec::new() }
    }
}

/// What is added to a product while it is in the cache: y = (x W^T + bias) + residual.
#[derive(Clone, Copy, Default)]
pub struct Addends<'a> {
    /// `[n]`
    pub bias: Option<&'a [f32]>,
    /// `[m, n]`
    pub residual: Option<&'a [f32]>,
}

/// `m` rows in `count` tiles of nearly equal size: 13 rows are 6 + 7.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    m: usize,
    pub count: usize,
}

impl Tiles {
    pub fn new(m: usize, most: usize) -> Self {
        Tiles { m, count: m.div_ceil(most) }
    }

    pub fn start(&self, tile: usize) -> usize {
        tile * self.m / self.count
    }

    /// Tiles in a row, one at least, that have up to `most` rows together.
    pub fn blocks(self, most: usize) -> impl Iterator<Item = Range<usize>> {
        let mut first = 0;
        std::iter::from_fn(move || {
            let start = first;
            first = (start + 1).min(self.count);
            while first < self.count && self.start(first + 1) - self.start(start) <= most {
                first += 1;
            }
            (start < first).then_some(start..first)
        })
    }
}

/// x as the tiles read it: line l of row r of a tile of M rows that starts at row s is line s * lines + l * M + r - s; its scales are at s * groups + g * M + r - s.
pub(super) struct PackedRows {
    pub tiles: Tiles,
    pub x: *const u32,
    pub scales: *const RowScale,
}

impl Scratch {
    /// Packs x `[m, k]`.
    pub(super) fn pack(
        &mut self,
        x: &[f32],
        m: usize,
        most: usize,
        layout: super::pack::RowLayout,
        pool: &Pool,
    ) -> PackedRows {
        let (tiles, dwords, groups) = (Tiles::new(m, most), layout.dwords(), layout.groups());
        if self.x.len() < m * dwords {
            self.x = Buffer::zeroed(m * dwords);
        }
        if self.scales.len() < m * groups {
            self.scales.resize(m * groups, (0.0, 0));
        }
        let (out, scales) = (Shared(self.x.as_mut_ptr()), Shared(self.scales.as_mut_ptr()));
        let wide = m * layout.k >= PARALLEL_PACK;
        // A tile is cut where one tile alone would be the work of one thread.
        let parts = if wide && layout.kind != Kind::Int8 { (pool.threads() * 2).div_ceil(tiles.count) } else { 1 };
        let parts = parts.min(layout.lines.max(1));
        let pack = |unit: usize| {
            let (tile, part) = (unit / parts, unit % parts);
            let (start, end) = (tiles.start(tile), tiles.start(tile + 1));
            let (first, last) = (part * layout.lines / parts, (part + 1) * layout.lines / parts);
            let rows = end - start;
            // SAFETY: the lines of a part of a tile are contiguous and this unit's alone, and so are the scales of a tile, of
            // which only kinds that are not cut have any.
            let (out, scales) = unsafe {
                let out = out.get().add(start * dwords + first * rows * layout.line());
                let scales = scales.get().add(start * groups);
                (
                    std::slice::from_raw_parts_mut(out, (last - first) * rows * layout.line()),
                    std::slice::from_raw_parts_mut(scales, if parts == 1 { rows * groups } else { 0 }),
                )
            };
            pack_rows(&layout, &x[start * layout.k..end * layout.k], first, out, scales);
        };
        let units = tiles.count * parts;
        if wide {
            pool.for_each(units, pack)
        } else {
            (0..units).for_each(pack)
        }
        PackedRows { tiles, x: self.x.as_ptr(), scales: self.scales.as_ptr() }
    }
}

/// Panels dealt out to threads in one run each, which is what a prefetch of the next one counts on; who is done helps the
/// others. Each is taken once.
pub(super) struct Shares {
    panels: usize,
    /// The next one of each share.
    next: Vec<AtomicUsize>,
}

impl Shares {
    pub fn new(panels: usize, threads: usize) -> Self {
        Shares { panels, next: (0..threads).map(|t| AtomicUsize::new(t * panels / threads)).collect() }
    }

    /// Takes up to `chunk` panels at a time until there are none.
    pub fn each(&self, thread: usize, chunk: usize, mut f: impl FnMut(Range<usize>)) {
        let threads = self.next.len();
        for share in (thread..thread + threads).map(|t| t % threads) {
            let end = (share + 1) * self.panels / threads;
            loop {
                let start = self.next[share].fetch_add(chunk, Relaxed);
                if start >= end {
                    break;
                }
                f(start..end.min(start + chunk));
            }
        }
    }
}

impl Packed {
    /// x `[m, k]` -> x W^T and what is added, `[m, n]`. Row-major, contiguous.
    pub fn forward(&self, x: &[f32], m: usize, add: Addends<'_>, scratch: &mut Scratch, pool: &Pool) -> Vec<f32> {
        assert_eq!(x.len(), m * self.k());
        assert!(add.bias.is_none_or(|b| b.len() == self.n) && add.residual.is_none_or(|r| r.len() == m * self.n));
        if m * self.n * self.k() == 0 {
            return vec![0.0; m * self.n];
        }
        let rows = scratch.pack(x, m, self.kernels.rows.len(), self.rows, pool);
        let (x, scales) = (Shared(rows.x.cast_mut()), Shared(rows.scales.cast_mut()));
        let panels = self.n.div_ceil(COLUMNS);
        let (most_lines, chunk) = self.block(m);
        let shares = Shares::new(panels, pool.threads());
        // Not zeroed: at hundreds of rows that would cost a tenth of the product.
        let mut all = Vec::with_capacity(m * self.n);
        let y = Shared(all.as_mut_ptr());
        pool.run(&|thread| {
            let rows = PackedRows { tiles: rows.tiles, x: x.get(), scales: scales.get() };
            shares.each(thread, chunk, |some| {
                // SAFETY: columns of distinct panels are disjoint.
                unsafe { self.panels(some, most_lines, &rows, y.get(), add) }
            });
        });
        // SAFETY: the first block of each tile and panel writes its elements, and all panels are done.
        unsafe { all.set_len(m * self.n) };
        all
    }

    /// Lines of k, whole groups, and panels, that are multiplied with all rows before the next ones.
    fn block(&self, m: usize) -> (usize, usize) {
        // Where all of x stays in L2, panels go one by one; else some share the reading of a block of x.
        if m * self.rows.dwords() * 4 <= 2 * X_BLOCK_BYTES {
            return (self.rows.lines, 1);
        }
        let step = if self.kind() == Kind::Int8 { self.rows.group_lines } else { 1 };
        let steps = self.rows.lines.div_ceil(step);
        let blocks = steps.div_ceil((BLOCK_LINES / step).max(1));
        let lines = steps.div_ceil(blocks) * step;
        (lines, (CHUNK_BYTES / (lines * LINE_BYTES)).max(1))
    }

    /// All rows times some panels, `most_lines` lines of k at a time: blocks of x stay in L2, W streams by.
    ///
    /// # Safety
    /// `rows` holds the packed tiles, `y` is `[m, n]`, and nobody else writes these panels' columns.
    unsafe fn panels(&self, panels: Range<usize>, most_lines: usize, rows: &PackedRows, y: *mut f32, add: Addends<'_>) {
        let (layout, groups, tiles) = (&self.rows, self.rows.groups(), rows.tiles);
        for first in (0..layout.lines).step_by(most_lines) {
            let lines = most_lines.min(layout.lines - first);
            let (group, last) = (first / layout.group_lines, first + lines == layout.lines);
            let from = first * LINE * COLUMNS + if self.kind() == Kind::Int8 { group * COLUMNS } else { 0 };
            let most = X_BLOCK_BYTES / (lines * layout.line() * 4);
            for block in tiles.blocks(most) {
                for p in panels.clone() {
                    let columns = COLUMNS.min(self.n - p * COLUMNS);
                    // SAFETY: in bounds by construction; prefetch addresses may run past the end (wrapping).
                    unsafe {
                        let w = self.buffer.as_ptr().add(p * self.panel + from);
                        for t in block.clone() {
                            let (start, end) = (tiles.start(t), tiles.start(t + 1));
                            let prefetch = if block.len() == 1 {
                                w.cast::<u8>().wrapping_add(PREFETCH_BYTES)
                            } else {
                                // Each tile fetches its share of the next panel, evenly: a core has few misses under way.
                                w.cast::<u8>()
                                    .wrapping_add(self.panel * 4 + (t - block.start) * lines * LINE_BYTES / block.len())
                            };
                            let to = y.add(start * self.n + p * COLUMNS);
                            (self.kernels.rows[end - start - 1])(&Tile {
                                w,
                                x: rows.x.add(start * layout.dwords() + first * layout.line() * (end - start)),
                                lines,
                                y: to,
                                y_stride: self.n,
                                columns,
                                first: first == 0,
                                prefetch,
                                prefetch_step: STEP_BYTES / block.len(),
                                group_lines: layout.group_lines,
                                scales: rows.scales.wrapping_add(start * groups + group * (end - start)),
                            });
                            if last {
                                for r in start..end {
                                    let y = std::slice::from_raw_parts_mut(to.add((r - start) * self.n), columns);
                                    add.to(y, r * self.n, p * COLUMNS);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Addends<'_> {
    /// To columns `column..` of the row that starts at element `row`.
    #[inline(always)]
    fn to(&self, y: &mut [f32], row: usize, column: usize) {
        if let Some(bias) = self.bias {
            y.iter_mut().zip(&bias[column..]).for_each(|(y, b)| *y += b);
        }
        if let Some(residual) = self.residual {
            y.iter_mut().zip(&residual[row + column..]).for_each(|(y, r)| *y += r);
        }
    }
}

/// Runs the widest tile of `kind` again and again on operands that stay in the first cache; returns the multiplications.
pub(in crate::ops) fn bench_tile(kind: Kind) -> u64 {
    const LINES: usize = 8;
    const TIMES: usize = 2000;
    let kernels = super::tile::select(kind, super::Isa::Auto).expect("Auto exists on every CPU");
    let rows = kernels.rows.len();
    let line = if kernels.widened { 2 * LINE } else { LINE };
    let (w, x) = (Buffer::zeroed((LINES * LINE + 1) * COLUMNS), Buffer::zeroed(LINES * line * rows));
    let (mut y, scales) = (vec![0f32; rows * COLUMNS], vec![(0.0, 0); rows]);
    for _ in 0..TIMES {
        // SAFETY: whole lines of W and x, with the scales of one group, and `rows` rows of 32 in y.
        unsafe {
            (kernels.rows[rows - 1])(&Tile {
                w: w.as_ptr(),
                x: x.as_ptr(),
                lines: LINES,
                y: y.as_mut_ptr(),
                y_stride: COLUMNS,
                columns: COLUMNS,
                first: true,
                prefetch: w.as_ptr().cast(),
                prefetch_step: 0,
                group_lines: LINES,
                scales: scales.as_ptr(),
            });
        }
    }
    std::hint::black_box(y);
    (TIMES * LINES * LINE * kind.per_dword() * rows * COLUMNS) as u64
}
