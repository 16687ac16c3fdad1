// embed: token rows and soft-prompt rows gathered into one packed tensor, and learned positions.
//
//   y[r] = table[source[r]] * scale      if source[r] >= 0, a token; from 2^30 on, the one in place source[r] - 2^30 of `sampled`
//        = soft[-1 - source[r]]          else, a virtual token
//   y[r] += learned[positions[r]]        if positions are learned
//
// Heterogeneous soft prompts cost nothing more: they are rows of one tensor, whoever they belong to.
// `sampled` is what the step before chose: the host has planned this step before it could read that.
// Layout: table [vocab, hidden] T, soft [num_soft, hidden] f32, learned [positions, hidden] f32 or null, y [rows, hidden] T.
// Grid: a block of 128 threads a row. Roofline: reads and writes each row once; bound by memory.
#include "common.cuh"

// The same in `src/ops/gpu/rows.rs`.
constexpr int SAMPLED = 1 << 30;

template <typename T>
__device__ void embed_rows(const T* __restrict__ table, const float* __restrict__ soft, const float* __restrict__ learned,
                           const int* __restrict__ source, const unsigned* __restrict__ positions, const unsigned* __restrict__ sampled,
                           T* __restrict__ y, int hidden, float scale) {
    const int row = blockIdx.x;
    int from = source[row];
    if (from >= SAMPLED) from = sampled[from - SAMPLED];
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float v = from >= 0 ? to_float(table[(size_t)from * hidden + i]) * scale : soft[(size_t)(-1 - from) * hidden + i];
        if (learned) v += learned[(size_t)positions[row] * hidden + i];
        y[(size_t)row * hidden + i] = From<T>::f32(v);
    }
}

// Gradient: each soft row gets the sum over the rows that are it, in their order: rows[starts[s] .. starts[s + 1]] of dy [rows, hidden].
// Grid: a block a soft row.
template <typename T>
__device__ void embed_backward(const T* __restrict__ dy, const unsigned* __restrict__ starts, const unsigned* __restrict__ rows,
                               float* __restrict__ dsoft, int hidden) {
    const int s = blockIdx.x;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float sum = 0.f;
        for (unsigned r = starts[s]; r < starts[s + 1]; r++) sum += to_float(dy[(size_t)rows[r] * hidden + i]);
        dsoft[(size_t)s * hidden + i] = sum;
    }
}

#define KERNEL(SUFFIX, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        embed_##SUFFIX(const T* table, const float* soft, const float* learned, const int* source, const unsigned* positions, \
                       const unsigned* sampled, T* y, int hidden, float scale) {                                           \
        embed_rows<T>(table, soft, learned, source, positions, sampled, y, hidden, scale);                                 \
    }                                                                                                                      \
    EXPORT(embed_##SUFFIX)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                      \
        embed_backward_##SUFFIX(const T* dy, const unsigned* starts, const unsigned* rows, float* dsoft, int hidden) {     \
        embed_backward<T>(dy, starts, rows, dsoft, hidden);                                                                \
    }                                                                                                                      \
    EXPORT(embed_backward_##SUFFIX)
FOR_TYPES(KERNEL)
