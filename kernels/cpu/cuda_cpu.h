// Runs CUDA C++ kernels on the CPU, for tests: one fiber a thread, one block at a time. A launch runs on the OS thread that
// asks for it; launches of several OS threads run side by side.
//
// What it shows: wrong indices, missing barriers (results that depend on the order in which threads run), divergent warp
// calls, deadlocks, reads of shared memory that nobody wrote (it starts as NaN), and, under -fsanitize, reads and writes out
// of bounds. What it cannot show: races between blocks, the memory model, and speed. A PTX instruction needs a wrapper of its
// own (see mma.cuh).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
using std::max;
using std::min;
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static const
#define __align__(n) alignas(n)
#define __restrict__
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_cpu::sched().dynamic)
#define EXPORT(name) static const cuda_cpu::Export export_##name(#name, name);

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Saves the callee-saved registers on this stack and goes on on another. x86-64; other machines have no emulation.
extern "C" void cuda_cpu_switch(void** save, void* load);
asm(".text\n.weak cuda_cpu_switch\n.type cuda_cpu_switch,@function\ncuda_cpu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

namespace cuda_cpu {
enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };
// What the lanes of a warp meet for.
enum Meeting { SYNC, SHUFFLE, BALLOT, GATHER };
// Bytes that a lane can bring.
constexpr size_t MOST_BROUGHT = 32;

struct Fiber {
    void* stack_pointer;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    unsigned linear, mask;
    State state;
    Meeting meeting;
    int source;  // the lane that it reads
    // To a meeting, and from it.
    alignas(16) unsigned char brought[MOST_BROUGHT], taken[MOST_BROUGHT];
};

// Lanes of a warp, a bit each; and what all of them brought to the last meeting that gathered it.
struct Warp {
    unsigned ready, at_barrier, done;
    alignas(16) unsigned char gathered[32][MOST_BROUGHT];
};

// What a block can have on sm_86, the least of those we compile for.
constexpr size_t MOST_SHARED = 99 << 10;

struct Scheduler {
    void* main;
    std::vector<Fiber> fibers;  // those of the largest block so far; a block has the first `threads`
    unsigned threads = 0, order = 0;
    Warp warps[32];
    Fiber* current = nullptr;
    const std::function<void()>* body = nullptr;
    dim3 block, block_dim, grid_dim;
    alignas(128) unsigned char dynamic[MOST_SHARED + 4096];
    std::string error;
    int vote = 0, vote_result = 0;
};
// Of this OS thread, which a fiber never leaves. A plain pointer, as it is read at every threadIdx.
inline thread_local Scheduler* scheduler = nullptr;
inline Scheduler& sched() { return *scheduler; }
constexpr size_t STACK = 64 << 10;

[[noreturn]] inline void die(const std::string& message) {
    sched().error = message;
    sched().current->state = DONE;
    cuda_cpu_switch(&sched().current->stack_pointer, sched().main);
    abort();
}
inline unsigned bit(const Fiber* f) { return 1u << (f->linear & 31); }
// Goes on elsewhere: in its warp while that can, in the order of the launch, then where all began.
inline void yield() {
    auto& s = sched();
    auto* c = s.current;
    unsigned& ready = s.warps[c->linear / 32].ready;
    ready &= ~bit(c);
    void* to = s.main;
    if (s.order < 2 && ready) {
        const unsigned behind = s.order == 0 ? ready & ~(bit(c) - 1) : ready & (bit(c) - 1), from = behind ? behind : ready;
        s.current = &s.fibers[(c->linear & ~31u) + (s.order == 0 ? __builtin_ctz(from) : 31 - __builtin_clz(from))];
        to = s.current->stack_pointer;
    }
    cuda_cpu_switch(&c->stack_pointer, to);
}
inline void entry() {
    auto* c = sched().current;
    (*sched().body)();
    c->state = DONE;
    sched().warps[c->linear / 32].done |= bit(c);
    yield();
    abort();
}
// The lanes of `mask` wait for each other. The last one to come hands each what it came for and wakes them. What is gathered is there until
// all lanes meet again.
inline void meet(unsigned mask, Meeting meeting, int source = 0) {
    auto& s = sched();
    auto* c = s.current;
    auto& warp = s.warps[c->linear / 32];
    auto* lanes = &s.fibers[c->linear & ~31u];
    const unsigned count = s.threads - (c->linear & ~31u);
    if (!(mask & bit(c))) die("a thread calls a warp function with a mask that leaves it out");
    if (mask & warp.done || (count < 32 && mask >> count)) die("a warp mask names a lane that does not exist or has exited");
    if (meeting == SHUFFLE && !(mask >> source & 1)) die("a shuffle reads a lane outside of its mask");
    c->state = AT_WARP_BARRIER;
    c->mask = mask;
    c->meeting = meeting;
    c->source = source;
    warp.at_barrier |= bit(c);
    unsigned votes = 0;
    bool all = (warp.at_barrier & mask) == mask;
    for (unsigned l = 0; all && l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        all = lanes[l].mask == mask;
        if (lanes[l].meeting != meeting) die("lanes of a warp meet in different functions");
        votes |= (lanes[l].brought[0] & 1u) << l;
    }
    if (!all) return yield();
    for (unsigned l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        if (meeting == SHUFFLE) memcpy(lanes[l].taken, lanes[lanes[l].source].brought, MOST_BROUGHT);
        if (meeting == BALLOT) memcpy(lanes[l].taken, &votes, sizeof votes);
        if (meeting == GATHER) memcpy(warp.gathered[l], lanes[l].brought, MOST_BROUGHT);
        lanes[l].state = READY;
    }
    warp.at_barrier &= ~mask;
    warp.ready |= mask;
}
template <typename T> T exchange(unsigned mask, T v, int source) {
    static_assert(sizeof(T) <= MOST_BROUGHT);
    auto* c = sched().current;
    memcpy(c->brought, &v, sizeof v);
    meet(mask, SHUFFLE, source);
    memcpy(&v, c->taken, sizeof v);
    return v;
}

// order: 0 and 1 forward and backward, a warp as far as it can go before the next one starts; else the seed of a random order of all
// threads in each round. Results must not depend on it.
inline void launch(dim3 grid, dim3 block, size_t shared, unsigned order, const std::function<void()>& body) {
    static thread_local Scheduler s;
    scheduler = &s;
    s.body = &body;
    s.block_dim = block;
    s.grid_dim = grid;
    s.error.clear();
    s.vote = 0;
    const unsigned n = block.x * block.y * block.z;
    if (n == 0 || n > 1024 || shared > MOST_SHARED) throw std::runtime_error("no threads, too many, or too much shared memory");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("no blocks, or too many");
    s.threads = n;
    s.order = order;
    while (s.fibers.size() < n) s.fibers.emplace_back().stack.reset(new char[STACK]);
    const auto end = s.fibers.begin() + n;
    std::vector<unsigned> sequence(n);
    uint64_t random = order * 0x9E3779B97F4A7C15ull + 1;
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; b++) {
        s.block = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        memset(s.dynamic, 0xFF, shared + 4096);
        for (unsigned i = 0; i < n; i++) {
            auto& f = s.fibers[i];
            void** p = (void**)((uintptr_t)(f.stack.get() + STACK) & ~15ull);
            *--p = nullptr;
            *--p = (void*)entry;
            for (int k = 0; k < 6; k++) *--p = nullptr;
            f.stack_pointer = p;
            f.thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
            f.linear = i;
            f.state = READY;
            sequence[i] = order == 1 ? n - 1 - i : i;
        }
        for (unsigned w = 0; w < 32; w++) {
            s.warps[w].ready = n >= 32 * (w + 1) ? ~0u : n > 32 * w ? (1u << n % 32) - 1 : 0;
            s.warps[w].at_barrier = s.warps[w].done = 0;
        }
        for (unsigned done = 0; done < n;) {
            for (unsigned i = n - 1; order > 1 && i > 0; i--) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                std::swap(sequence[i], sequence[random % (i + 1)]);
            }
            bool ran = false;
            for (unsigned from = 0, turn = order < 2 ? 32 : n; from < n; from += turn) {
                for (bool again = true; again;) {
                    again = false;
                    for (unsigned k = from; k < min(from + turn, n); k++) {
                        const unsigned i = sequence[k];
                        if (s.fibers[i].state != READY) continue;
                        s.current = &s.fibers[i];
                        cuda_cpu_switch(&s.main, s.current->stack_pointer);
                        ran = true;
                        again = order < 2;
                        if (!s.error.empty())
                            throw std::runtime_error(s.error + " (thread " + std::to_string(s.current->linear) + ", block " + std::to_string(b) + ")");
                    }
                }
            }
            unsigned waiting = 0;
            done = 0;
            for (auto f = s.fibers.begin(); f != end; ++f) {
                waiting += f->state == AT_BLOCK_BARRIER;
                done += f->state == DONE;
            }
            if (waiting && waiting + done == n) {
                s.vote_result = s.vote;
                s.vote = 0;
                for (auto f = s.fibers.begin(); f != end; ++f) {
                    if (f->state != AT_BLOCK_BARRIER) continue;
                    f->state = READY;
                    s.warps[f->linear / 32].ready |= bit(&*f);
                }
            } else if (!ran && done < n) {
                throw std::runtime_error("deadlock: " + std::to_string(waiting) + " threads at __syncthreads, " + std::to_string(n - waiting - done) +
                                         " in a warp function, " + std::to_string(done) + " ended, block " + std::to_string(b));
            }
        }
    }
}

// Kernels by name; their arguments come as cuLaunchKernel takes them, an array of pointers to values, which are copied: a launch may be
// run later.
using Kernel = std::function<std::function<void()>(void**)>;
inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}
struct Export {
    template <typename... A> Export(const char* name, void (*f)(A...)) {
        kernels()[name] = [f](void** values) { return bound(f, values, std::index_sequence_for<A...>()); };
    }
    template <typename... A, size_t... I> static std::function<void()> bound(void (*f)(A...), void** values, std::index_sequence<I...>) {
        return [f, copy = std::tuple<std::remove_const_t<A>...>(*static_cast<std::remove_const_t<A>*>(values[I])...)] { f(std::get<I>(copy)...); };
    }
};
}  // namespace cuda_cpu

#define threadIdx (cuda_cpu::sched().current->thread)
#define blockIdx (cuda_cpu::sched().block)
#define blockDim (cuda_cpu::sched().block_dim)
#define gridDim (cuda_cpu::sched().grid_dim)
constexpr int warpSize = 32;
inline void __syncthreads() {
    cuda_cpu::sched().current->state = cuda_cpu::AT_BLOCK_BARRIER;
    cuda_cpu::yield();
}
inline int __syncthreads_or(int p) {
    cuda_cpu::sched().vote |= p != 0;
    __syncthreads();
    return cuda_cpu::sched().vote_result;
}
inline void __syncwarp(unsigned mask = ~0u) { cuda_cpu::meet(mask, cuda_cpu::SYNC); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <typename T> T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    const int l = cuda_cpu::sched().current->linear & 31;
    return cuda_cpu::exchange(mask, v, (l & ~(width - 1)) | (source & (width - 1)));
}
template <typename T> T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
    const int l = cuda_cpu::sched().current->linear & 31, s = l ^ x;
    return cuda_cpu::exchange(mask, v, (s & ~(width - 1)) > (l & ~(width - 1)) ? l : s);
}
template <typename T> T __shfl_down_sync(unsigned mask, T v, int d, int width = 32) {
    const int l = cuda_cpu::sched().current->linear & 31;
    return cuda_cpu::exchange(mask, v, (l & (width - 1)) + d < width ? l + d : l);
}
template <typename T> T __shfl_up_sync(unsigned mask, T v, int d, int width = 32) {
    const int l = cuda_cpu::sched().current->linear & 31;
    return cuda_cpu::exchange(mask, v, (l & (width - 1)) >= d ? l - d : l);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
    auto* c = cuda_cpu::sched().current;
    c->brought[0] = p != 0;
    cuda_cpu::meet(mask, cuda_cpu::BALLOT);
    unsigned votes;
    memcpy(&votes, c->taken, sizeof votes);
    return votes;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
template <typename T, typename V> T atomicAdd(T* p, V v) {
    const T old = *p;
    *p = old + static_cast<T>(v);
    return old;
}
template <typename T> T atomicMax(T* p, T v) {
    const T old = *p;
    *p = std::max(old, v);
    return old;
}
template <typename T> T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return r;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
struct __half {
    uint16_t x;
};
struct __nv_bfloat16 {
    uint16_t x;
};
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.x << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    if (f != f) return {0x7fff};
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
    _Float16 v;
    memcpy(&v, &h.x, 2);
    return (float)v;
}
inline __half __float2half(float f) {
    const _Float16 v = (_Float16)f;
    __half h;
    memcpy(&h.x, &v, 2);
    return h;
}
