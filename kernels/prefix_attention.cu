// prefix_attention: paged attention of a ragged batch over shared prefixes and own rows.
//
//   o = sum_j softmax_j(cap(q . k_j * scale)) v_j over the slots that a row sees: [lo, hi) of its prefix and [lo, hi) of its own part,
//   which the host works out (causal or not, window). cap(s) = c tanh(s / c), or s. Scores are kept in units of log2(e): 2^x is what the
//   hardware has.
//
// Fixed splits. Keys are cut at the prefix's end and at every 256 slots of either part (a span). In a span warp w takes the slots
// [64 w, 64 w + 64), in pages of 16, with a running maximum: (m, l, o) = (maximum, sum of 2^(s - m), sum of 2^(s - m) v) in f32. The four
// quarters are merged in their order, then spans in theirs, both by
//   m' = max(m_a, m_b), w = 2^(m - m'), l' = l_a w_a + l_b w_b, o' = o_a w_a + o_b w_b, and what saw nothing is skipped.
// Every product that meets a sum is an explicit fmaf, so no compiler contracts one variant otherwise than another. Thus a query's bits
// depend on its own keys alone: not on what shares its tile, nor on who merges.
//
// Layout: q [rows, q_stride] T, head h of a row at h * dim; keys, values [slots, kv_heads, dim] T; out [rows, heads * dim] T; lse
// [rows, heads] f32 (natural logarithm) or null; part_o [partials, heads, dim] f32, part_ml [partials, heads, 2] f32. A table entry is the
// first slot of a run of 16: page * 16 in the pool, any row in packed rows. Memory of slots that no row of a unit sees is not read.
//
// Work list (`plan`, made by src/ops/prefix_attention/device/plan.rs). A unit is up to 16 R query vectors (a vector: a row and a head of
// the KV head's group) and a run of spans. A whole unit folds all spans of its rows and writes `out`; a split unit writes (m, l, o) of
// each span, and `prefix_attention_combine` folds those of a row. Rows of sequences with the same prefix share the units of its spans.
// The list has more units, and rows to combine, than there are: those of no rows, and of no parts, are nothing. So steps of one shape have
// one grid and one layout of the list, and a recorded launch serves them all.
//
// Grid: (units, kv_heads), 128 threads. Combine: (rows, ceil(heads / 4)), a warp a head.
//
// Tensor cores (bf16, f16): D is dim, zero-filled to 32, 64, 96, 128 or 256, and R row tiles of 16 (R D <= 256: 128 accumulators a
// thread; a variant with R = 1 for steps where no unit has more leaves room for more blocks).
//   K: lane (g, t) loads dims 8t.. of every 32 of keys g and g + 8: 16 bytes, four lanes 64 together, and that is the B operand of two
//      steps of k. The order of dims differs from the one in memory, which a dot product does not mind as Q has the same.
//   Q: in shared memory as A operands.
//   V: lane (g, t) loads dims 8g.. of every 64 of keys 2t, 2t + 1, 2t + 8, 2t + 9; pairs of halves are the B operands of 8 tiles, column g
//      of tile j is dim 8g + j. The last 32 of a D that is no multiple of 64: dims 4g.., 4 tiles.
//   P becomes T and is the A operand of the second product as it stands.
// f32: the same splits without tensor cores, slow, for checking.
//
// Shared memory (bytes): 32 R D for Q; 2048 C for quarters on their way (C = min(16, R D / 8) fragments a pass); 64 R D for what is
// merged; 1600 R of row state. R D = 256: 62.3 KiB at R = 4, 59.1 KiB at R = 2, 57.6 KiB at
// R = 1; 64 x 1: 23.6 KiB; 128 x 1: 45.6 KiB.
//
// spills: the attention kernels none; combine 8 bytes on sm_90a, where ptxas keeps to 32 registers for occupancy. It is bound by memory.
//
// Roofline. A unit of n vectors and s slots reads 4 s dim bytes of K and V for 4 n s dim flops: n flops a byte. Decode (n = 1..16) is
// bound by memory, whatever the tile wastes; n = 64 needs 64 * 3.35e12 = 2.1e14 flops/s to keep up with an H100's memory, of its 9.9e14.
// A split costs 8 dim bytes a vector and span, written and read, against 1024 dim a span: 0.8 % for each vector of a unit.
#include "mma.cuh"

constexpr int PAGE = 16, SPAN = 256, WARPS = 4, QUARTER = SPAN / WARPS, THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Parts of the keys: 0 the prefix, 1 own rows.
struct Unit {
    int rows, count;   // its rows, of the list of rows
    int head, heads;   // its query heads within the group of a KV head
    int from, to;      // its spans; those of the prefix come first
    int prefix_spans;  // so many
    int table[2];      // entries of the part's first page
    int lo[2], hi[2];  // slots that any row sees
    int all_lo[2], all_hi[2];  // slots that all rows see
    int split;
};
struct Row {
    int row;
    int lo[2], hi[2];
    int partial;  // where its span 0 would be
};
struct CombineRow {
    int row, partial, count;
};

struct Args {
    const int* plan;
    int units, rows, tables;  // where they start in `plan`
    int q_stride, heads, kv_heads, dim;
    float scale, cap;
    float *lse, *part_o;
    float2* part_ml;

    __device__ const Unit& unit() const { return reinterpret_cast<const Unit*>(plan + units)[blockIdx.x]; }
    __device__ const Row* row(const Unit& u) const { return reinterpret_cast<const Row*>(plan + rows) + u.rows; }
    // Head `v` of the unit's, counted over its rows, as a head of the model.
    __device__ int head(const Unit& u, int v) const { return blockIdx.y * (heads / kv_heads) + u.head + v % u.heads; }

    __device__ __forceinline__ float score(float product) const {
        const float s = product * scale;
        // Rounded here: fused with what it is subtracted from, a score's bits would depend on the code around it.
        return __fmul_rn(cap > 0.f ? cap * tanhf(s / cap) : s, LOG2E);
    }
};

__device__ __forceinline__ float exp2_fast(float x) {
#ifndef KERNELS_ON_CPU
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return exp2f(x);
#endif
}

// What a row has: x the maximum, y the sum. A sum of 0: it saw nothing.
__device__ __forceinline__ float2 nothing() { return float2{-INFINITY, 0.f}; }

// Adds b to a. Returns the weights of what they had.
__device__ __forceinline__ float2 merge(float2& a, float2 b) {
    if (b.y == 0.f) return float2{1.f, 0.f};
    if (a.y == 0.f) {
        a = b;
        return float2{0.f, 1.f};
    }
    const float m = fmaxf(a.x, b.x), base = m == -INFINITY ? 0.f : m;
    const float2 w = {exp2_fast(a.x - base), exp2_fast(b.x - base)};
    a = float2{m, fmaf(b.y, w.y, a.y * w.x)};
    return w;
}
// The same for an element of o. What has the weight 0 may be anything.
__device__ __forceinline__ float merge(float a, float b, float2 w) {
    return w.y == 0.f ? a * w.x : w.x == 0.f ? b * w.y : fmaf(b, w.y, a * w.x);
}

// The merges of one span for one row: w[0..4] of its quarters, w[4] of the span into what the row has.
__device__ __forceinline__ void merge_span(const float2* quarters, int stride, float2& state, float2* w) {
    float2 span = nothing();
#pragma unroll
    for (int i = 0; i < WARPS; i++) w[i * stride] = merge(span, quarters[i * stride]);
    w[WARPS * stride] = merge(state, span);
}

struct Span {
    int part, start;
    __device__ Span(const Unit& u, int index) : part(index >= u.prefix_spans), start((index - (part ? u.prefix_spans : 0)) * SPAN) {}
};

__device__ __forceinline__ uint4 load16(const void* p, bool there) {
    return there ? *reinterpret_cast<const uint4*>(p) : uint4{0u, 0u, 0u, 0u};
}
__device__ __forceinline__ uint2 load8(const void* p, bool there) {
    return there ? *reinterpret_cast<const uint2*>(p) : uint2{0u, 0u};
}

template <typename T, int D, int R> struct Tiles {
    static constexpr int STEPS = D / 32, NT = D / 8, F = R * NT, C = F < 16 ? F : 16, SHARE = C / WARPS, V = 16 * R;
    static_assert(D % 32 == 0 && C % WARPS == 0 && F % C % WARPS == 0 && NT % SHARE == 0, "a warp's fragments of a pass are of one tile");

    const Args& a;
    const Unit& u;
    uint4* q;        // [R, STEPS, 2, 32]
    float4* stage;   // [WARPS, C, 32]
    float4* acc;     // [F, 32]
    float2* ml;      // [WARPS, V]
    float2* weight;  // [WARPS + 1, V]
    float2* state;   // [V]
    uint2* seen;     // [2, V]: first slot, number
    int n, tiles, warp, lane, g, t;

    __device__ __forceinline__ Tiles(const Args& args, const Unit& unit, unsigned char* shared) : a(args), u(unit) {
        q = reinterpret_cast<uint4*>(shared);
        stage = reinterpret_cast<float4*>(q + R * STEPS * 2 * 32);
        acc = stage + WARPS * C * 32;
        ml = reinterpret_cast<float2*>(acc + F * 32);
        weight = ml + WARPS * V;
        state = weight + (WARPS + 1) * V;
        seen = reinterpret_cast<uint2*>(state + V);
        n = u.count * u.heads;
        tiles = (n + 15) / 16;
        warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    }

    __device__ __forceinline__ uint4 load_query(const T* from, int v, int d) const {
        const bool there = v < n && d < a.dim;
        const int row = there ? a.row(u)[v / u.heads].row : 0;
        return load16(from + (size_t)row * a.q_stride + (there ? a.head(u, v) * a.dim + d : 0), there);
    }

    __device__ __forceinline__ void begin(const T* from) {
        for (int i = threadIdx.x; i < V; i += THREADS) {
            state[i] = nothing();
            for (int part = 0; part < 2; part++) {
                uint2 s = {0u, 0u};
                if (i < n) {
                    const Row& r = a.row(u)[i / u.heads];
                    s = uint2{(unsigned)r.lo[part], (unsigned)max(r.hi[part] - r.lo[part], 0)};
                }
                seen[part * V + i] = s;
            }
        }
        for (int i = threadIdx.x; i < tiles * STEPS * 32; i += THREADS) {
            const int l = i & 31, step = i / 32 % STEPS, v = i / 32 / STEPS * 16 + (l >> 2), d = step * 32 + (l & 3) * 8;
            const uint4 x = load_query(from, v, d), y = load_query(from, v + 8, d);
            uint4* to = q + (i >> 5) * 64 + l;
            to[0] = uint4{x.x, y.x, x.y, y.y};
            to[32] = uint4{x.z, y.z, x.w, y.w};
        }
        __syncthreads();
    }

    struct Quarter {
        float o[R][NT][4], m[R][2], l[R][2];
    };

    // Slots [lo, hi) of the part, all in this warp's quarter of the span.
    __device__ __forceinline__ void attend(Quarter& x, const T* keys, const T* values, const Span& span, int lo, int hi) {
        const int first = lo / PAGE, last = (hi - 1) / PAGE;
        const int entries = first + lane <= last ? a.plan[a.tables + u.table[span.part] + first + lane] : 0;
        const size_t stride = (size_t)a.kv_heads * a.dim;
        const int all_lo = u.all_lo[span.part], all_hi = u.all_hi[span.part];
#pragma unroll 1
        for (int page = first; page <= last; page++) {
            const int entry = __shfl_sync(FULL_WARP, entries, page - first), slot = page * PAGE;
            const size_t at = (size_t)entry * stride + (size_t)blockIdx.y * a.dim;
            float s[R][2][4] = {};
            {
                const bool there[2] = {slot + g >= lo && slot + g < hi, slot + g + 8 >= lo && slot + g + 8 < hi};
                const T* k = keys + at + g * stride + t * 8;
                uint4 b[STEPS][2];
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int i = 0; i < 2; i++) b[step][i] = load16(k + i * 8 * stride + step * 32, there[i] && step * 32 + t * 8 < a.dim);
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        if (R > 1 && r >= tiles) continue;
                        const uint4* p = q + (r * STEPS + step) * 64 + lane;
                        const uint4 x0 = p[0], x1 = p[32];
                        const unsigned a0[4] = {x0.x, x0.y, x0.z, x0.w}, a1[4] = {x1.x, x1.y, x1.z, x1.w};
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const unsigned b0[2] = {b[step][i].x, b[step][i].y}, b1[2] = {b[step][i].z, b[step][i].w};
                            mma_m16n8k16<T>(s[r][i], a0, b0);
                            mma_m16n8k16<T>(s[r][i], a1, b1);
                        }
                    }
            }
            const bool masked = slot < all_lo || slot + PAGE > all_hi;
            unsigned p[R][4];
#pragma unroll
            for (int r = 0; r < R; r++)
                if (R == 1 || r < tiles) softmax(x, r, s[r], p[r], span.part, slot, masked);
            const int key[4] = {2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9};
            bool there[4];
#pragma unroll
            for (int i = 0; i < 4; i++) there[i] = slot + key[i] >= lo && slot + key[i] < hi;
#pragma unroll
            for (int c = 0; c < D / 64; c++) {
                const int d = c * 64 + g * 8;
                uint4 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = load16(values + at + key[i] * stride + d, there[i] && d < a.dim);
                weigh(x, p, c * 8, v[0].x, v[1].x, v[2].x, v[3].x);
                weigh(x, p, c * 8 + 2, v[0].y, v[1].y, v[2].y, v[3].y);
                weigh(x, p, c * 8 + 4, v[0].z, v[1].z, v[2].z, v[3].z);
                weigh(x, p, c * 8 + 6, v[0].w, v[1].w, v[2].w, v[3].w);
            }
            if (D % 64) {
                const int d = D / 64 * 64 + g * 4;
                uint2 v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = load8(values + at + key[i] * stride + d, there[i] && d < a.dim);
                weigh(x, p, D / 64 * 8, v[0].x, v[1].x, v[2].x, v[3].x);
                weigh(x, p, D / 64 * 8 + 2, v[0].y, v[1].y, v[2].y, v[3].y);
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                x.l[r][h] += __shfl_xor_sync(FULL_WARP, x.l[r][h], 1);
                x.l[r][h] += __shfl_xor_sync(FULL_WARP, x.l[r][h], 2);
            }
    }

    // Scores of one page become weights p, relative to the maximum so far.
    __device__ __forceinline__ void softmax(Quarter& x, int r, float (&s)[2][4], unsigned (&p)[4], int part, int slot, bool masked) {
        bool moved = false;
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = x.m[r][h];
            uint2 range = {0u, ~0u};
            if (masked) range = seen[part * V + r * 16 + h * 8 + g];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& e = s[i / 2][h * 2 + i % 2];
                // By choice, not by sum: what is not seen may be NaN.
                e = (unsigned)(slot + i / 2 * 8 + 2 * t + i % 2) - range.x < range.y ? a.score(e) : -INFINITY;
                most = fmaxf(most, e);
            }
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            const float base = most == -INFINITY ? 0.f : most;
            factor[h] = exp2_fast(x.m[r][h] - base);
            moved |= x.m[r][h] != most;
            x.m[r][h] = most;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& e = s[i / 2][h * 2 + i % 2];
                e = exp2_fast(e - base);
                sum += e;
            }
            x.l[r][h] = fmaf(x.l[r][h], factor[h], sum);
        }
        p[0] = pack2<T>(s[0][0], s[0][1]);
        p[1] = pack2<T>(s[0][2], s[0][3]);
        p[2] = pack2<T>(s[1][0], s[1][1]);
        p[3] = pack2<T>(s[1][2], s[1][3]);
        // A factor of 1 changes no bit, so other rows of the tile do not matter.
        if (!__any_sync(FULL_WARP, moved)) return;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) x.o[r][j][i] *= factor[i / 2];
    }

    // Tiles j and j + 1: two dims of four keys.
    __device__ __forceinline__ void weigh(Quarter& x, const unsigned (&p)[R][4], int j, unsigned v0, unsigned v1, unsigned v2, unsigned v3) {
        const unsigned low[2] = {low_halves(v0, v1), low_halves(v2, v3)}, high[2] = {high_halves(v0, v1), high_halves(v2, v3)};
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (R > 1 && r >= tiles) continue;
            mma_m16n8k16<T>(x.o[r][j], p[r], low);
            mma_m16n8k16<T>(x.o[r][j + 1], p[r], high);
        }
    }

    // The quarters of a span into `state` and `acc`, a pass of C fragments at a time.
    __device__ __forceinline__ void merge_quarters(const Quarter& x, bool any) {
        if (t == 0)
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int h = 0; h < 2; h++) ml[warp * V + r * 16 + h * 8 + g] = any ? float2{x.m[r][h], x.l[r][h]} : nothing();
#pragma unroll
        for (int base = 0; base < F; base += C) {
            if (base >= tiles * NT) break;
#pragma unroll
            for (int i = 0; i < C; i++) {
                const int f = base + i;
                if (f < F && any && f < tiles * NT) {
                    const float(&o)[4] = x.o[f / NT][f % NT];
                    stage[(warp * C + i) * 32 + lane] = float4{o[0], o[1], o[2], o[3]};
                }
            }
            __syncthreads();
            if (base == 0) {
                for (int v = threadIdx.x; v < tiles * 16; v += THREADS) {
                    float2 s = u.split ? nothing() : state[v];
                    merge_span(ml + v, V, s, weight + v);
                    state[v] = s;
                }
                __syncthreads();
            }
            const int mine = base + warp * SHARE;
            if (mine < tiles * NT) {
                float2 w[2][WARPS + 1];
#pragma unroll
                for (int i = 0; i <= WARPS; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) w[h][i] = weight[i * V + mine / NT * 16 + h * 8 + g];
#pragma unroll
                for (int k = 0; k < SHARE; k++) {
                    float4 o = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int i = 0; i < WARPS; i++) o = merge4(o, stage[(i * C + warp * SHARE + k) * 32 + lane], w[0][i], w[1][i]);
                    float4& to = acc[(mine + k) * 32 + lane];
                    to = merge4(to, o, w[0][WARPS], w[1][WARPS]);
                }
            }
            __syncthreads();
        }
    }
    static __device__ __forceinline__ float4 merge4(float4 a, float4 b, float2 up, float2 down) {
        return float4{merge(a.x, b.x, up), merge(a.y, b.y, up), merge(a.z, b.z, down), merge(a.w, b.w, down)};
    }

    // Element d of vector v: undoes the order of V's columns.
    __device__ __forceinline__ float merged(int v, int d) const {
        const int c = d / 64 * 64, x = d - c, width = c + 64 <= D ? 8 : 4, column = x / width;
        const int f = v / 16 * NT + c / 8 + x % width, l = v % 8 * 4 + column / 2;
        return reinterpret_cast<const float*>(acc + f * 32 + l)[v % 16 / 8 * 2 + column % 2];
    }

    __device__ __forceinline__ void write(T* out) const {
        for (int i = threadIdx.x; i < n * (a.dim / 8); i += THREADS) {
            const int v = i / (a.dim / 8), d = i % (a.dim / 8) * 8;
            const size_t at = (size_t)a.row(u)[v / u.heads].row * a.heads + a.head(u, v);
            const float2 s = state[v];
            const float factor = 1.f / s.y;
            Pack<T> y;
#pragma unroll
            for (int e = 0; e < 8; e++) y.v[e] = From<T>::f32(s.y == 0.f ? 0.f : merged(v, d + e) * factor);
            store_pack(out + at * a.dim + d, y);
            if (a.lse && d == 0) a.lse[at] = fmaf(s.x, LN2, logf(s.y));
        }
    }

    __device__ __forceinline__ void write_partial(int index, const Span& span) const {
        for (int i = threadIdx.x; i < n * (a.dim / 8); i += THREADS) {
            const int v = i / (a.dim / 8), d = i % (a.dim / 8) * 8;
            const Row& r = a.row(u)[v / u.heads];
            // The host gave no room where the row sees nothing.
            if (max(r.lo[span.part], span.start) >= min(r.hi[span.part], span.start + SPAN)) continue;
            const size_t at = (size_t)(r.partial + index) * a.heads + a.head(u, v);
            float4* to = reinterpret_cast<float4*>(a.part_o + at * a.dim + d);
            to[0] = float4{merged(v, d), merged(v, d + 1), merged(v, d + 2), merged(v, d + 3)};
            to[1] = float4{merged(v, d + 4), merged(v, d + 5), merged(v, d + 6), merged(v, d + 7)};
            if (d == 0) a.part_ml[at] = state[v];
        }
    }
};

template <typename T, int D, int R>
__device__ __forceinline__ void attend_tiles(const T* q, const T* keys, const T* values, T* out, const Args& a) {
    DYN_SHARED(unsigned char, shared);
    using Tiles = Tiles<T, D, R>;
    const Unit& u = a.unit();
    if (u.count == 0) return;
    Tiles x(a, u, shared);
    x.begin(q);
#pragma unroll 1
    for (int index = u.from; index < u.to; index++) {
        const Span span(u, index);
        const int start = span.start + x.warp * QUARTER;
        const int lo = max(u.lo[span.part], start), hi = min(u.hi[span.part], start + QUARTER);
        typename Tiles::Quarter quarter;
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int h = 0; h < 2; h++) quarter.m[r][h] = -INFINITY, quarter.l[r][h] = 0.f;
#pragma unroll
            for (int j = 0; j < Tiles::NT; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) quarter.o[r][j][i] = 0.f;
        }
        if (lo < hi) x.attend(quarter, keys, values, span, lo, hi);
        x.merge_quarters(quarter, lo < hi);
        if (u.split) x.write_partial(index, span);
    }
    if (!u.split) x.write(out);
}

// f32: a lane a key for the scores, a lane every 32nd dim for the sums. Shared memory: quarters [WARPS, dim], p [WARPS, 32], row state,
// and what is merged, [vectors, dim]. Any dim up to 256.
__device__ __forceinline__ void attend_f32(const float* q, const float* keys, const float* values, float* out, const Args& a) {
    constexpr int MAX_VECTORS = 64, MAX_DIM = 256;
    DYN_SHARED(float, stage);
    float* p = stage + WARPS * a.dim + (threadIdx.x >> 5) * 32;
    float* acc = stage + WARPS * a.dim + WARPS * 32;
    __shared__ float2 ml[WARPS], weight[WARPS + 1], state[MAX_VECTORS];
    const Unit& u = a.unit();
    if (u.count == 0) return;
    const int n = u.count * u.heads, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const size_t stride = (size_t)a.kv_heads * a.dim, head = (size_t)blockIdx.y * a.dim;
    for (int v = threadIdx.x; v < n; v += THREADS) state[v] = nothing();
    __syncthreads();
    for (int index = u.from; index < u.to; index++) {
        const Span span(u, index);
        const int* table = a.plan + a.tables + u.table[span.part];
        for (int v = 0; v < n; v++) {
            const Row& r = a.row(u)[v / u.heads];
            const float* query = q + (size_t)r.row * a.q_stride + a.head(u, v) * a.dim;
            const int start = span.start + warp * QUARTER, lo = max(r.lo[span.part], start), hi = min(r.hi[span.part], start + QUARTER);
            float2 mine = nothing();
            float o[MAX_DIM / 32] = {};
            for (int from = start; from < hi; from += 32) {
                const int slot = from + lane;
                float s = -INFINITY;
                if (slot >= lo && slot < hi) {
                    const float* k = keys + (table[slot / PAGE] + slot % PAGE) * stride + head;
                    float sum = 0.f;
                    for (int d = 0; d < a.dim; d++) sum = fmaf(query[d], k[d], sum);
                    s = a.score(sum);
                }
                const float most = fmaxf(mine.x, warp_reduce(s, MaxOp())), base = most == -INFINITY ? 0.f : most;
                const float factor = exp2_fast(mine.x - base), weight = exp2_fast(s - base);
                mine = float2{most, fmaf(mine.y, factor, warp_reduce(weight, SumOp()))};
                p[lane] = weight;
                __syncwarp();
#pragma unroll
                for (int i = 0; i < MAX_DIM / 32; i++) {
                    const int d = i * 32 + lane;
                    if (d >= a.dim) continue;
                    o[i] *= factor;
                    for (int key = max(lo, from); key < min(hi, from + 32); key++)
                        o[i] = fmaf(p[key - from], values[(table[key / PAGE] + key % PAGE) * stride + head + d], o[i]);
                }
                __syncwarp();
            }
            if (lane == 0) ml[warp] = mine;
#pragma unroll
            for (int i = 0; i < MAX_DIM / 32; i++)
                if (i * 32 + lane < a.dim) stage[warp * a.dim + i * 32 + lane] = o[i];
            __syncthreads();
            if (threadIdx.x == 0) {
                float2 s = u.split ? nothing() : state[v];
                merge_span(ml, 1, s, weight);
                state[v] = s;
            }
            __syncthreads();
            for (int d = threadIdx.x; d < a.dim; d += THREADS) {
                float x = 0.f;
                for (int i = 0; i < WARPS; i++) x = merge(x, stage[i * a.dim + d], weight[i]);
                float& to = acc[v * a.dim + d];
                to = merge(to, x, weight[WARPS]);
                if (u.split && max(r.lo[span.part], span.start) < min(r.hi[span.part], span.start + SPAN)) {
                    const size_t at = (size_t)(r.partial + index) * a.heads + a.head(u, v);
                    a.part_o[at * a.dim + d] = to;
                    if (d == 0) a.part_ml[at] = state[v];
                }
            }
            __syncthreads();
        }
    }
    for (int i = threadIdx.x; !u.split && i < n * a.dim; i += THREADS) {
        const int v = i / a.dim, d = i % a.dim;
        const size_t at = (size_t)a.row(u)[v / u.heads].row * a.heads + a.head(u, v);
        out[at * a.dim + d] = state[v].y == 0.f ? 0.f : acc[i] * (1.f / state[v].y);
        if (a.lse && d == 0) a.lse[at] = fmaf(state[v].x, LN2, logf(state[v].y));
    }
}

// Folds the spans of a row, in their order. `a.rows` is where the rows to combine start.
template <typename T> __device__ __forceinline__ void combine(T* out, const Args& a) {
    const CombineRow r = reinterpret_cast<const CombineRow*>(a.plan + a.rows)[blockIdx.x];
    const int head = blockIdx.y * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (head >= a.heads || r.count == 0) return;
    float2 state = nothing();
    float o[8] = {};
    for (int k = 0; k < r.count; k++) {
        const size_t at = (size_t)(r.partial + k) * a.heads + head;
        const float2 w = merge(state, a.part_ml[at]);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i * 32 + lane < a.dim) o[i] = merge(o[i], a.part_o[at * a.dim + i * 32 + lane], w);
    }
    const size_t at = (size_t)r.row * a.heads + head;
    const float factor = 1.f / state.y;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i * 32 + lane < a.dim) out[at * a.dim + i * 32 + lane] = From<T>::f32(state.y == 0.f ? 0.f : o[i] * factor);
    if (a.lse && lane == 0) a.lse[at] = fmaf(state.x, LN2, logf(state.y));
}

#define PARAMETERS(T)                                                                                                              \
    const T *q, const T *keys, const T *values, T *out, float *lse, float *part_o, float2 *part_ml, const int *plan, int units, int rows, \
        int tables, int q_stride, int heads, int kv_heads, int dim, float scale, float cap
#define ARGS Args{plan, units, rows, tables, q_stride, heads, kv_heads, dim, scale, cap, lse, part_o, part_ml}
// BLOCKS: so many are to fit on a multiprocessor, by their registers.
#define VARIANT(SUFFIX, T, D, R, BLOCKS)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) prefix_attention_##D##x##R##_##SUFFIX(PARAMETERS(T)) { \
        const Args a = ARGS;                                                                                            \
        attend_tiles<T, D, R>(q, keys, values, out, a);                                                                 \
    }                                                                                                                   \
    EXPORT(prefix_attention_##D##x##R##_##SUFFIX)
#define VARIANTS(SUFFIX, T)        \
    VARIANT(SUFFIX, T, 32, 4, 2)   \
    VARIANT(SUFFIX, T, 64, 1, 4)   \
    VARIANT(SUFFIX, T, 64, 4, 2)   \
    VARIANT(SUFFIX, T, 96, 1, 3)   \
    VARIANT(SUFFIX, T, 96, 2, 2)   \
    VARIANT(SUFFIX, T, 128, 1, 3)  \
    VARIANT(SUFFIX, T, 128, 2, 2)  \
    VARIANT(SUFFIX, T, 256, 1, 2)
VARIANTS(bf16, __nv_bfloat16)
VARIANTS(f16, __half)
extern "C" __global__ void __launch_bounds__(THREADS, 2) prefix_attention_f32(PARAMETERS(float)) {
    const Args a = ARGS;
    attend_f32(q, keys, values, out, a);
}
EXPORT(prefix_attention_f32)
#define COMBINE(SUFFIX, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                           \
        prefix_attention_combine_##SUFFIX(T* out, float* lse, float* part_o, float2* part_ml, const int* plan, int rows, int heads, int dim) { \
        const Args a{plan, 0, rows, 0, 0, heads, 1, dim, 1.f, 0.f, lse, part_o, part_ml};                                           \
        combine<T>(out, a);                                                                                                         \
    }                                                                                                                               \
    EXPORT(prefix_attention_combine_##SUFFIX)
FOR_TYPES(COMBINE)
