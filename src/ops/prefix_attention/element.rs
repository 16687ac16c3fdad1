//! The types that K and V of the pool may have on the CPU. Scores, weights and sums are f32 whatever they are.
use crate::ops::float::f32_to_bf16;
use crate::ops::lanes::Lanes;
use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16};

/// An element of K or V.
pub trait Element: WithDType {
    /// The first 16 of `from`, exactly.
    fn load<V: Lanes>(from: &[Self]) -> V;
    /// Exact.
    fn value(self) -> f32;
    /// The nearest there is, ties to even; a finite value stays finite, and NaN is NaN.
    fn nearest(value: f32) -> Self;
    /// The elements of a tensor of this type.
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Element for f32 {
    #[inline(always)]
    fn load<V: Lanes>(from: &[Self]) -> V {
        V::load(from)
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        value
    }
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(all) = storage { Some(all) } else { None }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<V: Lanes>(from: &[Self]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        let most = bf16::MAX.to_f32();
        bf16::from_bits(f32_to_bf16(value.clamp(-most, most)))
    }
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::BF16(all) = storage { Some(all) } else { None }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<V: Lanes>(from: &[Self]) -> V {
        V::load_f16(from)
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn nearest(value: f32) -> Self {
        let most = f16::MAX.to_f32();
        f16::from_f32(value.clamp(-most, most))
    }
    fn elements(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F16(all) = storage { Some(all) } else { None }
    }
}
