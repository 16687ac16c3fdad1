// prefix_attention_backward: the gradient of attention over packed rows, for training (FlashAttention-2, Dao 2023, sections 3.1 and 3.3).
//
//   s = scale q . k;  z = s, or c tanh(s / c) with a cap c;  p = exp(z - lse) where the row sees the key, else 0
//   D = dO . O (`dots`);  dV_j = sum p dO;  dS = p (dO . V_j - D) (1 - (z / c)^2);  dK_j = scale sum dS Q;  dQ = scale sum_j dS K_j
//
// Layout: q, dO, O, dQ of T: rows of `stride` elements that start with the heads [heads, dim]; k, v [kv_rows, kv_heads, dim] T, the prefixes
// of all jobs and the own rows of all sequences; lse (m + log l of z, from the forward pass) and dots [rows, heads] f32. dK and dV of the
// first `prefix_rows` rows are f32 (they go to the optimiser), those of the others T (they go on into the layer). A query row and the heads of
// one KV head are counted as one list: entry e is query e / group, head e % group; this is what makes dK and dV sums over the group.
//
// Work: the host makes lists (src/ops/prefix_attention/packed/device/plan.rs). An item is {begin, end, first run, last run, part}: the tile
// of keys (`keys`) or of entries (`queries`) that a block owns; a run is {begin, end, offset}: entries (or keys) that the tile meets, in this
// order. Key j and query i meet if d = i - j + offset, the distance of their slots, is < window and, if causal, >= 0. A prefix row that many
// sequences share is one tile with a run for each; a long list is cut into parts, whose sums go to `partial` and are added in order by `sum`. No
// atomics: every sum has one order.
//
// One body for both kernels: a tile of FIXED rows of two tensors (K and V, or Q and dO) stays in shared memory, tiles of STREAM rows of the
// other two come and go. A warp has 16 of the fixed rows: S and dP = dO V^T are products of rows, and stay in its registers as the left
// factor of the sums. bf16 and f16 go to the tensor cores, P and dS rounded to T; f32 stays f32 (FMA). Heads wider than 128 have two warps a
// row tile, each with half of the columns of the sums; both compute S.
// Grid: (items, kv_heads); 128 threads (256 for 16-bit heads wider than 128). Rows are padded by 16 bytes, so that no access conflicts.
// Shared memory, most: 70 KB for dim <= 128 of 16 bits, 90 KB for f32, 85 KB for dim 256: one or two blocks on sm_80 and on.
// Roofline: 10 dim flops for each pair (query, key, head) that meet in `keys`, of which a half by mma can be near the peak: each product takes as long
// to load from shared memory (2 x 128 bytes) as to multiply (4096 flops), which bounds it to about half of the peak of mma.sync. `queries`: 6 dim.
// Memory: K, V once each, Q and dO once for each key tile; for tiles of 64 that is 128 flops a byte and more: bound by the products.
#include "mma.cuh"

template <typename T, int DIM, bool KEYS> struct Tiles {
    static constexpr bool WIDE = sizeof(T) == 4;
    static constexpr int COLUMN_WARPS = DIM > 128 ? 2 : 1;
    static constexpr int ROW_WARPS = WIDE && DIM > 128 ? 2 : 4;
    static constexpr int THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
    static constexpr int FIXED = 16 * ROW_WARPS;
    static constexpr int STREAM = (WIDE ? 16 : KEYS ? 32 : 64) / (DIM > 128 ? (WIDE || KEYS ? 2 : 4) : 1);
    static constexpr int STRIDE = DIM + 16 / sizeof(T);
    static constexpr int QUERIES = KEYS ? STREAM : FIXED;
    // Of the columns of a sum, and pairs of 8 columns of those.
    static constexpr int COLUMNS = DIM / COLUMN_WARPS, PAIRS = COLUMNS / 16;
    // f32: room for a warp's left factor.
    static constexpr int ROOM = STREAM + 4;
    static constexpr int BYTES =
        2 * (FIXED + STREAM) * STRIDE * sizeof(T) + 12 * QUERIES + (WIDE ? ROW_WARPS * COLUMN_WARPS * 16 * ROOM * 4 : 0);
};

template <typename T> struct Input {
    const T *q, *k, *v, *grad;
    const float *lse, *dots;
    int heads, kv_heads, dim, q_stride, grad_stride, causal, window;
    float scale, cap;
};

template <typename T> __device__ __forceinline__ unsigned word(const T* p) { return *reinterpret_cast<const unsigned*>(p); }

// `rows` rows of DIM elements in shared memory, of which `count` and `dim` exist; the others are 0. `at(r)`: offset of row r in `from`.
template <typename T, int DIM, int STRIDE, int THREADS, typename At>
__device__ __forceinline__ void load_rows(T* to, const T* __restrict__ from, At at, int rows, int count, int dim, bool aligned) {
    constexpr int N = Pack<T>::N, CHUNKS = DIM / N;
    for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * N;
        Pack<T> pack;
        if (aligned && r < count && c < dim) {
            pack = load_pack(from + at(r) + c);
        } else {
#pragma unroll
            for (int j = 0; j < N; j++) pack.v[j] = r < count && c + j < dim ? from[at(r) + c + j] : From<T>::f32(0.f);
        }
        store_pack(to + r * STRIDE + c, pack);
    }
}

// d[n] += A B^T: 16 rows of `a`, 8 N rows of `b`, over `dim` columns. Element i of d[n]: row g + 8 (i / 2), column 8 n + 2 t + i % 2.
template <typename T, int STRIDE, int DIM, int N>
__device__ __forceinline__ void rows_product(float (&d)[N][4], const T* a, const T* b, int dim) {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(T) == 4) {
#pragma unroll 4
        for (int k = 0; k < DIM; k += 4) {
            if (k >= dim) break;
            const float4 low = *reinterpret_cast<const float4*>(a + g * STRIDE + k);
            const float4 high = *reinterpret_cast<const float4*>(a + (g + 8) * STRIDE + k);
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float4 x = *reinterpret_cast<const float4*>(b + (8 * n + 2 * t + i) * STRIDE + k);
                    d[n][i] += low.x * x.x + low.y * x.y + low.z * x.z + low.w * x.w;
                    d[n][2 + i] += high.x * x.x + high.y * x.y + high.z * x.z + high.w * x.w;
                }
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < DIM; k += 16) {
            if (k >= dim) break;
            const T* from = a + g * STRIDE + k + 2 * t;
            const unsigned left[4] = {word(from), word(from + 8 * STRIDE), word(from + 8), word(from + 8 * STRIDE + 8)};
#pragma unroll
            for (int n = 0; n < N; n++) {
                const T* column = b + (8 * n + g) * STRIDE + k + 2 * t;
                const unsigned right[2] = {word(column), word(column + 8)};
                mma_m16n8k16<T>(d[n], left, right);
            }
        }
    }
}

// d += P B: P 16 x 8 N as rows_product leaves it, B 8 N rows in shared memory, over the first `columns` columns. Element of d[p], row
// g + 8 h, column 16 p + 4 t + e: d[p][e % 2][2 h + e / 2]. `room`: of this warp.
template <typename T, int STRIDE, int N, int PAIRS>
__device__ __forceinline__ void sum_product(float (&d)[PAIRS][2][4], const float (&p)[N][4], const T* b, int columns, float* room) {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(T) == 4) {
        constexpr int ROOM = 8 * N + 4;
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) room[(g + 8 * (i / 2)) * ROOM + 8 * n + 2 * t + i % 2] = p[n][i];
        }
        __syncwarp();
#pragma unroll 4
        for (int k = 0; k < 8 * N; k++) {
            const float low = room[g * ROOM + k], high = room[(g + 8) * ROOM + k];
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                if (16 * j >= columns) break;
                const float4 x = *reinterpret_cast<const float4*>(b + k * STRIDE + 16 * j + 4 * t);
                const float row[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    d[j][e % 2][e / 2] += low * row[e];
                    d[j][e % 2][2 + e / 2] += high * row[e];
                }
            }
        }
    } else {
        // The rows of B are the k of the product, and a register holds two neighbouring k of one column: words of two rows, halves
        // exchanged. The even columns of 16 are then one tile and the odd ones another.
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            const unsigned left[4] = {pack2<T>(p[n][0], p[n][1]), pack2<T>(p[n][2], p[n][3]), pack2<T>(p[n + 1][0], p[n + 1][1]),
                                      pack2<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                if (16 * j >= columns) break;
                const T* from = b + (8 * n + 2 * t) * STRIDE + 16 * j + 2 * g;
                const unsigned w[4] = {word(from), word(from + STRIDE), word(from + 8 * STRIDE), word(from + 9 * STRIDE)};
                const unsigned even[2] = {low_halves(w[0], w[1]), low_halves(w[2], w[3])};
                const unsigned odd[2] = {high_halves(w[0], w[1]), high_halves(w[2], w[3])};
                mma_m16n8k16<T>(d[j][0], left, even);
                mma_m16n8k16<T>(d[j][1], left, odd);
            }
        }
    }
}

// Sums of one tile: `sums[0]` of dK or dQ, without the scale, `sums[1]` of dV.
template <typename T, int DIM, bool KEYS, int SUMS>
__device__ __forceinline__ void tile_sums(const Input<T>& in, const int* item, const int* __restrict__ runs,
                                          float (&sums)[SUMS][Tiles<T, DIM, KEYS>::PAIRS][2][4]) {
    using Shape = Tiles<T, DIM, KEYS>;
    constexpr int FIXED = Shape::FIXED, STREAM = Shape::STREAM, STRIDE = Shape::STRIDE, N = STREAM / 8;
    DYN_SHARED(unsigned char, memory);
    T* const fixed[2] = {reinterpret_cast<T*>(memory), reinterpret_cast<T*>(memory) + FIXED * STRIDE};
    T* const stream[2] = {fixed[1] + FIXED * STRIDE, fixed[1] + (FIXED + STREAM) * STRIDE};
    float* const lse = reinterpret_cast<float*>(stream[1] + STREAM * STRIDE);
    float* const dots = lse + Shape::QUERIES;
    int* const query = reinterpret_cast<int*>(dots + Shape::QUERIES);
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
    float* const room = dots + 2 * Shape::QUERIES + warp * 16 * Shape::ROOM;
    const int first = warp / Shape::COLUMN_WARPS * 16, column = warp % Shape::COLUMN_WARPS * Shape::COLUMNS;
    const int head = blockIdx.y, dim = in.dim;
    const unsigned group = in.heads / in.kv_heads;
    const bool aligned = (dim | in.q_stride | in.grad_stride) % Pack<T>::N == 0 &&
                         ((size_t)in.q | (size_t)in.k | (size_t)in.v | (size_t)in.grad) % 16 == 0;

    auto load_keys = [&](T* const* to, int rows, int begin, int count) {
        auto at = [&](int r) { return ((size_t)(begin + r) * in.kv_heads + head) * dim; };
        load_rows<T, DIM, STRIDE, Shape::THREADS>(to[0], in.k, at, rows, count, dim, aligned);
        load_rows<T, DIM, STRIDE, Shape::THREADS>(to[1], in.v, at, rows, count, dim, aligned);
    };
    auto load_queries = [&](T* const* to, int rows, int begin, int count) {
        auto at = [&](int stride) {
            return [=](int r) {
                const unsigned entry = begin + r;
                return (size_t)(entry / group) * stride + (head * group + entry % group) * dim;
            };
        };
        load_rows<T, DIM, STRIDE, Shape::THREADS>(to[0], in.q, at(in.q_stride), rows, count, dim, aligned);
        load_rows<T, DIM, STRIDE, Shape::THREADS>(to[1], in.grad, at(in.grad_stride), rows, count, dim, aligned);
        for (int r = threadIdx.x; r < count; r += Shape::THREADS) {
            const unsigned entry = begin + r;
            const size_t from = (size_t)(entry / group) * in.heads + head * group + entry % group;
            lse[r] = in.lse[from];
            dots[r] = in.dots[from];
            query[r] = entry / group;
        }
    };

    const int begin = item[0], count = item[1] - begin;
    if (KEYS) load_keys(fixed, FIXED, begin, count);
    else load_queries(fixed, FIXED, begin, count);
    for (int run = item[2]; run < item[3]; run++) {
        const int end = runs[3 * run + 1], offset = runs[3 * run + 2];
        for (int from = runs[3 * run]; from < end; from += STREAM) {
            const int some = min(STREAM, end - from);
            __syncthreads();
            if (KEYS) load_queries(stream, STREAM, from, some);
            else load_keys(stream, STREAM, from, some);
            __syncthreads();
            if (first >= count) continue;
            float p[N][4] = {}, ds[N][4] = {};
            rows_product<T, STRIDE, DIM>(p, fixed[0] + first * STRIDE, stream[0], dim);
            rows_product<T, STRIDE, DIM>(ds, fixed[1] + first * STRIDE, stream[1], dim);
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int own = first + g + 8 * (i / 2), other = 8 * n + 2 * t + i % 2;
                    const int row = KEYS ? other : own, key = KEYS ? begin + own : from + other;
                    float score = p[n][i] * in.scale, slope = 1.f;
                    if (in.cap > 0.f) {
                        const float bent = tanhf(score / in.cap);
                        score = in.cap * bent;
                        slope = 1.f - bent * bent;
                    }
                    bool seen = own < count && other < some;
                    if (seen) {
                        const int distance = query[row] - key + offset;
                        seen = distance < in.window && (!in.causal || distance >= 0);
                    }
                    p[n][i] = seen ? exp2f((score - lse[row]) * 1.44269504f) : 0.f;
                    ds[n][i] = seen ? p[n][i] * (ds[n][i] - dots[row]) * slope : 0.f;
                }
            }
            if constexpr (SUMS > 1) sum_product<T, STRIDE>(sums[1], p, stream[1] + column, dim - column, room);
            sum_product<T, STRIDE>(sums[0], ds, stream[0] + column, dim - column, room);
        }
    }
}

// Calls f(row, column, value) for the elements of a sum that this thread has.
template <typename T, int DIM, bool KEYS, typename F>
__device__ __forceinline__ void each(const float (&sum)[Tiles<T, DIM, KEYS>::PAIRS][2][4], float scale, int rows, int dim, F f) {
    using Shape = Tiles<T, DIM, KEYS>;
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) / 4, t = threadIdx.x % 4;
    const int first = warp / Shape::COLUMN_WARPS * 16 + g, column = warp % Shape::COLUMN_WARPS * Shape::COLUMNS + 4 * t;
#pragma unroll
    for (int p = 0; p < Shape::PAIRS; p++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = first + 8 * (i / 4), at = column + 16 * p + i % 4;
            if (row < rows && at < dim) f(row, at, sum[p][i % 2][2 * (i / 4) + i % 4 / 2] * scale);
        }
    }
}

// Where dK and dV of a row go: f32 for rows of prefixes, T for others.
template <typename T> struct KeyGradients {
    float *prefix_k, *prefix_v;  // [prefix_rows, kv_heads, dim]
    T *own_k, *own_v;            // rows of `stride` elements from row `prefix_rows` on
    int prefix_rows, stride;

    __device__ __forceinline__ void put(int which, int row, int kv_heads, int head, int dim, int column, float value) const {
        if (row < prefix_rows) {
            (which ? prefix_v : prefix_k)[((size_t)row * kv_heads + head) * dim + column] = value;
        } else {
            (which ? own_v : own_k)[(size_t)(row - prefix_rows) * stride + head * dim + column] = From<T>::f32(value);
        }
    }
};

// item[4]: its part of `partial` [parts, kv_heads, 2, FIXED, dim] if its tile is in parts, else -1.
template <typename T, int DIM>
__device__ __forceinline__ void backward_keys(const Input<T>& in, const int* __restrict__ items, const int* __restrict__ runs,
                                              const KeyGradients<T>& out, float* __restrict__ partial) {
    using Shape = Tiles<T, DIM, true>;
    const int* item = items + 5 * blockIdx.x;
    float sums[2][Shape::PAIRS][2][4] = {};
    tile_sums<T, DIM, true>(in, item, runs, sums);
    const int begin = item[0], rows = item[1] - begin, part = item[4], head = blockIdx.y;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        float* room = part < 0 ? nullptr : partial + ((size_t)(part * in.kv_heads + head) * 2 + which) * Shape::FIXED * in.dim;
        each<T, DIM, true>(sums[which], which ? 1.f : in.scale, rows, in.dim, [&](int row, int column, float value) {
            if (part < 0) out.put(which, begin + row, in.kv_heads, head, in.dim, column, value);
            else room[row * in.dim + column] = value;
        });
    }
}

template <typename T, int DIM>
__device__ __forceinline__ void backward_queries(const Input<T>& in, const int* __restrict__ items, const int* __restrict__ runs,
                                                 T* __restrict__ dq, int dq_stride) {
    using Shape = Tiles<T, DIM, false>;
    const int* item = items + 5 * blockIdx.x;
    float sums[1][Shape::PAIRS][2][4] = {};
    tile_sums<T, DIM, false>(in, item, runs, sums);
    const unsigned begin = item[0], group = in.heads / in.kv_heads, head = blockIdx.y;
    each<T, DIM, false>(sums[0], in.scale, item[1] - item[0], in.dim, [&](int row, int column, float value) {
        const unsigned entry = begin + row;
        dq[(size_t)(entry / group) * dq_stride + (head * group + entry % group) * in.dim + column] = From<T>::f32(value);
    });
}

// Adds the parts of tiles: tiles [n] of {first row, last row, first part, last part}. Grid: (n, kv_heads), 256 threads.
template <typename T>
__device__ __forceinline__ void backward_sum(const int* __restrict__ tiles, const float* __restrict__ partial, const KeyGradients<T>& out,
                                             int kv_heads, int dim, int fixed) {
    const int* tile = tiles + 4 * blockIdx.x;
    const int head = blockIdx.y, size = fixed * dim;
    for (int i = threadIdx.x; i < 2 * (tile[1] - tile[0]) * dim; i += blockDim.x) {
        const int which = i & 1, at = i >> 1;
        float sum = 0.f;
        for (int part = tile[2]; part < tile[3]; part++) sum += partial[((size_t)(part * kv_heads + head) * 2 + which) * size + at];
        out.put(which, tile[0] + at / dim, kv_heads, head, dim, at % dim, sum);
    }
}

// A warp for each (row, head), 4 a block.
template <typename T>
__device__ __forceinline__ void backward_dots(const T* __restrict__ out, const T* __restrict__ grad, float* __restrict__ dots, int count, int heads,
                                              int dim, int out_stride, int grad_stride) {
    const int i = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (i >= count) return;
    const T* o = out + (size_t)(i / heads) * out_stride + i % heads * dim;
    const T* g = grad + (size_t)(i / heads) * grad_stride + i % heads * dim;
    float sum = 0.f;
    for (int d = threadIdx.x & 31; d < dim; d += 32) sum += to_float(o[d]) * to_float(g[d]);
    sum = warp_reduce(sum, SumOp());
    if ((threadIdx.x & 31) == 0) dots[i] = sum;
}

#define KERNELS(SUFFIX, T, DIM)                                                                                                           \
    extern "C" __global__ void __launch_bounds__((Tiles<T, DIM, true>::THREADS), 1) prefix_attention_backward_keys_##DIM##_##SUFFIX(                       \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* dots, const int* items, const int* runs,        \
        float* prefix_k, float* prefix_v, T* own_k, T* own_v, float* partial, int heads, int kv_heads, int dim, int q_stride,            \
        int grad_stride, int prefix_rows, int own_stride, int causal, int window, float scale, float cap) {                              \
        const Input<T> in = {q, k, v, grad, lse, dots, heads, kv_heads, dim, q_stride, grad_stride, causal, window, scale, cap};          \
        backward_keys<T, DIM>(in, items, runs, {prefix_k, prefix_v, own_k, own_v, prefix_rows, own_stride}, partial);                     \
    }                                                                                                                                     \
    EXPORT(prefix_attention_backward_keys_##DIM##_##SUFFIX)                                                                               \
    extern "C" __global__ void __launch_bounds__((Tiles<T, DIM, false>::THREADS), 1) prefix_attention_backward_queries_##DIM##_##SUFFIX(                   \
        const T* q, const T* k, const T* v, const T* grad, const float* lse, const float* dots, const int* items, const int* runs, T* dq, \
        int heads, int kv_heads, int dim, int q_stride, int grad_stride, int dq_stride, int causal, int window, float scale, float cap) { \
        const Input<T> in = {q, k, v, grad, lse, dots, heads, kv_heads, dim, q_stride, grad_stride, causal, window, scale, cap};          \
        backward_queries<T, DIM>(in, items, runs, dq, dq_stride);                                                                         \
    }                                                                                                                                     \
    EXPORT(prefix_attention_backward_queries_##DIM##_##SUFFIX)

#define KERNEL(SUFFIX, T)                                                                                                                \
    KERNELS(SUFFIX, T, 64)                                                                                                                \
    KERNELS(SUFFIX, T, 128)                                                                                                               \
    KERNELS(SUFFIX, T, 256)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) prefix_attention_backward_sum_##SUFFIX(                                             \
        const int* tiles, const float* partial, float* prefix_k, float* prefix_v, T* own_k, T* own_v, int kv_heads, int dim, int fixed,    \
        int prefix_rows, int own_stride) {                                                                                               \
        backward_sum<T>(tiles, partial, {prefix_k, prefix_v, own_k, own_v, prefix_rows, own_stride}, kv_heads, dim, fixed);               \
    }                                                                                                                                     \
    EXPORT(prefix_attention_backward_sum_##SUFFIX)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) prefix_attention_backward_dots_##SUFFIX(                                            \
        const T* out, const T* grad, float* dots, int count, int heads, int dim, int out_stride, int grad_stride) {                      \
        backward_dots<T>(out, grad, dots, count, heads, dim, out_stride, grad_stride);                                                    \
    }                                                                                                                                     \
    EXPORT(prefix_attention_backward_dots_##SUFFIX)
FOR_TYPES(KERNEL)
