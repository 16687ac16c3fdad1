//! x on its way into a product: rounded to what the weight multiplies with, and laid out as the tiles read it.
use super::tile::{Kind, LINE};
use crate::ops::float::f32_to_bf16;

/// Of one row and group of int8: its scale, and what the weights' offset of 128 adds to a sum, -128 times the sum of q.
pub(super) type RowScale = (f32, i32);

/// How the rows of one product are laid out.
#[derive(Clone, Copy)]
pub(super) struct RowLayout {
    pub kind: Kind,
    /// bf16 is laid out as f32, the odd element of a pair before the even one.
    pub widened: bool,
    /// Elements of a row.
    pub k: usize,
    /// Lines of 16 dwords of W, the last one padded with zeros.
    pub lines: usize,
    /// int8: lines that share a scale; otherwise all of them.
    pub group_lines: usize,
}

impl RowLayout {
    /// Dwords of x in a line.
    pub fn line(&self) -> usize {
        if self.widened { 2 * LINE } else { LINE }
    }

    /// Dwords of x in a row.
    pub fn dwords(&self) -> usize {
        self.lines * self.line()
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.lines.div_ceil(self.group_lines)
    }
}

/// Scale of a group of weights or inputs and its inverse. A NaN or an infinity makes the scale NaN, so that it reaches the
/// output instead of vanishing.
#[inline(always)]
pub(super) fn scale(values: &[f32]) -> (f32, f32) {
    // The maximum of the bits of |v| is exact, has no order, and vectorises.
    let most = f32::from_bits(values.iter().fold(0u32, |most, v| most.max(v.to_bits() & 0x7fff_ffff)));
    if !most.is_finite() {
        return (f32::NAN, 0.0);
    }
    let scale = most / 127.0;
    if scale < f32::MIN_POSITIVE { (0.0, 0.0) } else { (scale, 1.0 / scale) }
}

/// v / scale, to the nearest integer, ties to even, by adding 1.5 * 2^23.
#[inline(always)]
pub(super) fn quantize(v: f32, inverse: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    ((v * inverse + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32).clamp(-127, 127)
}

simd! {
    /// Lines `first..` of some rows `[m, k]` into `out` `[lines][m][16]` (widened: 32), with the scales of their groups `[groups][m]`.
    /// `first` begins a group.
    pub(super) fn pack_rows(layout: &RowLayout, rows: &[f32], first: usize, out: &mut [u32], scales: &mut [RowScale]) {
        let m = rows.len() / layout.k;
        match layout.kind {
            Kind::F32 => each_line::<LINE>(layout, rows, first, out, |source, line| {
                line.iter_mut().zip(source).for_each(|(d, v)| *d = v.to_bits());
            }),
            Kind::Bf16 if layout.widened => each_line::<{ 2 * LINE }>(layout, rows, first, out, |source, line| {
                for (d, v) in line.chunks_exact_mut(2).zip(source.chunks_exact(2)) {
                    d[0] = u32::from(f32_to_bf16(v[1])) << 16;
                    d[1] = u32::from(f32_to_bf16(v[0])) << 16;
                }
            }),
            Kind::Bf16 => each_line::<{ 2 * LINE }>(layout, rows, first, out, |source, line| {
                for (d, v) in line.iter_mut().zip(source.chunks_exact(2)) {
                    *d = u32::from(f32_to_bf16(v[0])) | u32::from(f32_to_bf16(v[1])) << 16;
                }
            }),
            Kind::Int8 => {
                let group = layout.group_lines * 4 * LINE;
                for (g, (out, scales)) in
                    out.chunks_mut(layout.group_lines * m * LINE).zip(scales.chunks_exact_mut(m)).enumerate()
                {
                    let start = first * 4 * LINE + g * group;
                    for (r, (row, of_row)) in rows.chunks_exact(layout.k).zip(scales).enumerate() {
                        let row = &row[start.min(layout.k)..(start + group).min(layout.k)];
                        let (scale, inverse) = scale(row);
                        let mut sum = 0;
                        for (l, lines) in out.chunks_exact_mut(m * LINE).enumerate() {
                            let mut padded = [0f32; 4 * LINE];
                            let source = row.get(l * 4 * LINE..).unwrap_or(&[]);
                            let source = &source[..source.len().min(4 * LINE)];
                            padded[..source.len()].copy_from_slice(source);
                            for (d, v) in lines[r * LINE..(r + 1) * LINE].iter_mut().zip(padded.chunks_exact(4)) {
                                let q: [i32; 4] = std::array::from_fn(|i| quantize(v[i], inverse));
                                sum += q.iter().sum::<i32>();
                                *d = u32::from_le_bytes(q.map(|q| q as i8 as u8));
                            }
                        }
                        *of_row = (scale, -128 * sum);
                    }
                }
            }
        }
    }
}

/// Calls `f` with the N elements of each row and line, zeros past the end.
#[inline(always)]
fn each_line<const N: usize>(
    layout: &RowLayout,
    rows: &[f32],
    first: usize,
    out: &mut [u32],
    f: impl Fn(&[f32; N], &mut [u32]),
) {
    let (m, width) = (rows.len() / layout.k, layout.line());
    for (r, row) in rows.chunks_exact(layout.k).enumerate() {
        for (l, lines) in out.chunks_exact_mut(m * width).enumerate() {
            let line = &mut lines[r * width..(r + 1) * width];
            let source = row.get((first + l) * N..).unwrap_or(&[]);
            match source.first_chunk::<N>() {
                Some(source) => f(source, line),
                None => {
                    let mut padded = [0f32; N];
                    padded[..source.len()].copy_from_slice(source);
                    f(&padded, line);
                }
            }
        }
    }
}
