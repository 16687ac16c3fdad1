//! Float conversions and the exponential, the same bits on every instruction set; and which of those the CPU has.
use candle_core::DType;

/// What a body that is compiled three times runs as.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// What every CPU of the architecture has.
    Baseline,
}

/// The widest that the CPU has; a load and two tests once it is known.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn isa() -> Isa {
    let fma = is_x86_feature_detected!("fma");
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let half = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    match (fma && wide, fma && half) {
        (true, _) => Isa::Avx512,
        (false, true) => Isa::Avx2,
        (false, false) => Isa::Baseline,
    }
}

/// Whether the baseline multiplies and adds in one instruction: elsewhere `mul_add` is a library call per element.
pub const BASELINE_FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// a b + c, in one rounding if `FMA`.
#[inline(always)]
pub fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN. Integer code: `vcvtneps2bf16` would flush denormals.
#[inline(always)]
pub fn f32_to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Exact.
#[inline(always)]
pub fn bf16_to_f32(v: u16) -> f32 {
    f32::from_bits(u32::from(v) << 16)
}

/// The largest value of a type that activations, K or V are held in; what is larger would round to infinity.
pub fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f32(),
        DType::BF16 => half::bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// e^x for x <= 88, within 2 units in the last place; 0 below -87.3 (where f32 turns denormal), NaN for NaN.
/// Straight-line code that vectorises: x = n ln 2 + r, a polynomial in r (Cephes' `expf`), then 2^n by the exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = if x < -87.3 { -87.3 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    let two_n = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < -87.3 { 0.0 } else { e * two_n }
}

/// x / (1 + e^-x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x.max(-87.0)))
}

/// tanh x within 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // 44 is where 2x would leave exp's range; tanh is 1 long before.
    1.0 - 2.0 / (exp(2.0 * x.clamp(-43.0, 43.0)) + 1.0)
}

/// erf x within 4e-7: 1 - t e^(-x^2) P(t) with t = 1 / (1 + 0.3275911 |x|), the form of Abramowitz and Stegun 7.1.26;
/// P is a fit of degree 6 in t - 0.7 to erfc on [0, 4.2] (largest difference 3.6e-9 before rounding).
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let u = t - 0.7;
    let mut p = -0.298_453_7;
    p = p * u + 0.251_328_6;
    p = p * u + 0.987_704_7;
    p = p * u + 1.526_807_6;
    p = p * u + 1.490_295_5;
    p = p * u + 1.025_560_6;
    p = p * u + 0.508_587_85;
    (1.0 - t * p * exp(-a * a)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0f64;
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 2.4e-7, "{worst}");
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY), exp(-1e9)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    /// Against tanh of f64, and erf by its Maclaurin series in f64.
    #[test]
    fn tanh_and_erf_are_close_everywhere() {
        let series = |x: f64| {
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        };
        for i in -60_000..=60_000i32 {
            let x = i as f32 / 10_000.0;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2e-7, "{x}");
            let want = if x.abs() < 4.0 { series(f64::from(x)) } else { f64::from(x.signum()) };
            assert!((f64::from(erf(x)) - want).abs() < 4e-7, "{x}: {} {want}", erf(x));
        }
        assert_eq!((tanh(1e9), tanh(-1e9), erf(30.0), erf(-30.0)), (1.0, -1.0, 1.0, -1.0));
    }

    #[test]
    fn bf16_rounds_like_half() {
        for bits in (0..u32::MAX).step_by(65_521) {
            let v = f32::from_bits(bits);
            if !v.is_nan() {
                assert_eq!(f32_to_bf16(v), half::bf16::from_f32(v).to_bits(), "{v}");
            }
        }
        assert!(bf16_to_f32(f32_to_bf16(f32::NAN)).is_nan());
    }
}
