//! Micro-kernels: M rows of x times one panel of 32 columns of W.
//!
//! k is counted in dwords: one f32, two bf16 or four int8.
//!
//! | operand | layout |
//! |---|---|
//! | W panel | `[k_dwords][32]`: two 512-bit registers per step of k; int8: 32 scales before each group, weights plus 128 |
//! | x tile | `[k_dwords / 16][M][16]`: one cache line per row and 16 steps; widened: `[..][M][16][2]`, bf16 as f32, odd before even |
//!
//! Each y element has one accumulator, updated in ascending k. That order is the same for every M, instruction
//! set, k block and thread: a row's bits do not depend on its batch. In a bf16 pair the odd element comes first, then
//! the even one, which is what `vdpbf16ps` does. int8 sums a group exactly, in integers; groups add up in f32, in order:
//! y += (sum * scale of W) * scale of x.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::pack::RowScale;

/// Columns of a panel.
pub(super) const COLUMNS: usize = 32;
/// Dwords of k in one line of x.
pub(super) const LINE: usize = 16;

/// One call of a micro-kernel.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub w: *const u32,
    pub x: *const u32,
    /// x lines (16 dwords of k) to run.
    pub lines: usize,
    pub y: *mut f32,
    /// Elements from one row of y to the next.
    pub y_stride: usize,
    /// Valid columns, 1..=32.
    pub columns: usize,
    /// False: continue from the partial sums in y (f32, hence exact).
    pub first: bool,
    /// What to prefetch, from here on so many bytes further with each step of k.
    pub prefetch: *const u8,
    pub prefetch_step: usize,
    /// int8: lines that share a scale.
    pub group_lines: usize,
    /// int8: of each group and row, `[groups][M]`.
    pub scales: *const RowScale,
}

pub(super) type TileFn = unsafe fn(&Tile);

/// Kernels for 1..=len rows: `rows[m - 1]`.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub rows: &'static [TileFn],
    /// Whether bf16 x is laid out as f32, so that it needs no shifting apart beside the products.
    pub widened: bool,
    pub name: &'static str,
}

/// Type of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One f32 a dword.
    F32,
    /// Two bf16 a dword.
    Bf16,
    /// Four int8 a dword, with scales.
    Int8,
}

impl Kind {
    /// Elements of a dword.
    pub(super) fn per_dword(self) -> usize {
        match self {
            Kind::F32 => 1,
            Kind::Bf16 => 2,
            Kind::Int8 => 4,
        }
    }
}

/// Instruction set of the kernels. `Auto` takes the best that the CPU has, when a weight is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Isa {
    Auto,
    /// With `vdpbf16ps` and `vpdpbusd`.
    Avx512,
    /// The same with bf16 multiplied as f32: for CPUs that have no `vdpbf16ps`, or a slow one.
    Avx512Widened,
    Avx2,
    Portable,
}

/// `None` if the CPU lacks what `isa` needs for `kind`.
pub(super) fn select(kind: Kind, isa: Isa) -> Option<Kernels> {
    #[cfg(target_arch = "x86_64")]
    {
        let wide = is_x86_feature_detected!("avx512f");
        let paired = wide && is_x86_feature_detected!("avx512bf16");
        let widened = match isa {
            Isa::Auto => !paired || slow_pairs(),
            _ => isa == Isa::Avx512Widened,
        };
        let (found, rows) = match kind {
            Kind::F32 => (wide, avx512::F32),
            Kind::Bf16 if widened => (wide, avx512::WIDENED),
            Kind::Bf16 => (paired, avx512::BF16),
            Kind::Int8 => (wide && is_x86_feature_detected!("avx512vnni"), avx512::INT8),
        };
        if found && matches!(isa, Isa::Auto | Isa::Avx512 | Isa::Avx512Widened) {
            return Some(Kernels { rows, widened: widened && kind == Kind::Bf16, name: "avx512" });
        }
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if found && matches!(isa, Isa::Auto | Isa::Avx2) {
            let rows = match kind {
                Kind::F32 => portable::avx2::F32,
                Kind::Bf16 => portable::avx2::BF16,
                Kind::Int8 => portable::avx2::INT8,
            };
            return Some(Kernels { rows, widened: false, name: "avx2" });
        }
    }
    let rows = match kind {
        Kind::F32 => portable::F32,
        Kind::Bf16 => portable::BF16,
        Kind::Int8 => portable::INT8,
    };
    matches!(isa, Isa::Auto | Isa::Portable).then_some(Kernels { rows, widened: false, name: "portable" })
}

/// Whether `vdpbf16ps` makes fewer products a second than `vfmadd231ps`: Intel's cores begin one in two cycles and four of the
/// others (measured on Emerald Rapids: 82 and 166 GFLOP/s a core), AMD's one and one a cycle.
#[cfg(target_arch = "x86_64")]
fn slow_pairs() -> bool {
    let vendor = core::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    name.as_flattened() != b"AuthenticAMD"
}
