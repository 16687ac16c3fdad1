//! dx = dy W: the gradient of the input, from the same panels, without a second copy of W.
//!
//! A block of W is unpacked and transposed into a panel of 32 columns of k, and the tiles of the forward pass multiply it with
//! all rows of dy: dy takes the place of x, n that of k. bf16 and int8 weights are multiplied as bf16, and dy is rounded to
//! bf16, as x is. Each dx element is one accumulator over ascending n, so a row's bits depend neither on the number of rows
//! nor on the threads.
use super::buffer::Buffer;
use super::pack::RowLayout;
use super::packed::{Packed, dequantize};
use super::product::{BLOCK_BYTES, CHUNK_BYTES, PackedRows, Scratch, Shares, X_BLOCK_BYTES};
use super::tile::{self, COLUMNS, Kind, LINE, Tile};
use crate::ops::float::f32_to_bf16;
use crate::ops::{Pool, Shared};

/// 16 dwords of k `[16][32 rows]`, or the same turned: 16 pairs of rows `[16][32 of k]`.
type Block = [u32; 16 * COLUMNS];

/// Rows and columns change places: W of rows 2 i, 2 i + 1 and columns 2 j, 2 j + 1 is in dwords 2 i, 2 i + 1 of line j before,
/// a row a dword, and in dwords 2 j, 2 j + 1 of line i after, a column a dword.
fn turn_pairs(from: &Block, to: &mut Block) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        // SAFETY: the features were just found.
        return unsafe { wide::turn_pairs(from, to) };
    }
    for (pair, line) in from.chunks_exact(COLUMNS).enumerate() {
        for (rows, w) in line.chunks_exact(2).enumerate() {
            let to = &mut to[rows * COLUMNS + 2 * pair..][..2];
            to[0] = w[0] & 0xffff | w[1] << 16;
            to[1] = w[0] >> 16 | w[1] & 0xffff_0000;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use super::{Block, COLUMNS};
    use core::arch::x86_64::*;

    /// As a matrix of 16 x 16 quadwords: the middle halves of each change places, then the matrix is transposed, 8 x 8 at a
    /// time.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn turn_pairs(from: &Block, to: &mut Block) {
        const SWAP: i32 = 0b11_01_10_00;
        for i in 0..2 {
            for j in 0..2 {
                let line = |l: usize| {
                    // SAFETY: 16 dwords within a line of the block.
                    let x = unsafe { _mm512_loadu_si512(from[(8 * i + l) * COLUMNS + 16 * j..].as_ptr().cast()) };
                    _mm512_shufflehi_epi16::<SWAP>(_mm512_shufflelo_epi16::<SWAP>(x))
                };
                let r: [__m512i; 8] = std::array::from_fn(line);
                let pair = |a: usize| {
                    let (x, y) = (r[2 * a], r[2 * a + 1]);
                    [_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y)]
                };
                let p: [[__m512i; 2]; 4] = std::array::from_fn(pair);
                for odd in 0..2 {
                    // Lanes of 128 bits: lane q of p[a] holds quadwords 2 q + odd of lines 2 a, 2 a + 1.
                    let low = _mm512_shuffle_i64x2::<0b10_00_10_00>(p[0][odd], p[1][odd]);
                    let high = _mm512_shuffle_i64x2::<0b11_01_11_01>(p[0][odd], p[1][odd]);
                    let low2 = _mm512_shuffle_i64x2::<0b10_00_10_00>(p[2][odd], p[3][odd]);
                    let high2 = _mm512_shuffle_i64x2::<0b11_01_11_01>(p[2][odd], p[3][odd]);
                    let columns = [
                        _mm512_shuffle_i64x2::<0b10_00_10_00>(low, low2),
                        _mm512_shuffle_i64x2::<0b10_00_10_00>(high, high2),
                        _mm512_shuffle_i64x2::<0b11_01_11_01>(low, low2),
                        _mm512_shuffle_i64x2::<0b11_01_11_01>(high, high2),
                    ];
                    for (q, column) in columns.into_iter().enumerate() {
                        let line = &mut to[(8 * j + 2 * q + odd) * COLUMNS + 16 * i..][..16];
                        // SAFETY: 16 dwords within a line of the block.
                        unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), column) };
                    }
                }
            }
        }
    }
}

/// Panels of one unit of work at most: they share the reading of dy.
const UNIT: usize = CHUNK_BYTES / BLOCK_BYTES;

impl Packed {
    /// dy `[m, n]` -> dy W `[m, k]`. Row-major, contiguous.
    pub fn backward(&self, dy: &[f32], m: usize, scratch: &mut Scratch, pool: &Pool) -> Vec<f32> {
        let (n, k) = (self.n, self.k());
        assert_eq!(dy.len(), m * n);
        if m * n * k == 0 {
            return vec![0.0; m * k];
        }
        let kind = if self.kind() == Kind::F32 { Kind::F32 } else { Kind::Bf16 };
        let kernels = tile::select(kind, self.wanted_isa()).expect("it was there when the weight was packed");
        // Of one stored panel, which is 32 of n.
        let panel_lines = COLUMNS / (LINE * kind.per_dword());
        let (stored, panels) = (n.div_ceil(COLUMNS), k.div_ceil(COLUMNS));
        let lines = stored * panel_lines;
        let layout = RowLayout { kind, widened: kernels.widened, k: n, lines, group_lines: lines.max(1) };
        let rows = scratch.pack(dy, m, kernels.rows.len(), layout, pool);
        let (tiles, x) = (rows.tiles, Shared(rows.x.cast_mut()));
        // Not zeroed: one thread would do that while the others wait.
        let mut all = Vec::<f32>::with_capacity(m * k);
        // Dwords of one stored panel's part of a block, and how many of those a block has.
        let size = panel_lines * LINE * COLUMNS;
        let (dx, block) = (Shared(all.as_mut_ptr()), BLOCK_BYTES / (size * 4));
        let shares = Shares::new(panels, pool.threads());
        let block_size = block.min(stored) * size;
        pool.run(&|thread| {
            let mut w = Buffer::zeroed(UNIT.min(panels) * block_size);
            let rows = PackedRows { tiles, x: x.get(), scales: std::ptr::null() };
            shares.each(thread, UNIT, |unit| {
                for first in (0..stored).step_by(block) {
                    let some = first..stored.min(first + block);
                    let w = w.as_mut_slice();
                    for (s, from) in some.clone().enumerate() {
                        for (blocks, panel) in w.chunks_exact_mut(block_size).zip(unit.clone()) {
                            self.unpack(from, panel, &mut blocks[s * size..][..size]);
                        }
                    }
                    let most = X_BLOCK_BYTES / (some.len() * panel_lines * layout.line() * 4);
                    for tiles_of_block in tiles.blocks(most) {
                        for (w, panel) in w.chunks_exact(block_size).zip(unit.clone()) {
                            for t in tiles_of_block.clone() {
                                let (start, end) = (tiles.start(t), tiles.start(t + 1));
                                // SAFETY: whole lines of the unpacked panel and of the packed dy, and columns of dx that are
                                // this unit's alone.
                                unsafe {
                                    let line = start * lines + first * panel_lines * (end - start);
                                    (kernels.rows[end - start - 1])(&Tile {
                                        w: w.as_ptr(),
                                        x: rows.x.add(line * layout.line()),
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
                }
            });
        });
        // SAFETY: the first block of each tile and panel writes its elements, and all panels are done.
        unsafe { all.set_len(m * k) };
        all
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
                // A line of k is 16 dwords, and so is this block: bf16 panels have whole lines.
                let block = from[panel * COLUMNS / 2 * COLUMNS..].first_chunk().expect("16 dwords of k of 32 rows");
                turn_pairs(block, out.first_chunk_mut().expect("the same block, turned"));
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
