//! A weight packed once into panels.
use super::buffer::{Arena, Buffer};
use super::pack::{self, RowLayout};
use super::tile::{self, COLUMNS, Isa, Kernels, Kind, LINE};
use crate::ops::float::bf16_to_f32;

/// Weights of one int8 scale, along k. Half the error of one scale a row at 3 % of the speed (measured at 32 rows).
const GROUP: usize = 256;

/// W `[n, k]`, frozen.
pub struct Packed {
    pub(super) n: usize,
    /// How x is laid out for it: k in lines, and what shares a scale.
    pub(super) rows: RowLayout,
    /// Dwords of one panel.
    pub(super) panel: usize,
    pub(super) buffer: Buffer,
    pub(super) kernels: Kernels,
    isa: Isa,
}

impl Packed {
    fn empty(kind: Kind, n: usize, k: usize, isa: Isa, arena: &Arena) -> Self {
        let lines = k.div_ceil(LINE * kind.per_dword());
        let group_lines = if kind == Kind::Int8 { (GROUP / (LINE * 4)).min(lines.max(1)) } else { lines.max(1) };
        let kernels = tile::select(kind, isa).expect("Auto and Portable exist on every CPU");
        let rows = RowLayout { kind, widened: kernels.widened, k, lines, group_lines };
        let scales = if kind == Kind::Int8 { rows.groups() * COLUMNS } else { 0 };
        let panel = lines * LINE * COLUMNS + scales;
        let buffer = arena.zeroed(panel * n.div_ceil(COLUMNS));
        Packed { n, rows, panel, buffer, kernels, isa }
    }

    /// From rows of f32, `[n, k]`, into memory of `arena`.
    ///
    /// # Panics
    /// If `w` has not `n * k` elements, or the CPU lacks `isa`.
    pub fn f32(w: &[f32], n: usize, k: usize, isa: Isa, arena: &Arena) -> Self {
        assert_eq!(w.len(), n * k);
        let mut p = Self::empty(Kind::F32, n, k, isa, arena);
        p.scatter(|row, dword| w[row * k + dword].to_bits());
        p
    }

    /// From rows of raw bf16, `[n, k]`.
    ///
    /// # Panics
    /// As [`Packed::f32`].
    pub fn bf16(w: &[half::bf16], n: usize, k: usize, isa: Isa, arena: &Arena) -> Self {
        assert_eq!(w.len(), n * k);
        let mut p = Self::empty(Kind::Bf16, n, k, isa, arena);
        p.scatter(|row, dword| {
            let row = &w[row * k..(row + 1) * k];
            let high = row.get(2 * dword + 1).map_or(0, |v| v.to_bits());
            u32::from(row[2 * dword].to_bits()) | u32::from(high) << 16
        });
        p
    }

    /// From rows of f32, `[n, k]`, rounded to int8 with a scale for every 256 weights of a row: w = scale * q with scale =
    /// max |w| / 127, so that each is off by scale / 2 at most. x is rounded alike, at each call.
    ///
    /// # Panics
    /// As [`Packed::f32`].
    pub fn int8(w: &[f32], n: usize, k: usize, isa: Isa, arena: &Arena) -> Self {
        assert_eq!(w.len(), n * k);
        let mut p = Self::empty(Kind::Int8, n, k, isa, arena);
        let (group_lines, panel) = (p.rows.group_lines, p.panel);
        let group = group_lines * LINE * 4;
        for (i, panel) in p.buffer.as_mut_slice().chunks_exact_mut(panel).enumerate() {
            for (g, out) in panel.chunks_mut((group_lines * LINE + 1) * COLUMNS).enumerate() {
                let (scales, out) = out.split_at_mut(COLUMNS);
                for column in 0..COLUMNS.min(n - i * COLUMNS) {
                    let row = &w[(i * COLUMNS + column) * k..][..k];
                    let row = &row[g * group..k.min((g + 1) * group)];
                    let (scale, inverse) = pack::scale(row);
                    scales[column] = scale.to_bits();
                    for (d, out) in out.chunks_exact_mut(COLUMNS).enumerate() {
                        // The weights' instruction operand has no sign: 128 is added, and taken off each sum.
                        let q = |i: usize| row.get(4 * d + i).map_or(0, |v| pack::quantize(*v, inverse)) + 128;
                        out[column] = u32::from_le_bytes(std::array::from_fn(|i| q(i) as u8));
                    }
                }
            }
        }
        p
    }

    /// Dword `d` of row `j` comes from `f(j, d)`.
    fn scatter(&mut self, f: impl Fn(usize, usize) -> u32) {
        let (n, panel) = (self.n, self.panel);
        let dwords = self.rows.k.div_ceil(self.kind().per_dword());
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
        self.rows.k
    }

    /// Type of the elements.
    pub fn kind(&self) -> Kind {
        self.rows.kind
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.buffer.len() * 4
    }

    /// Instruction set in use.
    pub fn isa(&self) -> &'static str {
        self.kernels.name
    }

    /// The one that was asked for.
    pub(super) fn wanted_isa(&self) -> Isa {
        self.isa
    }

    /// A panel of 32 rows.
    pub(super) fn panel(&self, index: usize) -> &[u32] {
        &self.buffer.as_slice()[index * self.panel..][..self.panel]
    }

    /// The scales and the dwords `[dwords][32]` of a group of an int8 panel.
    pub(super) fn group<'a>(&self, panel: &'a [u32], group: usize) -> (&'a [u32], &'a [u32]) {
        let size = (self.rows.group_lines * LINE + 1) * COLUMNS;
        panel[group * size..panel.len().min((group + 1) * size)].split_at(COLUMNS)
    }

    /// Writes row `row` of W into `out[k]`: a tied embedding needs no second copy of the table.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, column) = (self.panel(row / COLUMNS), row % COLUMNS);
        match self.kind() {
            Kind::F32 => {
                out.iter_mut().enumerate().for_each(|(i, o)| *o = f32::from_bits(panel[i * COLUMNS + column]));
            }
            Kind::Bf16 => {
                for (i, o) in out.iter_mut().enumerate() {
                    let dword = panel[i / 2 * COLUMNS + column];
                    *o = bf16_to_f32((dword >> (16 * (i % 2))) as u16);
                }
            }
            Kind::Int8 => {
                for (g, out) in out.chunks_mut(self.rows.group_lines * 4 * LINE).enumerate() {
                    let (scales, dwords) = self.group(panel, g);
                    for (i, o) in out.iter_mut().enumerate() {
                        *o = dequantize(dwords[i / 4 * COLUMNS + column], i % 4, f32::from_bits(scales[column]));
                    }
                }
            }
        }
    }
}

/// Weight `i` of a dword.
#[inline(always)]
pub(super) fn dequantize(dword: u32, i: usize, scale: f32) -> f32 {
    (((dword >> (8 * i)) & 255) as i32 - 128) as f32 * scale
}
