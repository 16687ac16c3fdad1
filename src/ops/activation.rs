//! `activation`: the nonlinearity of a feed-forward layer, elementwise or times a second half.
//!
//! Gated: y = f(gate) * up, of a fused projection `[gate | up]` (SwiGLU and GeGLU, Shazeer 2020). Plain: y = f(x).
mod device;

use super::{Machine, float, make_rows, slice};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// f, by transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// x / (1 + e^-x): `silu`, `swish`.
    Silu,
    /// x (1 + erf(x / sqrt 2)) / 2: `gelu`.
    Gelu,
    /// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`.
    GeluTanh,
    /// max(x, 0): `relu`.
    Relu,
}

impl Function {
    /// By the name in a `config.json`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Function::Silu,
            "gelu" => Function::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => Function::GeluTanh,
            "relu" => Function::Relu,
            _ => return None,
        })
    }
}

impl Function {
    /// f(x) and f'(x).
    #[inline(always)]
    fn with_slope(self, x: f32) -> (f32, f32) {
        match self {
            Function::Silu => {
                let f = float::silu(x);
                let sigmoid = 1.0 / (1.0 + float::exp(-x.max(-87.0)));
                (f, sigmoid + f * (1.0 - sigmoid))
            }
            Function::Gelu => {
                let phi = 0.5 * (1.0 + float::erf(x * std::f32::consts::FRAC_1_SQRT_2));
                // The density of the normal distribution: 1 / sqrt(2 pi) e^(-x^2 / 2).
                (x * phi, phi + x * 0.398_942_3 * float::exp(-0.5 * x * x))
            }
            Function::GeluTanh => {
                let t = float::tanh(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x));
                let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044_715 * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
            }
            Function::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        }
    }
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;

/// The op; it has no weights.
#[derive(Clone)]
pub struct Activation {
    function: Function,
    /// Rows are `[gate | up]`.
    gated: bool,
    machine: Arc<Machine>,
}

impl Activation {
    /// Runs on the model's threads.
    pub fn new(function: Function, gated: bool, machine: &Arc<Machine>) -> Self {
        Activation { function, gated, machine: machine.clone() }
    }

    /// x `[m, intermediate]`, twice as wide if gated -> `[m, intermediate]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.machine.gpu() {
            Some(gpu) => gpu.apply1(device::OnDevice(self.clone()), x),
            None => x.apply_op1(self.clone()),
        }
    }

    /// x `[m, width]` -> y and its width, as plain elements.
    pub(super) fn rows(&self, x: &[f32], (m, width): (usize, usize)) -> Result<(Vec<f32>, usize)> {
        if self.gated && width % 2 != 0 {
            bail!("activation: x is [{m}, {width}], the width of [gate | up] must be even");
        }
        let out_width = self.width_of(width);
        let y = make_rows(&self.machine.pool, m, out_width, |first, y| {
            for (x, y) in x[first * width..].chunks_exact(width).zip(y.chunks_exact_mut(out_width)) {
                let (gate, up) = x.split_at(out_width);
                self.row(gate, up, y);
            }
        });
        Ok((y, out_width))
    }

    /// x `[m, width]` and dy -> dx, as plain elements.
    pub(super) fn row_gradients(&self, x: &[f32], (m, width): (usize, usize), dy: &[f32]) -> Vec<f32> {
        let out = self.width_of(width);
        make_rows(&self.machine.pool, m, width, |first, dx| {
            let rows = x[first * width..].chunks_exact(width).zip(dy[first * out..].chunks_exact(out));
            for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                let (gate, up) = x.split_at(out);
                self.row_gradient(gate, up, dy, dx);
            }
        })
    }

    /// Width of y.
    fn width_of(&self, width: usize) -> usize {
        if self.gated { width / 2 } else { width }
    }

    /// One row; `up` is empty if not gated.
    fn row(&self, x: &[f32], up: &[f32], y: &mut [f32]) {
        match self.function {
            Function::Silu => silu(x, up, y),
            Function::Gelu => gelu(x, up, y),
            Function::GeluTanh => gelu_tanh(x, up, y),
            Function::Relu => relu(x, up, y),
        }
    }

    /// dx `[d_gate | d_up]` of one row; `up` is empty where nothing is gated.
    fn row_gradient(&self, x: &[f32], up: &[f32], dy: &[f32], dx: &mut [f32]) {
        match self.function {
            Function::Silu => silu_gradient(x, up, dy, dx),
            Function::Gelu => gelu_gradient(x, up, dy, dx),
            Function::GeluTanh => gelu_tanh_gradient(x, up, dy, dx),
            Function::Relu => relu_gradient(x, up, dy, dx),
        }
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, width) = layout.shape().dims2()?;
        let (y, width) = self.rows(slice(x, layout, "activation")?, (m, width))?;
        Ok((CpuStorage::F32(y), (m, width).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.contiguous()?.apply_op2(&dy.contiguous()?, Gradient(self.clone()))?))
    }
}

/// x and dy -> dx. Gated: d gate = f'(gate) up dy, d up = f(gate) dy.
struct Gradient(Activation);

impl CustomOp2 for Gradient {
    fn name(&self) -> &'static str {
        "activation_gradient"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, dy: &CpuStorage, dyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, dy) = (slice(x, xl, "activation")?, slice(dy, dyl, "activation")?);
        let shape = xl.shape().dims2()?;
        Ok((CpuStorage::F32(self.0.row_gradients(x, shape, dy)), shape.into()))
    }
}

macro_rules! activation {
    ($name:ident, $f:expr) => {
        simd! {
            fn $name(x: &[f32], up: &[f32], y: &mut [f32]) {
                let f = $f;
                if up.is_empty() {
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x));
                } else {
                    y.iter_mut().zip(x).zip(up).for_each(|((y, x), u)| *y = f(*x) * u);
                }
            }
        }
    };
}

macro_rules! gradient {
    ($name:ident, $function:ident) => {
        simd! {
            fn $name(x: &[f32], up: &[f32], dy: &[f32], dx: &mut [f32]) {
                let (d_x, d_up) = dx.split_at_mut(x.len());
                if up.is_empty() {
                    d_x.iter_mut().zip(x).zip(dy).for_each(|((d, x), dy)| *d = Function::$function.with_slope(*x).1 * dy);
                } else {
                    for ((((d_x, d_up), x), up), dy) in d_x.iter_mut().zip(d_up).zip(x).zip(up).zip(dy) {
                        let (f, slope) = Function::$function.with_slope(*x);
                        (*d_x, *d_up) = (slope * dy * up, f * dy);
                    }
                }
            }
        }
    };
}

gradient!(silu_gradient, Silu);
gradient!(gelu_gradient, Gelu);
gradient!(gelu_tanh_gradient, GeluTanh);
gradient!(relu_gradient, Relu);

activation!(silu, float::silu);
activation!(gelu, |x: f32| 0.5 * x * (1.0 + float::erf(x * std::f32::consts::FRAC_1_SQRT_2)));
activation!(gelu_tanh, |x: f32| 0.5 * x * (1.0 + float::tanh(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x))));
activation!(relu, |x: f32| if x > 0.0 { x } else { 0.0 });

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn agree_with_f64() {
        let gelu_tanh =
            |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        // erf by the difference quotient is no reference; candle's own gelu_erf is.
        let erf = |x: f64| Tensor::new(x, &Device::Cpu).unwrap().gelu_erf().unwrap().to_scalar::<f64>().unwrap();
        type Reference<'a> = &'a dyn Fn(f64) -> f64;
        let cases: [(Function, Reference<'_>); 4] = [
            (Function::Silu, &|x| x / (1.0 + (-x).exp())),
            (Function::Gelu, &erf),
            (Function::GeluTanh, &gelu_tanh),
            (Function::Relu, &|x| x.max(0.0)),
        ];
        let (m, n) = (19, 21);
        let x: Vec<f32> = (0..m * 2 * n).map(|i| (i as f32 * 0.7).sin() * 12.0).collect();
        for (function, want) in cases {
            let machine = Machine::new(2);
            let wide = Tensor::from_slice(&x, (m, 2 * n), &Device::Cpu).unwrap();
            let plain = Activation::new(function, false, &machine).forward(&wide).unwrap().to_vec2::<f32>().unwrap();
            let gated = Activation::new(function, true, &machine).forward(&wide).unwrap().to_vec2::<f32>().unwrap();
            for (i, row) in x.chunks(2 * n).enumerate() {
                for j in 0..2 * n {
                    let f = want(f64::from(row[j]));
                    assert!((f64::from(plain[i][j]) - f).abs() < 2e-6, "{function:?} of {}", row[j]);
                    if j < n {
                        let f = f * f64::from(row[n + j]);
                        assert!((f64::from(gated[i][j]) - f).abs() < 2e-5, "{function:?} of {}", row[j]);
                    }
                }
            }
        }
    }
}
