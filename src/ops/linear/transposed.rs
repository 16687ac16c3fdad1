//! dx = dy W: the gradient of the input, from the same panels, without a second copy of W.
//!
//! A block of W is unpacked and transposed into a panel of 32 columns of k, and the tiles of the forward pass multiply it with
//! all rows of dy: dy takes the place of x, n that of k. bf16 and int8 weights are multiplied as bf16, and dy is rounded to
//! bf16, as x is. Each dx element is one accumulator over ascending n, so a row's bits depend neither on the number of rows
//! nor on the threads.
use super::buffer::Buffer;
use super::pack::RowLayout;
use super::packed::{Packed, dequantize};
use super::product::{PackedRows, Scratch};
use super::tile::{self, COLUMNS, Kind, LINE, Tile};
use crate::ops::float::f32_to_bf16;
use crate::ops::{Pool, Shared};

/// Bytes of an unpacked panel: L2 holds it beside the tiles of dy.
const BLOCK_BYTES: usize = 64 << 10;
/// Panels of one unit of work at most: they share the reading of dy.
const UNIT: usize = 8;

impl Packed {
    /// dx `[m, k]` = dy `[m, n]` W. Row-major, contiguous, overwrites dx.
    pub fn backward(&self, dy: &[f32], m: usize, dx: &mut [f32], scratch: &mut Scratch, pool: &Pool) {
        let (n, k) = (self.n, self.k());
        assert_eq!(dy.len(), m * n);
        assert_eq!(dx.len(), m * k);
        if m == 0 || k == 0 {
            return;
        }
        let kind = if self.kind() == Kind::F32 { Kind::F32 } else { Kind::Bf16 };
        let kernels = tile::select(kind, self.wanted_isa()).expect("it was there when the weight was packed");
        // Of one stored panel, which is 32 of n.
        let panel_lines = COLUMNS / (LINE * kind.per_dword());
        let (stored, panels) = (n.div_ceil(COLUMNS), k.div_ceil(COLUMNS));
        let lines = stored * panel_lines;
        let layout = RowLayout { kind, k: n, lines, group_lines: lines.max(1) };
        let rows = scratch.pack(dy, m, kernels.rows.len(), layout, pool);
        let (tiles, x) = (rows.tiles, Shared(rows.x.cast_mut()));
        let (dx, block) = (Shared(dx.as_mut_ptr()), BLOCK_BYTES / (panel_lines * LINE * COLUMNS * 4));
        let unit = panels.div_ceil(pool.threads() * 4).min(UNIT);
        pool.for_each(panels.div_ceil(unit), |i| {
            let mut w = Buffer::zeroed(block * panel_lines * LINE * COLUMNS);
            let rows = PackedRows { tiles, x: x.get(), scales: std::ptr::null() };
            for first in (0..stored).step_by(block) {
                let some = first..stored.min(first + block);
                for panel in i * unit..panels.min((i + 1) * unit) {
                    for (s, out) in some.clone().zip(w.as_mut_slice().chunks_exact_mut(panel_lines * LINE * COLUMNS)) {
                        self.unpack(s, panel, out);
                    }
                    for t in 0..tiles.count {
                        let (start, end) = (tiles.start(t), tiles.start(t + 1));
                        // SAFETY: whole lines of the unpacked panel and of the packed dy, and columns of dx that are this
                        // unit's alone.
                        unsafe {
                            let line = first * panel_lines;
                            (kernels.rows[end - start - 1])(&Tile {
                                w: w.as_ptr(),
                                x: rows.x.add(start * lines * LINE + line * LINE * (end - start)),
                                lines: some.len() * panel_lines,
                                y: dx.get().add(start * k + panel * COLUMNS),
                                y_stride: k,
                                columns: COLUMNS.min(k - panel * COLUMNS),
                                first: first == 0,
                                prefetch: w.as_ptr().cast(),
                                prefetch_step: 0,
                                group_lines: lines,
                                scales: rows.scales,
                            });
                        }
                    }
                }
            }
        });
    }

    /// Rows of stored panel `stored` and 32 columns of k, from 32 * `panel` on, into `out` `[dwords of n][32]`. Columns past the
    /// end are left as they are.
    fn unpack(&self, stored: usize, panel: usize, out: &mut [u32]) {
        let from = self.panel(stored);
        match self.kind() {
            Kind::F32 => {
                let lines = from[panel * COLUMNS * COLUMNS..].chunks_exact(COLUMNS).take(COLUMNS);
                for (column, line) in lines.enumerate() {
                    line.iter().enumerate().for_each(|(row, w)| out[row * COLUMNS + column] = *w);
                }
            }
            Kind::Bf16 => {
                // A pair of rows and a pair of columns change places: in [r0c0 r0c1 r1c0 r1c1], out [r0c0 r1c0 r0c1 r1c1].
                let lines = from[panel * COLUMNS / 2 * COLUMNS..].chunks_exact(COLUMNS).take(COLUMNS / 2);
                for (pair, line) in lines.enumerate() {
                    for (rows, w) in line.chunks_exact(2).enumerate() {
                        let out = &mut out[rows * COLUMNS + 2 * pair..][..2];
                        out[0] = w[0] & 0xffff | w[1] << 16;
                        out[1] = w[0] >> 16 | w[1] & 0xffff_0000;
                    }
                }
            }
            Kind::Int8 => {
                let per_group = self.rows.group_lines * 4 * LINE;
                let (scales, dwords) = self.group(from, panel * COLUMNS / per_group);
                let dwords = dwords[panel * COLUMNS % per_group / 4 * COLUMNS..].chunks_exact(COLUMNS);
                for (quad, line) in dwords.take(COLUMNS / 4).enumerate() {
                    for (rows, (w, scale)) in line.chunks_exact(2).zip(scales.chunks_exact(2)).enumerate() {
                        for i in 0..4 {
                            let half = |row: usize| f32_to_bf16(dequantize(w[row], i, f32::from_bits(scale[row])));
                            out[rows * COLUMNS + 4 * quad + i] = u32::from(half(0)) | u32::from(half(1)) << 16;
                        }
                    }
                }
            }
        }
    }
}
