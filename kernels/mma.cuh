// Tensor-core products of one warp: D (16 x 8, f32) += A (16 x 16, rows) * B (16 x 8, columns), sm_80 and later.
//
// With lane = 4 g + t, a 32-bit register holds two neighbouring k:
//   a[0]: row g,     k = 2t, 2t + 1      a[1]: row g + 8, k = 2t, 2t + 1
//   a[2]: row g,     k = 2t + 8, + 9     a[3]: row g + 8, k = 2t + 8, + 9
//   b[0]: column g,  k = 2t, 2t + 1      b[1]: column g,  k = 2t + 8, + 9
//   d[0], d[1]: row g, columns 2t, 2t + 1;   d[2], d[3]: row g + 8, the same columns
// (PTX ISA, "Matrix Fragments for mma.m16n8k16").
#pragma once
#include "common.cuh"

template <typename T> __device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifndef KERNELS_ON_CPU
#define MMA(T, TYPE)                                                                                              \
    template <>                                                                                                   \
    __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                       \
                     ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                    \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
    }
MMA(__nv_bfloat16, "bf16")
MMA(__half, "f16")
#undef MMA
#else
template <typename T> __device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    auto& s = cuda_cpu::sched();
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    memcpy(s.current->brought, mine, sizeof mine);
    cuda_cpu::meet(FULL_WARP, cuda_cpu::GATHER);
    const auto& gathered = s.warps[s.current->linear / 32].gathered;
    const int lane = s.current->linear & 31, g = lane / 4, t = lane % 4;
    auto element = [&](int of, int reg, int high) {
        T v;
        memcpy(&v, gathered[of] + 4 * reg + 2 * high, 2);
        return to_float(v);
    };
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const float x = element((row % 8) * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k & 1);
            d[i] += x * element(col * 4 + k % 8 / 2, 4 + k / 8, k & 1);
        }
    }
}
#endif

// Two neighbours in one register, the first in the low half.
template <typename T> __device__ __forceinline__ unsigned pack2(float low, float high) {
    const T pair[2] = {From<T>::f32(low), From<T>::f32(high)};
    unsigned r;
    memcpy(&r, pair, 4);
    return r;
}
// The low halves of two registers, and their high halves: columns of two rows.
__device__ __forceinline__ unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }
