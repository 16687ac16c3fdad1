//! `seed`: where a way back starts with a gradient that is known already.
//!
//! candle's `backward` starts from a scalar with gradient 1. y -> 0 with the gradient g for y is such a scalar, and costs
//! neither the product y g nor its sum.
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

struct Seed(Tensor);

impl Seed {
    fn check(&self, output: &Layout) -> Result<()> {
        if output.shape() != self.0.shape() {
            bail!("seed: a gradient of {:?} for {:?}", self.0.shape(), output.shape());
        }
        Ok(())
    }
}

/// Gradients of everything below `output`, whose own is `gradient`, of the same shape.
pub fn backward_from(output: &Tensor, gradient: &Tensor) -> Result<GradStore> {
    output.apply_op1(Seed(gradient.detach()))?.backward()
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.check(layout)?;
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, output: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.check(layout)?;
        Ok((output.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_gradient_is_the_one_given() {
        let x = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        let gradient = Tensor::new(&[5f32, -1.0, 0.5], &Device::Cpu).unwrap();
        let gradients = backward_from(&x.sqr().unwrap(), &gradient).unwrap();
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap(), [10.0, -4.0, 3.0]);
        assert!(backward_from(&x.sqr().unwrap(), &x.narrow(0, 0, 2).unwrap()).is_err());
    }
}
