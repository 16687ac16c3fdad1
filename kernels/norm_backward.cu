// norm_backward: the gradient of RMSNorm and LayerNorm in their input, and of RMSNorm of heads (norm.cu, rope.cu).
//
//   n = (x - mean) s, s = 1 / sqrt(mean((x - mean)^2) + eps), g = dy w:  dx = s (g - mean(g) - n mean(g n)) (+ add)
//   RMSNorm takes no mean off. n is not kept: with c = x - mean, mean(g n) = s mean(g c), so RMSNorm needs two sums of one pass.
//
// Layout: x, dy, dx, add rows of `x_stride`, `dy_stride`, `dx_stride` and `dx_stride` elements, the first `width` of them, of T; w [width] f32.
// `add`, or null, is the gradient that comes by the residual; it may be dx itself. 16 bytes at once where a row begins aligned.
// Grid: one block of 32..1024 threads (a multiple of 32) a row. No shared memory but for the reductions: x and dy are read again from
// L1 or L2. Roofline: reads x and dy (and add), writes dx; bound by memory.
//
// `head_norm_backward`: x, dy, dx [rows, (heads + 2 * kv_heads) * dim] T: each q head with q_weight [dim], each k head with k_weight; v heads
// are copied. Grid: blocks of 4 warps, a warp a head of a row, which it holds in registers.
#include "head.cuh"

constexpr int WARPS = 4;

// Calls f(i, x[i], dy[i]) for this thread's elements of a row.
template <typename T, typename F> __device__ __forceinline__ void each_element(const T* x, const T* dy, int width, bool aligned, F f) {
    constexpr int N = Pack<T>::N;
    const int packs = aligned ? width / N : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Pack<T> a = load_pack(x + i * N), b = load_pack(dy + i * N);
#pragma unroll
        for (int j = 0; j < N; j++) f(i * N + j, to_float(a.v[j]), to_float(b.v[j]));
    }
    for (int i = packs * N + threadIdx.x; i < width; i += blockDim.x) f(i, to_float(x[i]), to_float(dy[i]));
}

template <typename T>
__device__ __forceinline__ void norm_backward_row(const T* __restrict__ x, const T* __restrict__ dy, const float* __restrict__ w, const T* add,
                                                  T* dx, int width, int x_stride, int dy_stride, int dx_stride, int centred, float eps) {
    constexpr int N = Pack<T>::N;
    x += (size_t)blockIdx.x * x_stride;
    dy += (size_t)blockIdx.x * dy_stride;
    dx += (size_t)blockIdx.x * dx_stride;
    if (add) add += (size_t)blockIdx.x * dx_stride;
    const bool aligned = ((size_t)x | (size_t)dy | (size_t)dx | (size_t)add) % 16 == 0;
    float mean = 0.f, squares = 0.f, sum = 0.f, along = 0.f;
    if (centred) {
        each_element(x, dy, width, aligned, [&](int, float v, float) { mean += v; });
        mean = block_reduce(mean, 0.f, SumOp()) / width;
    }
    each_element(x, dy, width, aligned, [&](int i, float v, float d) {
        const float c = v - mean, g = d * w[i];
        squares += c * c;
        sum += g;
        along += g * c;
    });
    const float scale = 1.f / sqrtf(block_reduce(squares, 0.f, SumOp()) / width + eps);
    along = block_reduce(along, 0.f, SumOp()) / width * scale * scale;
    if (centred) sum = block_reduce(sum, 0.f, SumOp()) / width;
    else sum = 0.f;
    auto gradient = [&](int i, float v, float d, float before) { return scale * (d * w[i] - sum - (v - mean) * along) + before; };
    const int packs = aligned ? width / N : 0;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Pack<T> a = load_pack(x + i * N), b = load_pack(dy + i * N), c = add ? load_pack(add + i * N) : Pack<T>();
        Pack<T> r;
#pragma unroll
        for (int j = 0; j < N; j++)
            r.v[j] = From<T>::f32(gradient(i * N + j, to_float(a.v[j]), to_float(b.v[j]), add ? to_float(c.v[j]) : 0.f));
        store_pack(dx + i * N, r);
    }
    for (int i = packs * N + threadIdx.x; i < width; i += blockDim.x)
        dx[i] = From<T>::f32(gradient(i, to_float(x[i]), to_float(dy[i]), add ? to_float(add[i]) : 0.f));
}

template <typename T>
__device__ __forceinline__ void head_norm_backward(const T* __restrict__ x, const T* __restrict__ dy, const float* __restrict__ q_weight,
                                                   const float* __restrict__ k_weight, T* __restrict__ dx, int rows, int heads, int kv_heads,
                                                   int dim, float eps) {
    const int all = heads + 2 * kv_heads, index = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (index >= rows * all) return;
    const int head = index % all;
    Head d;
    d.load(dy + (size_t)index * dim, dim);
    if (head < heads + kv_heads) {
        const float* w = head < heads ? q_weight : k_weight;
        Head h;
        h.load(x + (size_t)index * dim, dim);
        float squares = 0.f, along = 0.f;
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31);
            d.v[i] *= at < dim ? w[at] : 0.f;
            squares += h.v[i] * h.v[i];
            along += d.v[i] * h.v[i];
        }
        const float scale = 1.f / sqrtf(warp_reduce(squares, SumOp()) / dim + eps);
        along = warp_reduce(along, SumOp()) / dim * scale * scale;
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) d.v[i] = scale * (d.v[i] - h.v[i] * along);
    }
    d.store(dx + (size_t)index * dim, dim);
}

#define KERNEL(SUFFIX, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024)                                                                                 \
        norm_backward_##SUFFIX(const T* x, const T* dy, const float* w, const T* add, T* dx, int width, int x_stride, int dy_stride,   \
                               int dx_stride, int centred, float eps) {                                                                \
        norm_backward_row<T>(x, dy, w, add, dx, width, x_stride, dy_stride, dx_stride, centred, eps);                                  \
    }                                                                                                                                  \
    EXPORT(norm_backward_##SUFFIX)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                                                  \
        head_norm_backward_##SUFFIX(const T* x, const T* dy, const float* q_weight, const float* k_weight, T* dx, int rows, int heads, \
                                    int kv_heads, int dim, float eps) {                                                                \
        head_norm_backward<T>(x, dy, q_weight, k_weight, dx, rows, heads, kv_heads, dim, eps);                                         \
    }                                                                                                                                  \
    EXPORT(head_norm_backward_##SUFFIX)
FOR_TYPES(KERNEL)
