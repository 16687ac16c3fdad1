// norm: RMSNorm and LayerNorm of rows. The residual before it is added where the product before it is written (linear.cu, add.cu).
//
//   RMSNorm: y = x / sqrt(mean(x^2) + eps) * w;  LayerNorm, with b: y = (x - mean) / sqrt(var + eps) * w + b
//
// Layout: x, y [rows, width] of T; w, b [width] f32.
// Grid: one block of 32..1024 threads (a multiple of 32) a row. Shared memory: width * 4 bytes, the row in f32, so global memory is
// read once. Roofline: reads x, writes y; bound by memory.
#include "common.cuh"

template <typename T>
__device__ void norm_rows(const T* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b, T* __restrict__ y, int width,
                          float eps) {
    DYN_SHARED(float, row);
    const size_t start = (size_t)blockIdx.x * width;
    float total = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float v = to_float(x[start + i]);
        row[i] = v;
        total += b ? v : v * v;
    }
    total = block_reduce(total, 0.f, SumOp()) / width;
    float mean = 0.f, variance = total;
    if (b) {
        mean = total;
        float squares = 0.f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
        variance = block_reduce(squares, 0.f, SumOp()) / width;
    }
    const float scale = 1.f / sqrtf(variance + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[start + i] = From<T>::f32((row[i] - mean) * scale * w[i] + (b ? b[i] : 0.f));
}

#define KERNEL(SUFFIX, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(1024) norm_##SUFFIX(const T* x, const float* w, const float* b, T* y,    \
                                                                     int width, float eps) {                          \
        norm_rows<T>(x, w, b, y, width, eps);                                                                         \
    }                                                                                                                 \
    EXPORT(norm_##SUFFIX)
FOR_TYPES(KERNEL)
