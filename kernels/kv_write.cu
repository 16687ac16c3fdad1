// kv_write: from a packed projection to normed and turned queries, and K and V in their slots of the pool.
//
//   q = rope(norm(x_q)), keys[slot] = rope(norm(x_k)), values[slot] = x_v; norm and rope where the layer has them (see rope.cu).
//
// Layout: x [rows, (heads + 2 * kv_heads) * dim] T; q [rows, heads * dim] T; keys, values [slots, kv_heads, dim] T; slots, positions
// [rows]. Between norm and rope nothing is rounded to T.
// Grid: blocks of 4 warps, a warp a head of a row. Roofline: reads and writes each element once; bound by memory. One launch in place of
// four, and K and V are not read again before attention does.
//
// `kv_copy` writes rows [n, 2 * kv_heads * dim] of f32, K then V as stored (a prefix was turned when it was trained), to their slots.
#include "head.cuh"

constexpr int WARPS = 4;

template <typename T>
__device__ void kv_write_heads(const T* __restrict__ x, const unsigned* __restrict__ slots, const unsigned* __restrict__ positions,
                               const float* __restrict__ frequencies, const float* __restrict__ q_weight, const float* __restrict__ k_weight,
                               T* __restrict__ q, T* __restrict__ keys, T* __restrict__ values, int rows, int heads, int kv_heads, int dim,
                               int half, float scale, float eps) {
    __shared__ float room[WARPS][MAX_HEAD];
    const int all = heads + 2 * kv_heads, index = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (index >= rows * all) return;
    const int row = index / all, head = index % all;
    Head h;
    h.load(x + (size_t)index * dim, dim);
    const bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
    if (is_q || is_k) {
        const float* weight = is_q ? q_weight : k_weight;
        if (weight) h.norm(weight, dim, eps);
        if (half) h.turn((float)positions[row], frequencies, half, scale, 1.f, room[threadIdx.x >> 5]);
    }
    if (is_q) {
        h.store(q + ((size_t)row * heads + head) * dim, dim);
    } else {
        const int kv_head = is_k ? head - heads : head - heads - kv_heads;
        h.store((is_k ? keys : values) + ((size_t)slots[row] * kv_heads + kv_head) * dim, dim);
    }
}

template <typename T>
__device__ void kv_copy_rows(const float* __restrict__ rows, const unsigned* __restrict__ slots, T* __restrict__ keys, T* __restrict__ values,
                             int width, int stride) {
    const float* from = rows + (size_t)blockIdx.x * stride;
    const size_t to = (size_t)slots[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        keys[to + i] = From<T>::f32(from[i]);
        values[to + i] = From<T>::f32(from[width + i]);
    }
}

#define KERNEL(SUFFIX, T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                                             \
        kv_write_##SUFFIX(const T* x, const unsigned* slots, const unsigned* positions, const float* frequencies, const float* q_weight, \
                          const float* k_weight, T* q, T* keys, T* values, int rows, int heads, int kv_heads, int dim, int half,   \
                          float scale, float eps) {                                                                               \
        kv_write_heads<T>(x, slots, positions, frequencies, q_weight, k_weight, q, keys, values, rows, heads, kv_heads, dim, half, scale, \
                          eps);                                                                                                   \
    }                                                                                                                             \
    EXPORT(kv_write_##SUFFIX)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                                             \
        kv_copy_##SUFFIX(const float* rows, const unsigned* slots, T* keys, T* values, int width, int stride) {                   \
        kv_copy_rows<T>(rows, slots, keys, values, width, stride);                                                                \
    }                                                                                                                             \
    EXPORT(kv_copy_##SUFFIX)
FOR_TYPES(KERNEL)
