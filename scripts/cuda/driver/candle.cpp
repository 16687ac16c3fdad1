// candle's own kernels, those that prefixd's GPU path comes to: what they compute, with the parameters that candle passes. Thread 0 does it all.
#include "cuda_cpu.h"

namespace {
float number(float x) { return x; }
float number(__half x) { return __half2float(x); }
float number(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> T made(float x);
template <> float made(float x) { return x; }
template <> __half made(float x) { return __float2half(x); }
template <> __nv_bfloat16 made(float x) { return __float2bfloat16(x); }

bool first() { return threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0; }

// Where element i of a layout lies; `dims` and `strides` of `n` numbers, none: in order.
size_t placed(size_t i, size_t n, const size_t* dims, const size_t* strides) {
    if (!dims) return i;
    size_t at = 0;
    for (size_t d = n; d-- > 0; i /= dims[d]) at += i % dims[d] * strides[d];
    return at;
}

template <typename S, typename T, T (*F)(S)> void unary(size_t count, size_t n, const size_t* info, const S* in, T* out) {
    for (size_t i = 0; first() && i < count; i++) out[i] = F(in ? in[placed(i, n, info, info + n)] : S(reinterpret_cast<const S*>(out)[i]));
}
template <typename T> T same(T x) { return x; }
template <typename S, typename T> T cast(S x) { return made<T>(number(x)); }
template <typename T> T tangent(T x) { return made<T>(tanhf(number(x))); }
template <typename T> T square(T x) { return made<T>(number(x) * number(x)); }
float add(float x, float y) { return x + y; }
float sub(float x, float y) { return x - y; }
float mul(float x, float y) { return x * y; }
template <typename T, float (*F)(float, float)> void binary(size_t count, size_t n, const size_t* info, const T* a, const T* b, T* out) {
    for (size_t i = 0; first() && i < count; i++)
        out[i] = made<T>(F(number(a[placed(i, n, info, info + n)]), number(b[placed(i, n, info, info + 2 * n)])));
}
template <typename T> void affine(size_t count, size_t n, const size_t* info, const T* in, T* out, T factor, T plus) {
    for (size_t i = 0; first() && i < count; i++)
        out[i] = made<T>(number(in ? in[placed(i, n, info, info + n)] : out[i]) * number(factor) + number(plus));
}
template <typename T> void copy2d(const T* from, T* to, uint32_t rows, uint32_t columns, uint32_t stride, uint32_t to_stride) {
    for (uint32_t r = 0; first() && r < rows; r++)
        for (uint32_t c = 0; c < columns; c++) to[r * to_stride + c] = from[r * stride + c];
}
// The layout is that of the ids, which have their order here.
template <typename T>
void index_select(size_t count, size_t, const size_t*, const uint32_t* ids, const T* in, T* out, size_t, size_t from, size_t many, size_t right) {
    for (size_t i = 0; first() && i < count; i++) {
        const uint32_t id = ids[i / right % many];
        if (id >= from) cuda_cpu::die("index_select: a row that is not there");
        out[i] = in[(i / (many * right) * from + id) * right + i % right];
    }
}
template <typename T> void index_add(const uint32_t* ids, size_t many, const T* in, T* out, size_t left, size_t, size_t to, size_t right) {
    for (size_t l = 0; first() && l < left; l++)
        for (size_t j = 0; j < many; j++) {
            if (ids[j] >= to) cuda_cpu::die("index_add: a row that is not there");
            for (size_t r = 0; r < right; r++) {
                T& sum = out[(l * to + ids[j]) * right + r];
                sum = made<T>(number(sum) + number(in[(l * many + j) * right + r]));
            }
        }
}
template <typename T> void const_set(size_t count, size_t n, const size_t* info, T value, T* out) {
    for (size_t i = 0; first() && i < count; i++) out[placed(i, n, info, info + n)] = value;
}

#define KERNEL(name, ...) const cuda_cpu::Export export_##name(#name, __VA_ARGS__);
#define OF(T, t)                                  \
    KERNEL(ucopy_##t, unary<T, T, same<T>>)       \
    KERNEL(copy2d_##t, copy2d<T>)                 \
    KERNEL(is_u32_##t, index_select<T>)           \
    KERNEL(const_set_##t, const_set<T>)
#define OF_FLOATS(T, t)                           \
    OF(T, t)                                      \
    KERNEL(utanh_##t, unary<T, T, tangent<T>>)    \
    KERNEL(usqr_##t, unary<T, T, square<T>>)      \
    KERNEL(badd_##t, binary<T, add>)              \
    KERNEL(bsub_##t, binary<T, sub>)              \
    KERNEL(bmul_##t, binary<T, mul>)              \
    KERNEL(ia_u32_##t, index_add<T>)              \
    KERNEL(affine_##t, affine<T>)                 \
    KERNEL(cast_##t##_f32, unary<T, float, cast<T, float>>)
OF_FLOATS(float, f32)
OF_FLOATS(__half, f16)
OF_FLOATS(__nv_bfloat16, bf16)
OF(uint32_t, u32)
KERNEL(cast_f32_f16, unary<float, __half, cast<float, __half>>)
KERNEL(cast_f32_bf16, unary<float, __nv_bfloat16, cast<float, __nv_bfloat16>>)
}  // namespace
