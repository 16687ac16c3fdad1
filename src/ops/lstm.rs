//! One direction of an LSTM layer over a sequence, one op of the graph.
//!
//! Of a row's gates a = x W_ih^T + b + h W_hh^T, in torch's order i, f, g, o: c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c),
//! from a state of zeros. Made of candle's ops this is a chain of a dozen nodes a row, which its way back walks with a stack frame
//! each: a thousand rows end the process.
use super::dense::{Matrix, add_product};
use super::slice;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// x's share of the gates `[n, 4 h]`, the state's weight W_hh `[4 h, h]` -> states `[n, h]`, differentiable in both. `back`: the last row
/// comes first. On the processor, in f32.
pub fn lstm(gates: &Tensor, weight: &Tensor, back: bool) -> Result<Tensor> {
    gates.contiguous()?.apply_op2(&weight.contiguous()?, Lstm { back })
}

struct Lstm {
    back: bool,
}

/// Of one direction, n rows of width h.
struct Run<'a> {
    /// `[n, 4 h]`
    gates: &'a [f32],
    /// `[4 h, h]`
    weight: &'a [f32],
    n: usize,
    h: usize,
    back: bool,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Activated gates of one row and element.
struct Gates {
    i: f32,
    f: f32,
    g: f32,
    o: f32,
}

impl Gates {
    /// Element `j` of a row of `[4 h]`.
    fn of(row: &[f32], h: usize, j: usize) -> Self {
        Gates { i: sigmoid(row[j]), f: sigmoid(row[h + j]), g: row[2 * h + j].tanh(), o: sigmoid(row[3 * h + j]) }
    }
}

impl Run<'_> {
    /// Rows in the order in which they are computed.
    fn order(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let (n, back) = (self.n, self.back);
        (0..n).map(move |i| if back { n - 1 - i } else { i })
    }

    /// The weight as `[h, 4 h]`.
    fn turned(&self) -> Vec<f32> {
        let h = self.h;
        let mut turned = vec![0f32; 4 * h * h];
        for (r, row) in self.weight.chunks_exact(h).enumerate() {
            row.iter().enumerate().for_each(|(c, w)| turned[c * 4 * h + r] = *w);
        }
        turned
    }

    fn states(&self) -> Vec<f32> {
        let h = self.h;
        let turned = self.turned();
        let mut all = vec![0f32; self.n * h];
        let (mut state, mut cell) = (vec![0f32; h], vec![0f32; h]);
        for row in self.order() {
            let mut gates = self.gates[row * 4 * h..(row + 1) * 4 * h].to_vec();
            add_product(Matrix::rows(&state, h), h, &turned, 4 * h, &mut gates, 4 * h, 1, 4 * h);
            for j in 0..h {
                let Gates { i, f, g, o } = Gates::of(&gates, h, j);
                cell[j] = f * cell[j] + i * g;
                state[j] = o * cell[j].tanh();
            }
            all[row * h..(row + 1) * h].copy_from_slice(&state);
        }
        all
    }

    /// From the states and their gradient `[n, h]` to those of the gates and of the weight.
    fn gradients(&self, states: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (n, h) = (self.n, self.h);
        let order: Vec<usize> = self.order().collect();
        // The state before each row, and the gates again: what the way there had is not kept.
        let mut before = vec![0f32; n * h];
        for pair in order.windows(2) {
            before[pair[1] * h..(pair[1] + 1) * h].copy_from_slice(&states[pair[0] * h..(pair[0] + 1) * h]);
        }
        let turned = self.turned();
        let mut gates = self.gates.to_vec();
        add_product(Matrix::rows(&before, h), h, &turned, 4 * h, &mut gates, 4 * h, n, 4 * h);
        let (mut cells, mut cell) = (vec![0f32; n * h], vec![0f32; h]);
        for row in &order {
            for (j, cell) in cell.iter_mut().enumerate() {
                let Gates { i, f, g, .. } = Gates::of(&gates[row * 4 * h..], h, j);
                *cell = f * *cell + i * g;
            }
            cells[row * h..(row + 1) * h].copy_from_slice(&cell);
        }
        let mut d_gates = vec![0f32; n * 4 * h];
        let (mut d_state, mut d_cell) = (vec![0f32; h], vec![0f32; h]);
        for (at, row) in order.iter().copied().enumerate().rev() {
            let d_row = &mut d_gates[row * 4 * h..(row + 1) * 4 * h];
            for j in 0..h {
                let Gates { i, f, g, o } = Gates::of(&gates[row * 4 * h..], h, j);
                let through = cells[row * h + j].tanh();
                let d = grad[row * h + j] + d_state[j];
                let d_c = d * o * (1.0 - through * through) + d_cell[j];
                let last = if at == 0 { 0.0 } else { cells[order[at - 1] * h + j] };
                d_row[j] = d_c * g * i * (1.0 - i);
                d_row[h + j] = d_c * last * f * (1.0 - f);
                d_row[2 * h + j] = d_c * i * (1.0 - g * g);
                d_row[3 * h + j] = d * through * o * (1.0 - o);
                d_cell[j] = d_c * f;
            }
            d_state.fill(0.0);
            add_product(Matrix::rows(d_row, 4 * h), 4 * h, self.weight, h, &mut d_state, h, 1, h);
        }
        let mut d_weight = vec![0f32; 4 * h * h];
        add_product(Matrix::transposed(&d_gates, 4 * h), n, &before, h, &mut d_weight, h, 4 * h, h);
        (d_gates, d_weight)
    }
}

impl Lstm {
    fn run<'a>(&self, gates: &'a CpuStorage, gl: &Layout, weight: &'a CpuStorage, wl: &Layout) -> Result<Run<'a>> {
        let ((n, width), (rows, h)) = (gl.shape().dims2()?, wl.shape().dims2()?);
        if width != rows || rows != 4 * h {
            bail!("lstm: gates are [{n}, {width}], the state's weight [{rows}, {h}]");
        }
        Ok(Run { gates: slice(gates, gl, "lstm")?, weight: slice(weight, wl, "lstm")?, n, h, back: self.back })
    }
}

impl CustomOp2 for Lstm {
    fn name(&self) -> &'static str {
        "lstm"
    }

    fn cpu_fwd(&self, g: &CpuStorage, gl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let run = self.run(g, gl, w, wl)?;
        Ok((CpuStorage::F32(run.states()), (run.n, run.h).into()))
    }

    fn bwd(&self, g: &Tensor, w: &Tensor, states: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (gates, gl) = g.storage_and_layout();
        let (weight, wl) = w.storage_and_layout();
        let (Storage::Cpu(gates), Storage::Cpu(weight)) = (&*gates, &*weight) else {
            bail!("lstm: a way back beyond the processor")
        };
        let (d_gates, d_weight) = self.run(gates, gl, weight, wl)?.gradients(&flat(states)?, &flat(grad)?);
        let d_gates = Tensor::from_vec(d_gates, g.shape(), g.device())?;
        Ok((Some(d_gates), Some(Tensor::from_vec(d_weight, w.shape(), w.device())?)))
    }
}
