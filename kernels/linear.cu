// linear, few rows: y = x W^T (+ bias) (+ residual) for m <= 16 rows, with W frozen. More rows are cuBLAS's.
//
// Layout: x [m, k], w [n, k], residual [m, n] of T, bias [n] f32 or null; y [m, n] of T (linear_rows), or of f32
// (linear_logits). Sums are f32; the bias, then the residual are added before the one rounding.
//
// W is read once, from row to register: no thread uses an element of it twice, so shared memory would not help. Loads are 16
// bytes wide where k and the addresses allow it; elsewhere the same elements come one by one, into the same sums.
// bf16 and f16: a warp multiplies all rows, padded to 16, with 8 `tiles` columns on tensor cores, for every m: a product with
// one row costs what W costs to read. Lane 4 g + t holds k = 8t..8t+7 of a block of 32 of row g and of column g. Two products
// of 16 take four of the eight each: which four k a register holds does not matter, as x and W are held alike. The 8 warps of
// a block take turns at blocks of 32 k, so that a small n still keeps all multiprocessors loading; their sums are added in
// the order of the warps.
// f32: a warp owns `tiles` columns, its lanes take turns at 4 k; sums of lanes are added in a tree.
// In both, a sum's order depends on k alone: a row has the same bits whatever m, the other rows and `tiles` are.
//
// Grid: ceil(n / (8 tiles)) blocks of 256 threads, `tiles` 1 or 4: 4 where that still makes enough blocks. Shared memory:
// 8 * 16 * (8 tiles + 8) * 4 bytes for bf16 and f16, none for f32.
// Roofline: reads 2 n k bytes (bf16) and computes 2 m n k <= 32 n k flops, padded to 32 n k: 16 a byte, where an H100 has 295
// (tensor cores, 990 TFLOP/s to 3.35 TB/s). Bound by memory: n = k = 4096 is 33.6 MB, 10 us at least. x comes from L2 once a
// block: m / (8 tiles) bytes for each of W, up to 0.5 with 4 tiles and 2 with 1, where n is small and W may be in L2 as well.
// f32 has 8 flops a byte at 16 rows, where the plain cores have 20.
#include "mma.cuh"

namespace {
constexpr int WARPS = 8, MOST = 16, BLOCK = 32;

// `at` and what follows of a row of k elements, 16 bytes; zeros past its end.
template <bool WIDE, typename T> __device__ __forceinline__ Pack<T> pack_at(const T* row, int at, int k) {
    Pack<T> r;
    if (WIDE && at < k) return load_pack(row + at);
#pragma unroll
    for (int i = 0; i < Pack<T>::N; i++) r.v[i] = !WIDE && at + i < k ? row[at + i] : From<T>::f32(0.f);
    return r;
}

// Sums that are not yet rounded, and where they go.
template <typename T, typename Y> struct Result {
    const float* bias;
    const T* residual;
    Y* y;
    int n;

    __device__ __forceinline__ void store(int row, int column, float sum) const {
        const size_t at = (size_t)row * n + column;
        if (bias) sum += bias[column];
        if (residual) sum += to_float(residual[at]);
        y[at] = From<Y>::f32(sum);
    }
};

// Registers of a pack: neighbours in k share one.
template <typename T> struct Registers {
    unsigned r[4];
    __device__ __forceinline__ Registers(const Pack<T>& pack) { memcpy(r, &pack, 16); }
};

template <int TILES, bool WIDE, typename T, typename Y>
__device__ __forceinline__ void rows_on_tensor_cores(const T* __restrict__ x, const T* __restrict__ w, const Result<T, Y>& result, int m, int k) {
    constexpr int COLUMNS = 8 * TILES, STRIDE = COLUMNS + 8, STEPS = TILES == 1 ? 4 : 2;  // steps: loads in flight
    DYN_SHARED(float, parts);  // [WARPS][MOST][STRIDE]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4, first = blockIdx.x * COLUMNS;
    float d[TILES][4] = {};
    for (int start = warp * BLOCK; start < k; start += STEPS * WARPS * BLOCK) {
        Pack<T> low[STEPS], high[STEPS], b[STEPS][TILES];
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int at = start + s * WARPS * BLOCK + 8 * t;
            // Past the end of W, of x and of k there are zeros.
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int column = first + 8 * i + g;
                b[s][i] = pack_at<WIDE>(w + (size_t)column * k, column < result.n ? at : k, k);
            }
            low[s] = pack_at<WIDE>(x + g * k, g < m ? at : k, k);
            high[s] = pack_at<WIDE>(x + (g + 8) * k, g + 8 < m ? at : k, k);
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            if (start + s * WARPS * BLOCK >= k) break;
            const Registers<T> up(low[s]), down(high[s]);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const Registers<T> c(b[s][i]);
#pragma unroll
                for (int half = 0; half < 4; half += 2)
                    mma_m16n8k16<T>(d[i], {up.r[half], down.r[half], up.r[half + 1], down.r[half + 1]}, {c.r[half], c.r[half + 1]});
            }
        }
    }
    float* own = parts + warp * MOST * STRIDE;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) own[(g + e / 2 * 8) * STRIDE + 8 * i + 2 * t + e % 2] = d[i][e];
    __syncthreads();
    for (int i = threadIdx.x; i < m * COLUMNS; i += WARPS * 32) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        if (first + column >= result.n) continue;
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < WARPS; p++) sum += parts[(p * MOST + row) * STRIDE + column];
        result.store(row, first + column, sum);
    }
}

template <int ROWS, int TILES, bool WIDE, typename T, typename Y>
__device__ __forceinline__ void rows_on_plain_cores(const T* __restrict__ x, const T* __restrict__ w, const Result<T, Y>& result, int m, int k) {
    constexpr int N = Pack<T>::N;
    const int lane = threadIdx.x & 31, first = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * TILES;
    float sums[ROWS][TILES] = {};
    for (int at = lane * N; at < k; at += 32 * N) {
        Pack<T> b[TILES];
#pragma unroll
        for (int c = 0; c < TILES; c++) b[c] = pack_at<WIDE>(w + (size_t)(first + c) * k, first + c < result.n ? at : k, k);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<T> a = pack_at<WIDE>(x + r * k, r < m ? at : k, k);
#pragma unroll
            for (int c = 0; c < TILES; c++)
#pragma unroll
                for (int i = 0; i < N; i++) sums[r][c] = fmaf(to_float(a.v[i]), to_float(b[c].v[i]), sums[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < TILES; c++) {
            const float sum = warp_reduce(sums[r][c], SumOp());
            if (lane == 0 && r < m && first + c < result.n) result.store(r, first + c, sum);
        }
}

template <int TILES, bool WIDE, typename T, typename Y>
__device__ __forceinline__ void rows_by(const T* x, const T* w, const Result<T, Y>& result, int m, int k) {
    if constexpr (sizeof(T) == 2) rows_on_tensor_cores<TILES, WIDE>(x, w, result, m, k);
    else if (m <= 4) rows_on_plain_cores<4, TILES, WIDE>(x, w, result, m, k);
    else rows_on_plain_cores<MOST, TILES, WIDE>(x, w, result, m, k);
}

template <typename T, typename Y>
__device__ __forceinline__ void rows(const T* x, const T* w, const float* bias, const T* residual, Y* y, int m, int n, int k, int tiles) {
    const Result<T, Y> result = {bias, residual, y, n};
    const bool wide = k % Pack<T>::N == 0 && ((size_t)x | (size_t)w) % 16 == 0;
    if (wide && tiles == 4) rows_by<4, true>(x, w, result, m, k);
    else if (wide) rows_by<1, true>(x, w, result, m, k);
    else if (tiles == 4) rows_by<4, false>(x, w, result, m, k);
    else rows_by<1, false>(x, w, result, m, k);
}
}  // namespace

#define KERNEL(SUFFIX, T)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        linear_rows_##SUFFIX(const T* x, const T* w, const float* bias, const T* residual, T* y, int m, int n, int k, int tiles) { \
        rows(x, w, bias, residual, y, m, n, k, tiles);                                                                       \
    }                                                                                                                        \
    EXPORT(linear_rows_##SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) linear_logits_##SUFFIX(const T* x, const T* w, const float* bias,      \
                                                                             const T* residual, float* y, int m, int n, int k, int tiles) { \
        rows(x, w, bias, residual, y, m, n, k, tiles);                                                                       \
    }                                                                                                                        \
    EXPORT(linear_logits_##SUFFIX)
FOR_TYPES(KERNEL)
