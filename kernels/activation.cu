// activation: the nonlinearity of a feed-forward layer, elementwise or times a second half, and its gradient.
//
//   plain: y = f(x), dx = f'(x) dy.   gated, x = [gate | up]: y = f(gate) up, d gate = f'(gate) up dy, d up = f(gate) dy
//   f: 0 silu x / (1 + e^-x), 1 gelu x (1 + erf(x / sqrt 2)) / 2, 2 its approximation by tanh, 3 relu
//
// Layout: x and dx [rows, width], or [rows, 2 width] if gated; y and dy [rows, width]; all T. Of 16 bytes at once where a row begins aligned.
// Grid: x: rows; y: blocks of 256 threads of 16 bytes each. Roofline: reads x (and dy) once, writes y (or dx) once; bound by memory.
#include "common.cuh"

struct Silu {
    static __device__ __forceinline__ void at(float x, float& f, float& slope) {
        const float sigmoid = 1.f / (1.f + expf(-x));
        f = x * sigmoid;
        slope = sigmoid + f * (1.f - sigmoid);
    }
};
// Far below 0, 1 + erf and 1 + tanh are differences of two numbers near 1: erfc and the sigmoid have their small values as they are.
struct Gelu {
    static __device__ __forceinline__ void at(float x, float& f, float& slope) {
        const float below = 0.5f * erfcf(x * -0.70710678f);
        f = x * below;
        slope = below + x * 0.39894228f * expf(-0.5f * x * x);
    }
};
struct GeluTanh {
    static __device__ __forceinline__ void at(float x, float& f, float& slope) {
        constexpr float A = 0.79788456f, B = 0.044715f;
        const float half = 1.f / (1.f + expf(-2.f * A * (x + B * x * x * x)));  // (1 + tanh) / 2
        f = x * half;
        slope = half + 2.f * f * (1.f - half) * A * (1.f + 3.f * B * x * x);
    }
};
struct Relu {
    static __device__ __forceinline__ void at(float x, float& f, float& slope) {
        f = fmaxf(x, 0.f);
        slope = x > 0.f ? 1.f : 0.f;
    }
};

template <typename T> __device__ __forceinline__ Pack<T> load_some(const T* p, int count, bool aligned) {
    if (aligned && count >= Pack<T>::N) return load_pack(p);
    Pack<T> r;
#pragma unroll
    for (int i = 0; i < Pack<T>::N; i++) r.v[i] = i < count ? p[i] : From<T>::f32(0.f);
    return r;
}
template <typename T> __device__ __forceinline__ void store_some(T* p, const Pack<T>& v, int count, bool aligned) {
    if (aligned && count >= Pack<T>::N) return store_pack(p, v);
#pragma unroll
    for (int i = 0; i < Pack<T>::N; i++)
        if (i < count) p[i] = v.v[i];
}

template <typename F, typename T> __device__ __forceinline__ void forward(F, const T* x, const T* up, T* y, int count, bool aligned) {
    const Pack<T> a = load_some(x, count, aligned), b = up ? load_some(up, count, aligned) : Pack<T>();
    Pack<T> r;
#pragma unroll
    for (int i = 0; i < Pack<T>::N; i++) {
        float f, slope;
        F::at(to_float(a.v[i]), f, slope);
        r.v[i] = From<T>::f32(up ? f * to_float(b.v[i]) : f);
    }
    store_some(y, r, count, aligned);
}

template <typename F, typename T>
__device__ __forceinline__ void backward(F, const T* x, const T* up, const T* dy, T* dx, T* dup, int count, bool aligned) {
    const Pack<T> a = load_some(x, count, aligned), b = up ? load_some(up, count, aligned) : Pack<T>(), d = load_some(dy, count, aligned);
    Pack<T> r, s;
#pragma unroll
    for (int i = 0; i < Pack<T>::N; i++) {
        float f, slope;
        F::at(to_float(a.v[i]), f, slope);
        const float by = to_float(d.v[i]);
        r.v[i] = From<T>::f32(up ? slope * by * to_float(b.v[i]) : slope * by);
        s.v[i] = From<T>::f32(f * by);
    }
    store_some(dx, r, count, aligned);
    if (up) store_some(dup, s, count, aligned);
}

// Calls run(f) for f number `function`; the branch is the same for all threads.
template <typename Run> __device__ __forceinline__ void with_function(int function, Run run) {
    switch (function) {
        case 0: return run(Silu());
        case 1: return run(Gelu());
        case 2: return run(GeluTanh());
        default: return run(Relu());
    }
}

template <typename T>
__device__ __forceinline__ void activation_row(const T* __restrict__ x, T* __restrict__ y, int width, int function, int gated) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<T>::N;
    if (at >= width) return;
    const T* from = x + (size_t)blockIdx.x * (gated ? 2 * width : width) + at;
    T* to = y + (size_t)blockIdx.x * width + at;
    const bool aligned = (width % Pack<T>::N == 0) && ((size_t)x | (size_t)y) % 16 == 0;
    with_function(function, [&](auto f) { forward(f, from, gated ? from + width : nullptr, to, width - at, aligned); });
}

template <typename T>
__device__ __forceinline__ void activation_backward_row(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int width,
                                                        int function, int gated) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<T>::N;
    if (at >= width) return;
    const size_t row = (size_t)blockIdx.x * (gated ? 2 * width : width) + at;
    const T *from = x + row, *by = dy + (size_t)blockIdx.x * width + at;
    T* to = dx + row;
    const bool aligned = (width % Pack<T>::N == 0) && ((size_t)x | (size_t)dy | (size_t)dx) % 16 == 0;
    with_function(function, [&](auto f) { backward(f, from, gated ? from + width : nullptr, by, to, to + width, width - at, aligned); });
}

#define KERNEL(SUFFIX, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) activation_##SUFFIX(const T* x, T* y, int width, int function, int gated) {    \
        activation_row<T>(x, y, width, function, gated);                                                                             \
    }                                                                                                                                \
    EXPORT(activation_##SUFFIX)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        activation_backward_##SUFFIX(const T* x, const T* dy, T* dx, int width, int function, int gated) {                           \
        activation_backward_row<T>(x, dy, dx, width, function, gated);                                                               \
    }                                                                                                                                \
    EXPORT(activation_backward_##SUFFIX)
FOR_TYPES(KERNEL)
