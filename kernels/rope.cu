// rope: rotary positions of q and k in a packed projection, and RMSNorm of q and k heads, each by itself: what training differentiates.
// Serving fuses both with the write to the pool (kv_write.cu).
//
//   rope:      pairs (i, i + half) of a head turn by positions[row] * frequencies[i] (Su et al. 2021, half-split); sign -1 turns back,
//              which is the gradient. cos and sin are multiplied by `scale`.
//   head_norm: y = x / sqrt(mean(x^2) + eps) * w over each q head (weights q_weight) and k head (k_weight).
//
// Layout: x, y [rows, (heads + 2 * kv_heads) * dim] T; v heads are copied. frequencies [half] f32.
// Grid: blocks of 4 warps, a warp a head of a row. Roofline: reads and writes each element once; bound by memory.
#include "head.cuh"

constexpr int WARPS = 4;

// Calls f(row, head) for the head of this warp, if there is one.
template <typename F> __device__ __forceinline__ void each_head(int rows, int heads, F f) {
    const int index = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (index < rows * heads) f(index / heads, index % heads);
}

template <typename T>
__device__ void rope_heads(const T* __restrict__ x, const unsigned* __restrict__ positions, const float* __restrict__ frequencies,
                           T* __restrict__ y, int rows, int heads, int kv_heads, int dim, int half, float scale, float sign) {
    __shared__ float room[WARPS][MAX_HEAD];
    const int all = heads + 2 * kv_heads;
    each_head(rows, all, [&](int row, int head) {
        const size_t at = ((size_t)row * all + head) * dim;
        Head h;
        h.load(x + at, dim);
        if (head < heads + kv_heads) h.turn((float)positions[row], frequencies, half, scale, sign, room[threadIdx.x >> 5]);
        h.store(y + at, dim);
    });
}

template <typename T>
__device__ void norm_heads(const T* __restrict__ x, const float* __restrict__ q_weight, const float* __restrict__ k_weight, T* __restrict__ y,
                           int rows, int heads, int kv_heads, int dim, float eps) {
    const int all = heads + 2 * kv_heads;
    each_head(rows, all, [&](int row, int head) {
        const size_t at = ((size_t)row * all + head) * dim;
        Head h;
        h.load(x + at, dim);
        if (head < heads + kv_heads) h.norm(head < heads ? q_weight : k_weight, dim, eps);
        h.store(y + at, dim);
    });
}

#define KERNEL(SUFFIX, T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                                                          \
        rope_##SUFFIX(const T* x, const unsigned* positions, const float* frequencies, T* y, int rows, int heads, int kv_heads, int dim, \
                      int half, float scale, float sign) {                                                                     \
        rope_heads<T>(x, positions, frequencies, y, rows, heads, kv_heads, dim, half, scale, sign);                            \
    }                                                                                                                          \
    EXPORT(rope_##SUFFIX)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                                                          \
        head_norm_##SUFFIX(const T* x, const float* q_weight, const float* k_weight, T* y, int rows, int heads, int kv_heads, int dim, \
                           float eps) {                                                                                        \
        norm_heads<T>(x, q_weight, k_weight, y, rows, heads, kv_heads, dim, eps);                                              \
    }                                                                                                                          \
    EXPORT(head_norm_##SUFFIX)
FOR_TYPES(KERNEL)
