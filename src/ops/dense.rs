//! A small dense product in f32, for the gradient of attention: its matrices are as large as one head of one sequence.

use super::lanes::{LANES, Lanes};

/// Rows of a matrix within a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Its elements.
    pub data: &'a [f32],
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, `width` columns.
    pub fn rows(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: width, column: 1 }
    }

    /// The transpose of row-major rows of `width`.
    pub fn transposed(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: 1, column: width }
    }
}

lanes! {
    /// c `[m, width]` += a `[m, depth]` b `[depth, width]`; rows of b and c are `b_row` and `c_row` elements apart. Each element
    /// is one sum over ascending depth that starts at c.
    pub fn add_product<V>(
        a: Matrix<'_>, depth: usize, b: &[f32], b_row: usize, c: &mut [f32], c_row: usize, m: usize, width: usize,
    ) {
        let mut column = 0;
        while column < width {
            let (b, c) = (&b[column..], &mut c[column..]);
            column += match width - column {
                64.. => columns::<V, 4>(a, depth, b, b_row, c, c_row, m),
                16.. => columns::<V, 1>(a, depth, b, b_row, c, c_row, m),
                left => narrow::<V>(a, depth, b, b_row, c, c_row, m, left),
            };
        }
    }
}

/// 16 N columns of c. Returns 16 N.
#[inline(always)]
fn columns<V: Lanes, const N: usize>(
    a: Matrix<'_>,
    depth: usize,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
    m: usize,
) -> usize {
    let mut row = 0;
    while row < m {
        row += if m - row >= 4 {
            block::<V, 4, N>(a, row, depth, b, b_row, c, c_row)
        } else {
            block::<V, 1, N>(a, row, depth, b, b_row, c, c_row)
        };
    }
    N * LANES
}

/// M rows and 16 N columns in registers. Returns M.
#[inline(always)]
fn block<V: Lanes, const M: usize, const N: usize>(
    a: Matrix<'_>,
    row: usize,
    depth: usize,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
) -> usize {
    let mut sums = [[V::zero(); N]; M];
    for (r, sums) in sums.iter_mut().enumerate() {
        let c = &c[(row + r) * c_row..][..N * LANES];
        sums.iter_mut().enumerate().for_each(|(n, s)| *s = V::load(&c[n * LANES..]));
    }
    for d in 0..depth {
        let b = &b[d * b_row..][..N * LANES];
        let b: [V; N] = std::array::from_fn(|n| V::load(&b[n * LANES..]));
        for (r, sums) in sums.iter_mut().enumerate() {
            let a = V::splat(a.data[(row + r) * a.row + d * a.column]);
            sums.iter_mut().zip(b).for_each(|(s, b)| *s = a.mul_add(b, *s));
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let c = &mut c[(row + r) * c_row..][..N * LANES];
        sums.iter().enumerate().for_each(|(n, s)| s.store(&mut c[n * LANES..]));
    }
    M
}

/// The last columns, fewer than 16, in vectors whose other lanes are 0. Returns how many.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn narrow<V: Lanes>(
    a: Matrix<'_>,
    depth: usize,
    b: &[f32],
    b_row: usize,
    c: &mut [f32],
    c_row: usize,
    m: usize,
    width: usize,
) -> usize {
    const DEPTH: usize = 64;
    const ROWS: usize = 8;
    let (mut wide_b, mut wide_c) = ([0f32; DEPTH * LANES], [0f32; ROWS * LANES]);
    for start in (0..depth).step_by(DEPTH) {
        let some = DEPTH.min(depth - start);
        for (d, wide) in wide_b.chunks_exact_mut(LANES).take(some).enumerate() {
            wide[..width].copy_from_slice(&b[(start + d) * b_row..][..width]);
        }
        for row in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - row);
            let a = Matrix { data: &a.data[row * a.row + start * a.column..], ..a };
            for (r, wide) in wide_c.chunks_exact_mut(LANES).take(rows).enumerate() {
                wide[..width].copy_from_slice(&c[(row + r) * c_row..][..width]);
            }
            if rows == ROWS {
                block::<V, ROWS, 1>(a, 0, some, &wide_b, LANES, &mut wide_c, LANES);
            } else {
                (0..rows).for_each(|r| {
                    block::<V, 1, 1>(a, r, some, &wide_b, LANES, &mut wide_c, LANES);
                });
            }
            for (r, wide) in wide_c.chunks_exact(LANES).take(rows).enumerate() {
                c[(row + r) * c_row..][..width].copy_from_slice(&wide[..width]);
            }
        }
    }
    width
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64_and_leaves_the_rest() {
        let noise = |seed: usize, n: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + 31 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32).collect()
        };
        for (m, depth, width) in [(1, 1, 1), (5, 7, 90), (9, 33, 17), (4, 64, 64), (19, 150, 8), (8, 129, 15)] {
            let (a, b, c) = (noise(1, m * depth), noise(2, depth * (width + 3)), noise(3, m * (width + 2)));
            let turned: Vec<f32> = (0..m * depth).map(|i| a[i % m * depth + i / m]).collect();
            for a_matrix in [Matrix::rows(&a, depth), Matrix::transposed(&turned, m)] {
                let mut got = c.clone();
                add_product(a_matrix, depth, &b, width + 3, &mut got, width + 2, m, width);
                for (i, (got, c)) in got.iter().zip(&c).enumerate() {
                    let (r, j) = (i / (width + 2), i % (width + 2));
                    let product = |d: usize| f64::from(a[r * depth + d]) * f64::from(b[d * (width + 3) + j]);
                    let want = f64::from(*c) + if j < width { (0..depth).map(product).sum() } else { 0.0 };
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{m} {depth} {width} at {i}: {got} {want}");
                }
            }
        }
    }
}
