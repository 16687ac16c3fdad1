//! A weight packed once into panels, and the blocked product that streams them.
use super::buffer::Buffer;
use super::tile::{self, COLUMNS, Isa, Kernels, Kind, LINE, Tile};
use crate::ops::float::{bf16_to_f32, f32_to_bf16};
use crate::ops::{Pool, Shared};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Packed x kept hot in L2 while a chunk of panels streams by.
const X_BLOCK_BYTES: usize = 256 << 10;
/// Distance of the prefetch when one tile covers all rows.
const PREFETCH_BYTES: usize = 8192;
/// W in one unit of work.
const CHUNK_BYTES: usize = 1 << 20;
/// Columns of W in one unit of work of the gradient.
const K_BLOCK: usize = 64;
/// Below so many elements of x the caller packs alone.
const PARALLEL_PACK: usize = 1 << 15;

/// Where x is packed; grows to the largest call.
pub struct Scratch(Buffer);

impl Default for Scratch {
    fn default() -> Self {
        Scratch(Buffer::zeroed(0))
    }
}

/// W `[n, k]`, frozen.
pub struct Packed {
    kind: Kind,
    n: usize,
    k: usize,
    /// x lines (16 dwords of k), the last one padded with zeros.
    lines: usize,
    /// Dwords of one panel.
    panel: usize,
    buffer: Buffer,
    kernels: Kernels,
}

impl Packed {
    fn empty(kind: Kind, n: usize, k: usize, isa: Isa) -> Self {
        let lines = k.div_ceil(LINE * per_dword(kind));
        let panel = lines * LINE * COLUMNS;
        let buffer = Buffer::zeroed(panel * n.div_ceil(COLUMNS));
        let kernels = tile::select(kind, isa).expect("Auto and Portable exist on every CPU");
        Packed { kind, n, k, lines, panel, buffer, kernels }
    }

    /// From rows of f32, `[n, k]`.
    ///
    /// # Panics
    /// If `w` has not `n * k` elements, or the CPU lacks `isa`.
    pub fn f32(w: &[f32], n: usize, k: usize, isa: Isa) -> Self {
        assert_eq!(w.len(), n * k);
        let mut p = Self::empty(Kind::F32, n, k, isa);
        p.scatter(|row, dword| w[row * k + dword].to_bits());
        p
    }

    /// From rows of raw bf16, `[n, k]`.
    ///
    /// # Panics
    /// As [`Packed::f32`].
    pub fn bf16(w: &[half::bf16], n: usize, k: usize, isa: Isa) -> Self {
        assert_eq!(w.len(), n * k);
        let mut p = Self::empty(Kind::Bf16, n, k, isa);
        p.scatter(|row, dword| {
            let row = &w[row * k..(row + 1) * k];
            let high = row.get(2 * dword + 1).map_or(0, |v| v.to_bits());
            u32::from(row[2 * dword].to_bits()) | u32::from(high) << 16
        });
        p
    }

    /// Dword `d` of row `j` comes from `f(j, d)`.
    fn scatter(&mut self, f: impl Fn(usize, usize) -> u32) {
        let (n, panel) = (self.n, self.panel);
        let dwords = self.k.div_ceil(per_dword(self.kind));
        for (p, out) in self.buffer.as_mut_slice().chunks_exact_mut(panel).enumerate() {
            // 16 steps at a time keep the written lines in L1.
            for start in (0..dwords).step_by(LINE) {
                for column in 0..COLUMNS.min(n - p * COLUMNS) {
                    for d in start..(start + LINE).min(dwords) {
                        out[d * COLUMNS + column] = f(p * COLUMNS + column, d);
                    }
                }
            }
        }
    }

    /// Rows of W.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of W.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type of the elements.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.buffer.len() * 4
    }

    /// Instruction set in use.
    pub fn isa(&self) -> &'static str {
        self.kernels.name
    }

    /// Writes row `row` of W into `out[k]`: a tied embedding needs no second copy of the table.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let panel = &self.buffer.as_slice()[row / COLUMNS * self.panel..][..self.panel];
        let column = row % COLUMNS;
        match self.kind {
            Kind::F32 => {
                out.iter_mut().enumerate().for_each(|(i, o)| *o = f32::from_bits(panel[i * COLUMNS + column]));
            }
            Kind::Bf16 => {
                for (i, o) in out.iter_mut().enumerate() {
                    let dword = panel[i / 2 * COLUMNS + column];
                    *o = bf16_to_f32((dword >> (16 * (i % 2))) as u16);
                }
            }
        }
    }

    /// y `[m, n]` = x `[m, k]` W^T. Row-major, contiguous, overwrites y.
    pub fn forward(&self, x: &[f32], m: usize, y: &mut [f32], scratch: &mut Scratch, pool: &Pool) {
        assert_eq!(x.len(), m * self.k);
        assert_eq!(y.len(), m * self.n);
        if m == 0 || self.n == 0 {
            return;
        }
        let dwords = self.lines * LINE;
        let tiles = Tiles { m, count: m.div_ceil(self.kernels.rows.len()) };
        if scratch.0.len() < m * dwords {
            scratch.0 = Buffer::zeroed(m * dwords);
        }
        let packed_x = Shared(scratch.0.as_mut_ptr());
        let pack = |t: usize| {
            let (start, end) = (tiles.start(t), tiles.start(t + 1));
            for r in start..end {
                // SAFETY: rows are disjoint: line l of row r starts at start*dwords + (l*M + r-start)*16.
                unsafe {
                    let out = packed_x.get().add(start * dwords + (r - start) * LINE);
                    let stride = (end - start) * LINE;
                    pack_row(self.kind, &x[r * self.k..(r + 1) * self.k], out, stride, self.lines);
                }
            }
        };
        if m * self.k < PARALLEL_PACK {
            (0..tiles.count).for_each(pack)
        } else {
            pool.for_each(tiles.count, pack)
        }

        // Units of work: chunks of panels, claimed as threads come free.
        let panels = self.n.div_ceil(COLUMNS);
        let chunk = (CHUNK_BYTES / (self.panel * 4)).max(1).min(panels.div_ceil(pool.threads() * 4));
        let next = AtomicUsize::new(0);
        let y = Shared(y.as_mut_ptr());
        pool.run(&|_| {
            loop {
                let start = next.fetch_add(chunk, Relaxed);
                if start >= panels {
                    break;
                }
                // SAFETY: columns of distinct panels are disjoint.
                unsafe { self.panels(start..(start + chunk).min(panels), packed_x.get(), y.get(), &tiles) }
            }
        });
    }

    /// dx `[m, k]` = dy `[m, n]` W: the gradient of the input. Row-major, contiguous, overwrites dx.
    ///
    /// From the same panels, without a second copy of W: a block of 32 rows and 64 columns is unpacked, transposed
    /// and used for all rows of dy. bf16 weights are widened, dy stays f32. Each dx element is summed over ascending n, so a
    /// row's bits depend neither on the number of rows nor on the threads.
    pub fn backward(&self, dy: &[f32], m: usize, dx: &mut [f32], pool: &Pool) {
        assert_eq!(dy.len(), m * self.n);
        assert_eq!(dx.len(), m * self.k);
        let (n, k, dx) = (self.n, self.k, Shared(dx.as_mut_ptr()));
        pool.for_each(k.div_ceil(K_BLOCK), |block| {
            let columns = block * K_BLOCK..k.min((block + 1) * K_BLOCK);
            let (mut w, mut sums) = ([0f32; COLUMNS * K_BLOCK], vec![0f32; m * K_BLOCK]);
            for panel in 0..n.div_ceil(COLUMNS) {
                let rows = panel * COLUMNS..n.min((panel + 1) * COLUMNS);
                self.unpack(panel, columns.clone(), &mut w);
                for (dy, sum) in dy.chunks_exact(n).zip(sums.chunks_exact_mut(K_BLOCK)) {
                    add_rows(&dy[rows.clone()], &w, sum);
                }
            }
            for (r, sum) in sums.chunks_exact(K_BLOCK).enumerate() {
                // SAFETY: the columns of a block belong to one unit of work.
                unsafe {
                    let to = dx.get().add(r * k + columns.start);
                    std::ptr::copy_nonoverlapping(sum.as_ptr(), to, columns.len());
                }
            }
        });
    }

    /// Rows of `panel` and `columns` of W into `w` `[COLUMNS, K_BLOCK]`; what lies outside W is left as it is.
    fn unpack(&self, panel: usize, columns: std::ops::Range<usize>, w: &mut [f32]) {
        let panel = &self.buffer.as_slice()[panel * self.panel..][..self.panel];
        for (i, column) in columns.enumerate() {
            let (dword, half) = (column / per_dword(self.kind), column % per_dword(self.kind));
            let line = &panel[dword * COLUMNS..(dword + 1) * COLUMNS];
            for (row, dword) in line.iter().enumerate() {
                w[row * K_BLOCK + i] = match self.kind {
                    Kind::F32 => f32::from_bits(*dword),
                    Kind::Bf16 => bf16_to_f32((dword >> (16 * half)) as u16),
                };
            }
        }
    }

    /// All rows times some panels: blocks of x stay in L2, W streams by.
    ///
    /// # Safety
    /// `x` holds the packed tiles, `y` is `[m, n]`, and nobody else writes these panels' columns.
    unsafe fn panels(&self, panels: std::ops::Range<usize>, x: *const u32, y: *mut f32, tiles: &Tiles) {
        let dwords = self.lines * LINE;
        let block_rows = X_BLOCK_BYTES / (dwords * 4);
        let mut t0 = 0;
        while t0 < tiles.count {
            let mut t1 = t0 + 1;
            while t1 < tiles.count && tiles.start(t1 + 1) - tiles.start(t0) <= block_rows {
                t1 += 1;
            }
            // Two tiles read these 16 KiB of W from L1: measured 13 % faster at 16 rows.
            let k_block = if t1 - t0 == 2 { 8 } else { self.lines };
            for p in panels.clone() {
                for line in (0..self.lines).step_by(k_block) {
                    let lines = k_block.min(self.lines - line);
                    // SAFETY: in bounds by construction; prefetch addresses may run past the end (wrapping).
                    unsafe {
                        let w = self.buffer.as_ptr().add(p * self.panel + line * LINE * COLUMNS);
                        let after = w.wrapping_add(lines * LINE * COLUMNS).cast::<u8>();
                        for t in t0..t1 {
                            let (start, end) = (tiles.start(t), tiles.start(t + 1));
                            let (prefetch, prefetch_lines) = if t1 - t0 == 1 {
                                (w.cast::<u8>().wrapping_add(PREFETCH_BYTES), lines)
                            } else {
                                // Each tile fetches its share of the next panel.
                                let share = |t| (t - t0) * lines / (t1 - t0);
                                (after.wrapping_add(share(t) * 2048), share(t + 1) - share(t))
                            };
                            (self.kernels.rows[end - start - 1])(&Tile {
                                w,
                                x: x.add(start * dwords + line * LINE * (end - start)),
                                lines,
                                y: y.add(start * self.n + p * COLUMNS),
                                y_stride: self.n,
                                columns: COLUMNS.min(self.n - p * COLUMNS),
                                first: line == 0,
                                prefetch,
                                prefetch_lines,
                            });
                        }
                    }
                }
            }
            t0 = t1;
        }
    }
}

simd! {
    /// `sum` `[K_BLOCK]` += sum over rows of dy * w `[rows, K_BLOCK]`, in ascending order.
    fn add_rows(dy: &[f32], w: &[f32], sum: &mut [f32]) {
        let mut acc = [0f32; K_BLOCK];
        acc.copy_from_slice(&sum[..K_BLOCK]);
        for (dy, w) in dy.iter().zip(w.chunks_exact(K_BLOCK)) {
            for (a, w) in acc.iter_mut().zip(w) {
                *a += dy * w;
            }
        }
        sum[..K_BLOCK].copy_from_slice(&acc);
    }
}

/// `m` rows in `count` tiles of nearly equal size: 13 rows are 6 + 7.
struct Tiles {
    m: usize,
    count: usize,
}

impl Tiles {
    fn start(&self, tile: usize) -> usize {
        tile * self.m / self.count
    }
}

fn per_dword(kind: Kind) -> usize {
    match kind {
        Kind::F32 => 1,
        Kind::Bf16 => 2,
    }
}

/// Packs one row of x into its lines, `stride` dwords apart, zeros after the end.
///
/// # Safety
/// `out` has `lines` lines of 16 dwords at `stride`, and nobody else writes them.
unsafe fn pack_row(kind: Kind, row: &[f32], out: *mut u32, stride: usize, lines: usize) {
    let per_line = LINE * per_dword(kind);
    for l in 0..lines {
        let src = &row[l * per_line..row.len().min((l + 1) * per_line)];
        // SAFETY: the caller's.
        let line = unsafe { &mut *out.add(l * stride).cast::<[u32; LINE]>() };
        let mut padded = [0f32; 2 * LINE];
        padded[..src.len()].copy_from_slice(src);
        match kind {
            Kind::F32 => line.iter_mut().zip(&padded).for_each(|(d, v)| *d = v.to_bits()),
            Kind::Bf16 => {
                for (d, v) in line.iter_mut().zip(padded.chunks_exact(2)) {
                    *d = u32::from(f32_to_bf16(v[0])) | u32::from(f32_to_bf16(v[1])) << 16;
                }
            }
        }
    }
}
