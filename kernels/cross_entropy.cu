// cross_entropy: from the logits of a chunk of rows to the loss of each row's target, and to the gradient of the logits.
//
//   z = logit, or c tanh(logit / c) with a cap c;  nll = log sum_j e^(z_j - max) + max - z_target
//   greedy: the target is what greedy decoding would choose: no lower id has z >= z_target, no higher one z > z_target
//   gradient_j = (e^(z_j - max) / sum - [j = target]) (1 - (z_j / c)^2) factor_row
//
// Layout: logits [rows, vocab] f32; targets [rows]; factors [rows] or null (1): of each row's loss, so that jobs of different sizes, and
// the loss scale of f16, need no pass of their own. nll [rows] f32, greedy [rows] 0 or 1. gradient: null, or rows of T, `stride` elements
// apart. It may be the logits' own memory with the rows at the same addresses (stride = 4 vocab / sizeof(T)): a block reads ahead of what it writes.
// Max and sum are kept online, each thread its own, and merged in a fixed order. A NaN among the logits, and a target beyond the
// vocabulary, give a loss of NaN.
// Grid: one block of 1024 threads a row, to hide latency by itself: there are few rows. Roofline: reads the logits twice (the second time
// from L2 while the rows in flight fit: 1 MB for 262,144 tokens), writes them once as T: 10 bytes a logit in bf16; bound by memory if
// there are as many rows as multiprocessors.
#include "common.cuh"

constexpr int BLOCK = 1024;
constexpr int EACH = 8;  // logits of a thread at once

__device__ __forceinline__ float capped(float z, float cap) { return cap > 0.f ? cap * tanhf(z / cap) : z; }

// EACH logits from `at` on; behind the end -inf, which counts as nothing.
__device__ __forceinline__ void load_logits(float (&z)[EACH], const float* row, int at, int vocab, bool aligned, float cap) {
    if (aligned && at + EACH <= vocab) {
#pragma unroll
        for (int i = 0; i < EACH; i += 4) {
            const Pack<float> p = load_pack(row + at + i);
#pragma unroll
            for (int j = 0; j < 4; j++) z[i + j] = p.v[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) z[i] = at + i < vocab ? row[at + i] : -INFINITY;
    }
    if (cap > 0.f) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (at + i < vocab) z[i] = capped(z[i], cap);
    }
}

template <typename T>
__device__ __forceinline__ void loss_of_row(const float* logits, const unsigned* __restrict__ targets, const float* __restrict__ factors,
                                            float* __restrict__ nll, unsigned* __restrict__ greedy, T* gradient, int vocab, int stride, float cap) {
    const size_t r = blockIdx.x;
    const float* row = logits + r * vocab;
    const unsigned target = targets[r];
    const float of_target = target < (unsigned)vocab ? capped(row[target], cap) : NAN;
    const bool aligned = (size_t)row % 16 == 0;
    float most = -INFINITY, sum = 0.f, z[EACH];
    int beaten = !(of_target == of_target);
    for (int at = threadIdx.x * EACH; at < vocab; at += BLOCK * EACH) {
        load_logits(z, row, at, vocab, aligned, cap);
        float now = most;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            now = fmaxf(now, z[i]);
            const unsigned id = at + i;
            if (id < (unsigned)vocab && id != target) beaten |= id < target ? !(z[i] < of_target) : !(z[i] <= of_target);
        }
        const float base = now == -INFINITY ? 0.f : now;
        float some = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) some += expf(z[i] - base);
        sum = sum * expf(most - base) + some;
        most = now;
    }
    const float all = block_reduce(most, -INFINITY, MaxOp());
    const float base = all == -INFINITY ? 0.f : all;
    const float log_sum = logf(block_reduce(sum * expf(most - base), 0.f, SumOp()));
    beaten = __syncthreads_or(beaten);
    if (threadIdx.x == 0) {
        nll[r] = log_sum + (base - of_target);
        greedy[r] = !beaten;
    }
    if (!gradient) return;
    const float factor = factors ? factors[r] : 1.f;
    T* out = gradient + r * stride;
    const bool packed = (size_t)out % 16 == 0;
    for (int from = 0; from < vocab; from += BLOCK * EACH) {
        const int at = from + threadIdx.x * EACH;
        if (at < vocab) load_logits(z, row, at, vocab, aligned, cap);
        __syncthreads();  // what is written now may be where these logits lie
        if (at >= vocab) continue;
        T d[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float bent = cap > 0.f ? z[i] / cap : 0.f;
            const float p = expf(z[i] - base - log_sum) - ((unsigned)(at + i) == target ? 1.f : 0.f);
            d[i] = From<T>::f32(p * (1.f - bent * bent) * factor);
        }
        if (packed && at + EACH <= vocab) {
#pragma unroll
            for (int i = 0; i < EACH; i += Pack<T>::N) {
                Pack<T> p;
#pragma unroll
                for (int j = 0; j < Pack<T>::N; j++) p.v[j] = d[i + j];
                store_pack(out + at + i, p);
            }
        } else {
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (at + i < vocab) out[at + i] = d[i];
        }
    }
}

#define KERNEL(SUFFIX, T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                           \
        cross_entropy_##SUFFIX(const float* logits, const unsigned* targets, const float* factors, float* nll, unsigned* greedy,  \
                               T* gradient, int vocab, int stride, float cap) {                                                   \
        loss_of_row<T>(logits, targets, factors, nll, greedy, gradient, vocab, stride, cap);                                      \
    }                                                                                                                             \
    EXPORT(cross_entropy_##SUFFIX)
FOR_TYPES(KERNEL)
