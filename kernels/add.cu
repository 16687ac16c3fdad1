// add: what a layer's product is added to: y = residual + bias, either of which may be missing. The product then accumulates into y.
//
// Layout: residual, y [rows, width] T; bias [width] f32. Grid: a block of 256 threads for each row (x) and each 256 elements of a row (y).
// Roofline: reads the residual, writes y; bound by memory.
#include "common.cuh"

template <typename T>
__device__ void add_rows(const T* __restrict__ residual, const float* __restrict__ bias, T* __restrict__ y, int width) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width) return;
    const size_t at = (size_t)blockIdx.x * width + column;
    y[at] = From<T>::f32((residual ? to_float(residual[at]) : 0.f) + (bias ? bias[column] : 0.f));
}

#define KERNEL(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) add_##SUFFIX(const T* residual, const float* bias, T* y, int width) { \
        add_rows<T>(residual, bias, y, width);                                                                         \
    }                                                                                                                  \
    EXPORT(add_##SUFFIX)
FOR_TYPES(KERNEL)
