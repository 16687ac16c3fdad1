// libcuda: modules, launches and graphs. Kernels are those of kernels/ as C++ (kernels/cpu/cuda_cpu.h), and candle's that are used (candle.cpp).
#include "api.h"
#include "cuda_cpu.h"

namespace {
struct Function {
    cuda_cpu::Kernel kernel;
    std::string name;
    int dynamic = 48 << 10;  // bytes of shared memory that it may be launched with
};
// Every module has all kernels, and knows those that were asked for.
using Module = std::map<std::string, Function>;

// Its memory is given back when what was launched has run.
void forget(Graph* graph) {
    const auto give = [memory = graph->memory] {
        Lock guard(the().lock);
        for (const uint64_t address : memory) the().live.erase(address), the().give(address);
    };
    if (the().streams.count(graph->launched)) {
        // Not by `put`: the stream may record another graph now.
        the().append(graph->launched, give);
    } else {
        give();
    }
    the().graphs.erase(graph);
    delete graph;
}
}  // namespace

API cuModuleLoadData(void** out, const void*) {
    ENTER;
    TRY(the().refuse_while_recording("cuModuleLoadData"));
    return *out = new Module, SUCCESS;
}
API cuModuleUnload(void* module) { return delete static_cast<Module*>(module), SUCCESS; }
API cuModuleGetFunction(void** out, void* handle, const char* name) {
    ENTER;
    auto& functions = *static_cast<Module*>(handle);
    const auto found = functions.find(name);
    if (found != functions.end()) return *out = &found->second, SUCCESS;
    // Its code is loaded now.
    TRY(the().refuse_while_recording("the first cuModuleGetFunction of a kernel"));
    const auto kernel = cuda_cpu::kernels().find(name);
    if (kernel == cuda_cpu::kernels().end()) return the().complain(NOT_FOUND, std::string("no kernel ") + name);
    return *out = &(functions[name] = Function{kernel->second, name}), SUCCESS;
}
// The compiler places no shared memory here, so a kernel's own counts as none.
API cuFuncGetAttribute(int* value, int attribute, void*) { return attribute == 1 ? (*value = 0, SUCCESS) : NOT_SUPPORTED; }
API cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value > int(cuda_cpu::MOST_SHARED)) return the().complain(INVALID_VALUE, "more shared memory than a block can have");
    return static_cast<Function*>(function)->dynamic = value, SUCCESS;
}
API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* on, void** values,
                   void** extra) {
    ON(on);
    const auto* function = static_cast<Function*>(handle);
    const bool fits = gx && gy && gz && gy <= 65535 && gz <= 65535 && bx && by && bz && uint64_t(bx) * by * bz <= 1024 && int(shared) <= function->dynamic;
    if (!fits || extra) return the().complain(INVALID_VALUE, function->name + ": a grid, or shared memory, that no device takes");
    the().counts.launches += !stream->recording;
    return the().put(stream, [=, name = function->name, body = function->kernel(values)] {
        try {
            cuda_cpu::launch(dim3(gx, gy, gz), dim3(bx, by, bz), shared, 0, body);
        } catch (const std::exception& e) {
            throw std::runtime_error(name + ": " + e.what());
        }
    });
}

// Graphs
API cuStreamBeginCapture_v2(void* handle, int mode) {
    ON(handle);
    if (stream->recording) return INVALID_VALUE;
    if (mode != 1) return the().complain(NOT_SUPPORTED, "a recording that is not of one thread");
    stream->recording = *the().graphs.insert(new Graph).first;
    stream->thread = this_thread();
    stream->broken = false;
    return SUCCESS;
}
API cuStreamIsCapturing(void* handle, int* status) {
    ON(handle);
    return *status = stream->recording ? 1 + stream->broken : 0, SUCCESS;
}
API cuStreamEndCapture(void* handle, void** out) {
    ON(handle);
    if (!stream->recording || stream->thread != this_thread()) return INVALID_VALUE;
    auto* graph = stream->recording;
    if (!graph->kept.empty()) the().refuse_recording(stream, NOT_SUPPORTED, "a graph keeps memory that it allocates");
    stream->recording = nullptr;
    *out = graph;
    if (!stream->broken) return SUCCESS;
    *out = nullptr;
    forget(graph);
    return CAPTURE_INVALIDATED;
}
API cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long flags) {
    ENTER;
    if (flags) return NOT_SUPPORTED;
    return *out = graph, SUCCESS;
}
API cuGraphLaunch(void* handle, void* on) {
    ON(on);
    auto* graph = static_cast<Graph*>(handle);
    if (!the().graphs.count(graph)) return INVALID_HANDLE;
    the().counts.graphs++;
    graph->launched = stream;
    for (const auto& node : graph->nodes) TRY(the().put(stream, node));
    return SUCCESS;
}
API cuGraphExecDestroy(void*) { return SUCCESS; }
API cuGraphDestroy(void* handle) {
    ENTER;
    auto* graph = static_cast<Graph*>(handle);
    return the().graphs.count(graph) ? (forget(graph), SUCCESS) : INVALID_HANDLE;
}
