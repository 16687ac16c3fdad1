// cuBLAS and cuRAND, as far as they are called: products by their formula, sums in f32, on the handle's stream.
#include "api.h"
#include "cuda_cpu.h"

namespace {
struct Handle {
    Stream* stream = nullptr;
};
enum Type { F32 = 0, F16 = 2, BF16 = 14 };  // cudaDataType_t

float load(int type, const void* p, int64_t at) {
    if (type == F32) return static_cast<const float*>(p)[at];
    return type == F16 ? __half2float(static_cast<const __half*>(p)[at]) : __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]);
}
void store(int type, void* p, int64_t at, float v) {
    if (type == F32) static_cast<float*>(p)[at] = v;
    if (type == F16) static_cast<__half*>(p)[at] = __float2half(v);
    if (type == BF16) static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16(v);
}
bool known(int type) { return type == F32 || type == F16 || type == BF16; }
}  // namespace

API cublasCreate_v2(void** out) { return *out = new Handle, 0; }
// By its manual it waits for the device.
API cublasDestroy_v2(void* handle) {
    Lock guard(the().lock);
    delete static_cast<Handle*>(handle);
    // Its codes are its own: CUBLAS_STATUS_INTERNAL_ERROR.
    return the().refuse_while_any_records("cublasDestroy") || the().drain_all() ? 14 : 0;
}
API cublasSetStream_v2(void* handle, void* stream) { return static_cast<Handle*>(handle)->stream = static_cast<Stream*>(stream), 0; }
API cublasSetWorkspace_v2(void*, void* memory, size_t bytes) {
    Lock guard(the().lock);
    return the().spans(reinterpret_cast<uint64_t>(memory), bytes) ? 0 : 7;
}
API cublasSetMathMode(void*, int) { return 0; }
// C = alpha op(A) op(B) + beta C, column-major.
API cublasGemmStridedBatchedEx(void* handle, int turn_a, int turn_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, long long step_a,
                               const void* b, int type_b, int ldb, long long step_b, const void* beta, void* c, int type_c, int ldc, long long step_c, int many,
                               int compute, int) {
    Lock guard(the().lock);
    const bool sizes = m >= 0 && n >= 0 && k >= 0 && lda >= max(1, turn_a ? k : m) && ldb >= max(1, turn_b ? n : k) && ldc >= max(1, m);
    // 68: CUBLAS_COMPUTE_32F, whose scalars are f32.
    if (!sizes || !known(type_a) || type_a != type_b || !known(type_c) || compute != 68) return the().complain(7, "a product that cuBLAS refuses");
    const float x = *static_cast<const float*>(alpha), y = *static_cast<const float*>(beta);
    const int status = the().put(static_cast<Handle*>(handle)->stream, [=] {
        std::vector<float> left(size_t(m) * k), sums(m);  // of A, rows together
        for (int64_t i = 0; i < many; i++) {
            for (int64_t l = 0; l < k; l++)
                for (int64_t row = 0; row < m; row++) left[l * m + row] = load(type_a, a, i * step_a + (turn_a ? row * lda + l : l * lda + row));
            for (int64_t column = 0; column < n; column++) {
                std::fill(sums.begin(), sums.end(), 0.f);
                for (int64_t l = 0; l < k; l++) {
                    const float right = load(type_b, b, i * step_b + (turn_b ? l * ldb + column : column * ldb + l));
                    for (int64_t row = 0; row < m; row++) sums[row] += left[l * m + row] * right;
                }
                for (int64_t row = 0; row < m; row++) {
                    const int64_t at = i * step_c + column * ldc + row;
                    store(type_c, c, at, x * sums[row] + (y != 0 ? y * load(type_c, c, at) : 0));
                }
            }
        }
    });
    // Its codes are its own: CUBLAS_STATUS_EXECUTION_FAILED.
    return status ? 13 : 0;
}
API cublasGemmEx(void* handle, int turn_a, int turn_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                 int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, turn_a, turn_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algorithm);
}
API curandCreateGenerator(void** out, int) { return *out = new char, 0; }
API curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
API curandSetStream(void*, void*) { return 0; }
API curandDestroyGenerator(void* generator) { return delete static_cast<char*>(generator), 0; }
