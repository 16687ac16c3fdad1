// sample: from a row of logits to a token; logprobs: from a row of logits to log-probabilities. No logits leave the device.
//
// The steps of `src/ops/sample.rs` and of the sampler, in their order: penalties and bans, temperature, top-k, top-p, min-p,
// one draw with a given u in [0, 1). A soft cap has been applied before. Logits are only read: the few tokens that a penalty
// or a ban changes are taken off with the value in memory and put on with their new one, at each pass.
//
// A token weighs w = exp((x - max) / temperature) in fixed point, 2^44 for the best, computed with integers: sums do not
// depend on the order of threads, and a token is the same on each device and in the emulation. Sorting is not needed. Every
// cut is a place in the order of descending logits, smaller ids first among equals, and every place is found by its count or
// by its mass: with logits as integers of the same order, a histogram over 11 bits says in which bin the place is, one over
// the next 11 bits of this bin's tokens where in it, one over the last 10 which logit; two histograms over ids, which of
// the tokens with this logit. Top-k is the place of the count k; top-p and min-p only shorten the mass from which is drawn.
//
// Against the CPU's f64: a weight is off by less than 2^-44.9 of the best token's, so with n candidates the token can only
// differ where the edge of a token's share, or a cut, lies within n * 2^-44.9 of the target (in weights; the sum is >= 1).
// NaN counts as -inf, the temperature included as 0; without a token of positive weight the choice is the greedy one.
//
// Layout: logits [rows, vocab] of T, vocab <= 2^19; one Choice or Wanted a block, each names its row. changes: (id, count in
// the output, or BANNED), those of a choice sorted by id, each id < vocab once; the token of place `pending` of `before`, which the host
// has not read yet, counts once more. out [wanted, 1 + 2 width]: the bits of the
// token's log-probability, then the ids of the `top` <= width best and then their log-probabilities' bits, best first.
// Grid: a block of 1024 threads a choice. Shared memory: 32 KiB, two histograms of 2048 bins of 64 bits.
// Roofline: greedy reads the row once. A draw reads it 4 to 9 times (a row of 152k f32 is 0.6 MB, which L2 holds after the
// first) and computes the weight of each candidate once or twice, some 90 integer instructions: 152k of them are about 0.2 M
// cycles of one multiprocessor, the larger part. With top-k only the k best are weighed. Registers: 32 to 48 of 64.
#include "common.cuh"

namespace {
typedef unsigned long long u64;

constexpr int THREADS = 1024, BINS = 2 * THREADS, MAX_TOP = 20;
constexpr unsigned BANNED = 0xffffffffu;
constexpr u64 BEST = 1ull << 44;

// One token to choose. The same in `src/ops/sample/device.rs`.
struct Choice {
    double u;
    unsigned row;
    float temperature;  // 0: greedy
    unsigned top_k;     // 0 keeps all
    float top_p;        // 1 keeps all
    float min_p;        // 0 keeps all
    float repetition, presence, frequency;
    unsigned begin, end;  // of its changes
    unsigned pending;     // place in `before` of a token that was seen once more than the changes say; BANNED: none
    unsigned unused;
};

// Log-probabilities to compute: of `token`, or of what choice `from` chose; and of the `top` best.
struct Wanted {
    unsigned row, token, from, top;
};

struct Change {
    unsigned id, count;
};

// Integers in the order of f32's total order; NaN as -inf.
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = x == x ? __float_as_uint(x) : 0xff800000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// exp((x - max) / temperature) * 2^44, rounded. 2^-f for f in [0, 1) is a polynomial (Chebyshev nodes, off by 2^-50.5).
__device__ __forceinline__ u64 weight(float x, float max, float temperature) {
    const float a = __fdiv_rn(__fsub_rn(max, x), temperature);
    if (!(a >= 0.f && a < 31.5f)) return 0;  // NaN too; e^-31.5 is less than half of 2^-44
    const u64 y = __umul64hi((u64)(a * 288230376151711744.f), 0xb8aa3b295c17f0bcull);  // a 2^58 * log2(e) 2^63 / 2^64
    const u64 f = y << 7;                                                              // y has 57 bits of fraction, f 64
    u64 p = 0xb15e2b6e1ull;
    p = 0xd267768832ull - __umul64hi(f, p);
    p = 0xb0ca7ec1ad4ull - __umul64hi(f, p);
    p = 0x7fec74d822c0ull - __umul64hi(f, p);
    p = 0x50c2172b0746dull - __umul64hi(f, p);
    p = 0x2bb0ff0d130678ull - __umul64hi(f, p);
    p = 0x13b2ab6ddee1b27ull - __umul64hi(f, p);
    p = 0x71ac235bed794a5ull - __umul64hi(f, p);
    p = 0x1ebfbdff82b3a054ull - __umul64hi(f, p);
    p = 0x58b90bfbe8e7a5e4ull - __umul64hi(f, p);
    p = 0x8000000000000000ull - __umul64hi(f, p);
    return ((p >> (18 + (unsigned)(y >> 57))) + 1) >> 1;
}

template <typename T> struct Row {
    const T* logits;
    int vocab;
    const Change* changes;
    int count;
    float repetition, presence, frequency;
    unsigned pending;  // a token that was seen once more; BANNED: none

    // No fused multiply and add: the CPU rounds twice.
    __device__ __forceinline__ float changed(float x, unsigned count) const {
        if (count == BANNED) return __uint_as_float(0xff800000u);
        x = x > 0.f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
        return count ? __fsub_rn(x, __fadd_rn(presence, __fmul_rn(frequency, (float)count))) : x;
    }
    __device__ __forceinline__ bool is_listed(unsigned id) const {
        int low = 0, high = count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (changes[middle].id < id) low = middle + 1;
            else high = middle;
        }
        return low < count && changes[low].id == id;
    }
    __device__ __forceinline__ bool is_changed(unsigned id) const { return id == pending || is_listed(id); }
};

// What a visited value stands for: as in memory, whether changed or not; the same of a changed token, to take off; its new one.
enum Visit { STORED, OFF, ON };
// Added to a sum of 64 bits, this many times.
__device__ __forceinline__ u64 signed_by(Visit visit, u64 v) { return visit == OFF ? 0 - v : v; }

// f(x, id, visit) for the tokens begin..end, by all threads of a block.
template <typename T, typename F> __device__ __forceinline__ void visit(const Row<T>& row, int begin, int end, F f) {
    constexpr int N = 4;  // loads in flight
    for (int i = begin + threadIdx.x; i < end; i += N * THREADS) {
        T v[N];
#pragma unroll
        for (int u = 0; u < N; u++)
            if (i + u * THREADS < end) v[u] = row.logits[i + u * THREADS];
#pragma unroll
        for (int u = 0; u < N; u++)
            if (i + u * THREADS < end) f(to_float(v[u]), i + u * THREADS, STORED);
    }
    for (int c = threadIdx.x; c < row.count; c += THREADS) {
        const Change change = row.changes[c];
        if ((int)change.id < begin || (int)change.id >= end) continue;
        const float x = to_float(row.logits[change.id]);
        f(x, change.id, OFF);
        f(row.changed(x, change.count + (change.id == row.pending && change.count != BANNED)), change.id, ON);
    }
    if (threadIdx.x == 0 && row.pending != BANNED && (int)row.pending >= begin && (int)row.pending < end && !row.is_listed(row.pending)) {
        const float x = to_float(row.logits[row.pending]);
        f(x, row.pending, OFF);
        f(row.changed(x, 1), row.pending, ON);
    }
}

template <typename Op> __device__ __forceinline__ u64 block_reduce_u64(u64 v, Op op) {
    __shared__ u64 parts[32];
    for (int m = 16; m > 0; m >>= 1) v = op(v, __shfl_xor_sync(FULL_WARP, v, m));
    __syncthreads();  // `parts` may still be read by an earlier call
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    v = parts[threadIdx.x & 31];
    for (int m = 16; m > 0; m >>= 1) v = op(v, __shfl_xor_sync(FULL_WARP, v, m));
    return v;
}
struct Larger {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};
struct Plus {
    __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a + b; }
};

// The best logit's key in the high half, its smallest id inverted in the low one; 0 if all are NaN. -0 equals 0 here.
template <typename T> __device__ u64 argmax(const Row<T>& row) {
    u64 best = 0;
    visit(row, 0, row.vocab, [&](float x, int id, Visit how) {
        if (how == OFF || x != x) return;
        const u64 p = (u64)key_of(x + 0.f) << 32 | ~(unsigned)id;
        // Few are better than all before: the search in the list is rare.
        if (p > best && (how == ON || !row.is_changed(id))) best = p;
    });
    return block_reduce_u64(best, Larger());
}

// Sums of 64 bits. The hardware adds 32 at a time; the old low half tells of a carry, so the order cannot matter.
struct Histogram {
    unsigned *low, *high;  // [BINS]

    __device__ __forceinline__ void clear() const {
        for (int i = threadIdx.x; i < BINS; i += THREADS) low[i] = high[i] = 0;
        __syncthreads();
    }
    __device__ __forceinline__ void add(int bin, u64 v) const {
        const unsigned part = (unsigned)v, old = atomicAdd(&low[bin], part);
        const unsigned rest = (unsigned)(v >> 32) + (old + part < old);
        if (rest) atomicAdd(&high[bin], rest);
    }
    __device__ __forceinline__ u64 at(int bin) const { return (u64)high[bin] << 32 | low[bin]; }
};

struct Found {
    unsigned bin;
    u64 above, at;  // the sum of the bins above, and of this one
};

// From the last bin downwards, the first at which the sum reaches `target` >= 1.
__device__ Found find(const Histogram& h, u64 target) {
    __shared__ u64 sums[32];
    __shared__ Found found;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, bin = BINS - 1 - 2 * threadIdx.x;
    const u64 first = h.at(bin), second = h.at(bin - 1);
    u64 sum = first + second;  // of this lane and those before it
    for (int d = 1; d < 32; d <<= 1) {
        const u64 other = __shfl_up_sync(FULL_WARP, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    if (threadIdx.x == 0) found = {0, 0, 0};
    __syncthreads();
    u64 before = lane < warp ? sums[lane] : 0;
    for (int m = 16; m > 0; m >>= 1) before += __shfl_xor_sync(FULL_WARP, before, m);
    before += sum - first - second;
    if (before < target && target <= before + first) found = {(unsigned)bin, before, first};
    else if (before + first < target && target <= before + first + second) found = {(unsigned)bin - 1, before + first, second};
    __syncthreads();
    const Found result = found;
    __syncthreads();  // before a next call resets it
    return result;
}

// Digits of a key: 11, 11 and 10 bits from the top.
__device__ __forceinline__ unsigned up_to_digit(unsigned key, int level) { return key >> (level == 0 ? 21 : level == 1 ? 10 : 0); }
__device__ __forceinline__ unsigned digit(unsigned key, int level) { return up_to_digit(key, level) & (level == 2 ? 1023 : 2047); }

// Adds up weigh(x, key) by the digit `level` of the keys that start with `prefix`.
template <typename T, typename Weigh> __device__ void histogram(const Row<T>& row, const Histogram& h, int level, unsigned prefix, Weigh weigh) {
    h.clear();
    visit(row, 0, row.vocab, [&](float x, int, Visit how) {
        const unsigned key = key_of(x);
        if (level > 0 && up_to_digit(key, level - 1) != prefix) return;
        const u64 w = weigh(x, key);
        if (w) h.add(digit(key, level), signed_by(how, w));
    });
    __syncthreads();
}

// A logit, the sum over all larger ones, and the sum over its equals.
struct Place {
    unsigned key;
    u64 above, at;
};

// Where the sum reaches `target`; `first` holds the first level.
template <typename T, typename Weigh>
__device__ Place place(const Row<T>& row, const Histogram& first, const Histogram& scratch, Weigh weigh, u64 target) {
    Found found = find(first, target);
    unsigned prefix = found.bin;
    u64 above = found.above;
    for (int level = 1; level < 3; level++) {
        histogram(row, scratch, level, prefix, weigh);
        found = find(scratch, target - above);
        prefix = prefix << (level == 1 ? 11 : 10) | found.bin;
        above += found.above;
    }
    return {prefix, above, found.at};
}

// Of the tokens with the logit `key`, the id of number `index`, by ascending id.
template <typename T> __device__ unsigned nth(const Row<T>& row, const Histogram& h, unsigned key, u64 index) {
    constexpr int GROUP = 256;
    h.clear();
    visit(row, 0, row.vocab, [&](float x, int id, Visit how) {
        if (key_of(x) == key) h.add(BINS - 1 - id / GROUP, signed_by(how, 1));
    });
    __syncthreads();
    const Found group = find(h, index + 1);
    const int begin = (BINS - 1 - group.bin) * GROUP;
    h.clear();
    visit(row, begin, min(begin + GROUP, row.vocab), [&](float x, int id, Visit how) {
        if (key_of(x) == key) h.add(BINS - 1 - (id - begin), signed_by(how, 1));
    });
    __syncthreads();
    return begin + BINS - 1 - find(h, index + 1 - group.above).bin;
}

struct One {
    __device__ __forceinline__ u64 operator()(float, unsigned) const { return 1; }
};
struct Weight {
    float max, temperature;
    unsigned floor;  // tokens below weigh nothing
    __device__ __forceinline__ u64 operator()(float x, unsigned key) const { return key < floor ? 0 : weight(x, max, temperature); }
};

template <typename T> __device__ unsigned choose(const Row<T>& row, const Choice& c) {
    DYN_SHARED(unsigned, bins);
    const Histogram first = {bins, bins + BINS}, scratch = {bins + 2 * BINS, bins + 3 * BINS};
    const u64 best = argmax(row);
    const unsigned greedy = best ? ~(unsigned)best : 0;
    if (!(c.temperature > 0.f) || best == 0) return greedy;
    Weight weigh = {value_of(best >> 32), c.temperature, 0};

    u64 spare = 0;  // what weigh the equals of the k-th token that come after it
    if (c.top_k > 0 && c.top_k < (unsigned)row.vocab) {
        histogram(row, first, 0, 0, One());
        const Place last = place(row, first, scratch, One(), c.top_k);
        weigh.floor = last.key;
        spare = (last.above + last.at - c.top_k) * weigh(value_of(last.key), last.key);
    }

    // The first level of the histogram of masses; their sum, and the sum of those that min-p keeps.
    u64 sum = 0, likely = 0;
    const u64 least = (u64)fmin(ceil((double)c.min_p * BEST), 2. * BEST);
    first.clear();
    visit(row, 0, row.vocab, [&](float x, int, Visit how) {
        const unsigned key = key_of(x);
        const u64 w = weigh(x, key);
        if (w == 0) return;
        sum += signed_by(how, w);
        if (w >= least) likely += signed_by(how, w);
        first.add(digit(key, 0), signed_by(how, w));
    });
    const u64 total = block_reduce_u64(sum, Plus()) - spare;  // and all of `first` is there

    u64 mass = total;
    if (c.top_p < 1.f && total > 0) {
        const double share = ceil((double)c.top_p * (double)total);
        const u64 target = share > 1. ? min((u64)share, total) : 1;
        const Place last = place(row, first, scratch, weigh, target);
        const u64 w = weigh(value_of(last.key), last.key);
        if (w) mass = last.above + (target - last.above + w - 1) / w * w;
    }
    // The best is always kept. Both cuts are places in one order: the nearer one counts.
    if (c.min_p > 0.f) mass = min(mass, max(block_reduce_u64(likely, Plus()), BEST));
    if (mass == 0) return greedy;

    const u64 target = min((u64)(c.u * (double)mass), mass - 1);
    const Place at = place(row, first, scratch, weigh, target + 1);
    const u64 w = weigh(value_of(at.key), at.key);
    return w ? nth(row, scratch, at.key, (target - at.above) / w) : greedy;
}

template <typename T>
__device__ void sample(const T* __restrict__ logits, const Choice* __restrict__ choices, const Change* __restrict__ changes,
                       const unsigned* __restrict__ before, unsigned* __restrict__ tokens, int vocab) {
    const Choice c = choices[blockIdx.x];
    const Row<T> row = {logits + (size_t)c.row * vocab, vocab, changes + c.begin, (int)(c.end - c.begin), c.repetition, c.presence, c.frequency,
                        c.pending == BANNED ? BANNED : before[c.pending]};
    const unsigned token = choose(row, c);
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

template <typename T>
__device__ void logprobs(const T* __restrict__ logits, const Wanted* __restrict__ wanted, const unsigned* __restrict__ tokens,
                         unsigned* __restrict__ out, int vocab, int width) {
    DYN_SHARED(unsigned, bins);
    __shared__ u64 best_few[MAX_TOP];
    __shared__ unsigned few;
    const Histogram first = {bins, bins + BINS}, scratch = {bins + 2 * BINS, bins + 3 * BINS};
    const Wanted want = wanted[blockIdx.x];
    const Row<T> row = {logits + (size_t)want.row * vocab, vocab, nullptr, 0, 1.f, 0.f, 0.f, BANNED};
    out += (size_t)blockIdx.x * (1 + 2 * width);
    const float nan = __uint_as_float(0x7fc00000u);

    const u64 best = argmax(row);
    const float max = value_of(best >> 32);
    bool broken = best == 0 || fabsf(max) == __uint_as_float(0x7f800000u);
    u64 sum = 0;
    visit(row, 0, vocab, [&](float x, int, Visit) {
        broken |= x != x;
        sum += weight(x, max, 1.f);
    });
    sum = block_reduce_u64(sum, Plus());
    // As on the CPU: a row with NaN, or without a finite best, has no log-probabilities.
    const float norm = __syncthreads_or(broken) ? nan : max + (float)log((double)sum / BEST);
    if (threadIdx.x == 0) {
        const unsigned token = want.from == BANNED ? want.token : tokens[want.from];
        out[0] = __float_as_uint(token < (unsigned)vocab ? to_float(row.logits[token]) - norm : nan);
    }

    const int top = min(min((int)want.top, width), min(vocab, MAX_TOP));
    for (int i = top + threadIdx.x; i < width; i += THREADS) {
        out[1 + i] = BANNED;
        out[1 + width + i] = __float_as_uint(nan);
    }
    if (top <= 0) return;
    histogram(row, first, 0, 0, One());
    const Place last = place(row, first, scratch, One(), top);
    const unsigned last_id = nth(row, scratch, last.key, top - last.above - 1);
    if (threadIdx.x == 0) few = 0;
    __syncthreads();
    visit(row, 0, vocab, [&](float x, int id, Visit) {
        const unsigned key = key_of(x);
        if (key > last.key || (key == last.key && id <= (int)last_id)) best_few[atomicAdd(&few, 1u)] = (u64)key << 32 | ~(unsigned)id;
    });
    __syncthreads();
    // They came in any order; there are just `top`.
    if ((int)threadIdx.x < top) {
        const u64 own = best_few[threadIdx.x];
        int rank = 0;
        for (int i = 0; i < top; i++) rank += best_few[i] > own;
        out[1 + rank] = ~(unsigned)own;
        out[1 + width + rank] = __float_as_uint(value_of(own >> 32) - norm);
    }
}

}  // namespace

#define KERNEL(SUFFIX, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_##SUFFIX(const T* logits, const Choice* choices,          \
                                                                          const Change* changes, const unsigned* before,     \
                                                                          unsigned* tokens, int vocab) {                   \
        sample<T>(logits, choices, changes, before, tokens, vocab);                                                                \
    }                                                                                                                      \
    EXPORT(sample_##SUFFIX)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) logprobs_##SUFFIX(const T* logits, const Wanted* wanted,         \
                                                                            const unsigned* tokens, unsigned* out, int vocab, int width) { \
        logprobs<T>(logits, wanted, tokens, out, vocab, width);                                                            \
    }                                                                                                                      \
    EXPORT(logprobs_##SUFFIX)
FOR_TYPES(KERNEL)
