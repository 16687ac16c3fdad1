// What every kernel includes: types, conversions, reductions, and EXPORT, by which a kernel is found by name.
#pragma once
#ifdef KERNELS_ON_CPU
#include "cpu/cuda_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Dynamic shared memory, seen as an array of T.
#define DYN_SHARED(T, name)                                        \
    extern __shared__ __align__(16) unsigned char name##_bytes[];  \
    T* name = reinterpret_cast<T*>(name##_bytes)
#define EXPORT(name)
#endif

// `X(suffix, type)` for each type that activations and frozen weights have on a GPU.
#define FOR_TYPES(X) X(f32, float) X(bf16, __nv_bfloat16) X(f16, __half)

constexpr unsigned FULL_WARP = 0xffffffffu;

// Everything is computed in f32; memory holds T.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T> struct From;
template <> struct From<float> {
    static __device__ __forceinline__ float f32(float v) { return v; }
};
template <> struct From<__nv_bfloat16> {
    static __device__ __forceinline__ __nv_bfloat16 f32(float v) { return __float2bfloat16(v); }
};
template <> struct From<__half> {
    static __device__ __forceinline__ __half f32(float v) { return __float2half(v); }
};

// Sixteen bytes at once: what one thread loads and stores. Pointers must be aligned to 16 bytes.
template <typename T> struct alignas(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T v[N];
};
template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T* p) {
    Pack<T> r;
    *reinterpret_cast<uint4*>(&r) = *reinterpret_cast<const uint4*>(p);
    return r;
}
template <typename T> __device__ __forceinline__ void store_pack(T* p, const Pack<T>& v) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}

struct MaxOp {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct SumOp {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

template <typename Op> __device__ __forceinline__ float warp_reduce(float v, Op op) {
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) v = op(v, __shfl_xor_sync(FULL_WARP, v, m));
    return v;
}

// Over all threads of a block whose size is a multiple of 32; every thread gets the result, in one fixed order.
template <typename Op> __device__ __forceinline__ float block_reduce(float v, float identity, Op op) {
    __shared__ float parts[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    v = warp_reduce(v, op);
    __syncthreads();  // `parts` may still be read by an earlier call
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    v = lane < warps ? parts[lane] : identity;
    return warp_reduce(v, op);
}
