// The one door to the kernels on the CPU: cuLaunchKernel's arguments, and a message instead of a status.
#include "cuda_cpu.h"

extern "C" int prefixd_emulate(const char* name, const unsigned* grid, const unsigned* block, size_t shared, unsigned order, void** values,
                               char* message, size_t size) {
    try {
        const auto kernel = cuda_cpu::kernels().find(name);
        if (kernel == cuda_cpu::kernels().end()) throw std::runtime_error("no such kernel");
        cuda_cpu::launch(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared, order,
                         kernel->second(values));
        return 0;
    } catch (const std::exception& e) {
        snprintf(message, size, "%s", e.what());
        return 1;
    }
}
