// One head of a packed projection [q heads | k heads | v heads], held by a warp: lane l has elements l, l + 32, ...
#pragma once
#include "common.cuh"

constexpr int MAX_HEAD = 256;

struct Head {
    float v[MAX_HEAD / 32];

    template <typename T> __device__ __forceinline__ void load(const T* __restrict__ x, int dim) {
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31);
            v[i] = at < dim ? to_float(x[at]) : 0.f;
        }
    }

    template <typename T> __device__ __forceinline__ void store(T* __restrict__ y, int dim) const {
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31);
            if (at < dim) y[at] = From<T>::f32(v[i]);
        }
    }

    // RMSNorm of the head by itself, weights w [dim].
    __device__ __forceinline__ void norm(const float* __restrict__ w, int dim, float eps) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) squares += v[i] * v[i];
        const float scale = 1.f / sqrtf(warp_reduce(squares, SumOp()) / dim + eps);
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31);
            if (at < dim) v[i] *= scale * w[at];
        }
    }

    // Pairs (i, i + half) turn by position * frequencies[i]; what lies behind 2 * half stays. `shared` holds a head of this warp.
    __device__ __forceinline__ void turn(float position, const float* __restrict__ frequencies, int half, float scale, float sign,
                                         float* shared) {
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) shared[i * 32 + (threadIdx.x & 31)] = v[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MAX_HEAD / 32; i++) {
            const int at = i * 32 + (threadIdx.x & 31);
            if (at >= 2 * half) continue;
            const int pair = at < half ? at : at - half;
            float sine, cosine;
            sincosf(position * frequencies[pair], &sine, &cosine);
            sine *= scale * sign;
            cosine *= scale;
            v[i] = at < half ? v[i] * cosine - shared[at + half] * sine : v[i] * cosine + shared[at - half] * sine;
        }
        __syncwarp();
    }
};
