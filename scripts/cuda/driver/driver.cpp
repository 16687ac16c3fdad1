// libcuda for one device that is this processor: what cudarc and prefixd call of it, with what a GPU's driver would refuse refused.
// Kernels are those of kernels/ as C++ (kernels/cpu/cuda_cpu.h), and candle's that are used (candle.cpp). Signatures are those of cuda.h.
#include "stream.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_cpu.h"

using namespace device;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {
bool initialised;
thread_local void* current;
char context;    // its address is the handle
char pool;
struct Function {
    cuda_cpu::Kernel kernel;
    std::string name;
    int dynamic = 48 << 10;  // bytes of shared memory that it may be launched with
};
// As a card of compute capability 8.6 has.
constexpr int MOST_SHARED = int(cuda_cpu::MOST_SHARED), MULTIPROCESSORS = 4;

void print_counts() {
    const auto& c = the().counts;
    fprintf(stderr,
            "stand-in driver: %lu launches, %lu graphs, %lu copies to the device (%lu bytes), %lu from it, %lu on it, %lu fills, %lu allocations, %lu "
            "waits\n",
            c.launches, c.graphs, c.to_device, c.to_device_bytes, c.from_device, c.on_device, c.fills, c.allocations, c.waits);
}
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Every call that needs a context: the calling thread must have it.
int ready() {
    if (!initialised) return NOT_INITIALIZED;
    if (current != &context) return the().complain(INVALID_CONTEXT, "a call of a thread that has no context");
    return the().failed;
}
Stream* known(void* handle) {
    const auto found = the().streams.find(static_cast<Stream*>(handle));
    return found == the().streams.end() ? nullptr : *found;
}
// The stream, or what is wrong with the call.
int on_stream(void* handle, Stream*& stream) {
    if (const int status = ready()) return status;
    stream = known(handle);
    return stream ? SUCCESS : the().complain(INVALID_HANDLE, "no such stream");
}
// Memory of the host that a copy uses until it has run, and then lets go.
uint64_t hold(uint64_t host, size_t bytes) {
    const auto block = the().within(the().page_locked, host, bytes);
    if (block == the().page_locked.end()) return 0;
    the().in_flight[block->first]++;
    return block->first;
}
void let_go(uint64_t held) {
    Lock guard(the().lock);
    if (held) the().in_flight[held]--;
}
}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
#define TRY(call) \
    if (const int status = (call)) return status
// Takes the lock, and wants the thread's context.
#define ENTER               \
    Lock guard(the().lock); \
    TRY(ready())
#define ON(handle)          \
    Lock guard(the().lock); \
    Stream* stream;         \
    TRY(on_stream(handle, stream))

API cuInit(unsigned) {
    Lock guard(the().lock);
    if (!initialised && getenv("CUDA_STAND_IN_LOG")) atexit(print_counts);
    if (const char* what = getenv("CUDA_STAND_IN_REFUSE")) the().refuse = what;
    if (const char* mib = getenv("CUDA_STAND_IN_MIB")) the().total = strtoull(mib, nullptr, 10) << 20;
    initialised = true;
    return SUCCESS;
}
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
API cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return NOT_INITIALIZED;
    return ordinal == 0 ? (*device = 0, SUCCESS) : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "stand-in"), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = the().total, SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = MULTIPROCESSORS; break;
        case 75: *value = 8; break;
        case 76: *value = 6; break;
        case 97: *value = MOST_SHARED; break;
        case 115: *value = 1; break;  // pools of memory
        default: return the().complain(NOT_SUPPORTED, "attribute " + std::to_string(attribute) + " of a device");
    }
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void** out, int) { return *out = &context, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* wanted) { return current = wanted, SUCCESS; }
API cuCtxGetCurrent(void** out) { return *out = current, SUCCESS; }
API cuDeviceGetDefaultMemPool(void** out, int) { return *out = &pool, SUCCESS; }
API cuMemPoolSetAttribute(void* of, int, void*) { return of == &pool ? SUCCESS : INVALID_VALUE; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER;
    return *free = the().free_bytes(), *total = the().total, SUCCESS;
}
API cuGetErrorName(int status, const char** text) {
    switch (status) {
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
        case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *text = "an error of the stand-in driver";
    }
    return SUCCESS;
}
API cuGetErrorString(int status, const char** text) { return cuGetErrorName(status, text); }

// Streams and events
API cuStreamCreate(void** out, unsigned) {
    ENTER;
    TRY(the().refuse_while_recording("cuStreamCreate"));
    *out = *the().streams.insert(new Stream).first;
    return SUCCESS;
}
API cuStreamDestroy_v2(void* handle) {
    ON(handle);
    the().drain(stream, stream->given);
    // Events still name it, and find all of its work done.
    the().streams.erase(stream);
    return SUCCESS;
}
API cuStreamSynchronize(void* handle) {
    ON(handle);
    TRY(the().refuse_while_recording("cuStreamSynchronize"));
    the().counts.waits++;
    return the().drain(stream, stream->given);
}
API cuCtxSynchronize() {
    ENTER;
    TRY(the().refuse_while_recording("cuCtxSynchronize"));
    return the().drain_all();
}
API cuEventCreate(void** out, unsigned flags) {
    ENTER;
    *out = *the().events.insert(new Event{!(flags & 2)}).first;
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
    ENTER;
    // Work may still set its time, so it is forgotten and not freed.
    return the().events.erase(static_cast<Event*>(event)) ? SUCCESS : INVALID_HANDLE;
}
API cuEventRecord(void* handle, void* on) {
    ON(on);
    auto* event = static_cast<Event*>(handle);
    if (!the().events.count(event)) return INVALID_HANDLE;
    event->captured = stream->recording != nullptr;
    TRY(the().put(stream, [event] { event->seconds = now(); }));
    event->stream = stream;
    event->at = stream->given;
    return SUCCESS;
}
static int event_of(void* handle, const char* call, Event*& event) {
    TRY(ready());
    event = static_cast<Event*>(handle);
    if (!the().events.count(event)) return INVALID_HANDLE;
    TRY(the().refuse_while_recording(call));
    return event->captured ? the().complain(INVALID_VALUE, std::string(call) + " of an event of a graph") : SUCCESS;
}
API cuEventQuery(void* handle) {
    Lock guard(the().lock);
    Event* event;
    TRY(event_of(handle, "cuEventQuery", event));
    if (!event->stream || event->stream->done >= event->at) return the().failed;
    // Who only asks comes to an end too, if slowly.
    static uint64_t asked;
    if (++asked % 1024 == 0) TRY(the().drain(event->stream, event->stream->done + 1));
    return event->stream->done >= event->at ? SUCCESS : NOT_READY;
}
API cuEventSynchronize(void* handle) {
    Lock guard(the().lock);
    Event* event;
    TRY(event_of(handle, "cuEventSynchronize", event));
    if (!event->stream) return SUCCESS;
    the().counts.waits += event->stream->done < event->at;
    return the().drain(event->stream, event->at);
}
API cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
    Lock guard(the().lock);
    Event *a, *b;
    TRY(event_of(from, "cuEventElapsedTime", a));
    TRY(event_of(to, "cuEventElapsedTime", b));
    if (!a->timing || !b->timing || !a->stream || !b->stream) return INVALID_HANDLE;
    if (a->stream->done < a->at || b->stream->done < b->at) return NOT_READY;
    *milliseconds = float((b->seconds - a->seconds) * 1e3);
    return SUCCESS;
}

// Memory
API cuMemAllocAsync(uint64_t* out, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return the().complain(INVALID_VALUE, "memory of no bytes");
    static uint64_t asked;
    const bool refused = the().refuse == "memory:" + std::to_string(++asked);
    const uint64_t address = refused ? 0 : the().take(bytes);
    if (!address) return OUT_OF_MEMORY;
    the().counts.allocations += !stream->recording;
    if (stream->recording) {
        stream->recording->memory[address] = bytes;
        stream->recording->kept.insert(address);
    }
    the().live[address] = bytes;
    // NaN, whatever the type.
    const auto fresh = [address, bytes] { memset(reinterpret_cast<void*>(address), 0xff, bytes); };
    TRY(the().put(stream, fresh, address));
    return *out = address, SUCCESS;
}
API cuMemFreeAsync(uint64_t address, void* handle) {
    ON(handle);
    const auto block = the().live.find(address);
    if (block == the().live.end()) return the().complain(INVALID_VALUE, "memory is freed that is not there");
    const size_t bytes = block->second;
    const auto poison = [address, bytes] { memset(reinterpret_cast<void*>(address), 0xff, bytes); };
    if (stream->recording) {
        if (!stream->recording->memory.count(address)) {
            stream->broken = true;
            return the().complain(INVALID_VALUE, "a graph frees memory that it has not allocated");
        }
        stream->recording->kept.erase(address);
        the().live.erase(block);
        return the().put(stream, poison, 0, address);
    }
    the().live.erase(block);
    // The addresses of a graph stay its own.
    if (the().outstanding.erase(address)) return the().put(stream, poison);
    return the().put(stream, [address, poison] {
        poison();
        Lock guard(the().lock);
        the().give(address);
    });
}
API cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    ENTER;
    TRY(the().refuse_while_recording("cuMemHostAlloc"));
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == 0 || mapped == MAP_FAILED) return OUT_OF_MEMORY;
    the().page_locked[reinterpret_cast<uint64_t>(mapped)] = bytes;
    return *out = mapped, SUCCESS;
}
API cuMemFreeHost(void* pointer) {
    ENTER;
    TRY(the().refuse_while_recording("cuMemFreeHost"));
    const auto block = the().page_locked.find(reinterpret_cast<uint64_t>(pointer));
    if (block == the().page_locked.end()) return INVALID_VALUE;
    if (the().in_flight[block->first]) return the().failed = the().complain(LAUNCH_FAILED, "page-locked memory is freed that a copy uses");
    munmap(pointer, block->second);
    the().page_locked.erase(block);
    return SUCCESS;
}
// A copy whose part on the host is page-locked runs later, one of other memory leaves or reaches it before the call returns.
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return SUCCESS;
    if (!the().spans(to, bytes)) return the().complain(INVALID_VALUE, "a copy to memory that is not the device's");
    if (stream->recording) {
        stream->broken = true;
        return the().complain(CAPTURE_UNSUPPORTED, "a graph would copy from the host's memory as it is when the graph is launched");
    }
    the().counts.to_device++;
    the().counts.to_device_bytes += bytes;
    const auto start = static_cast<const char*>(from);
    if (const uint64_t held = hold(reinterpret_cast<uint64_t>(from), bytes))
        return the().put(stream, [=] { memcpy(reinterpret_cast<void*>(to), start, bytes), let_go(held); });
    return the().put(stream, [to, copy = std::vector<char>(start, start + bytes)] { memcpy(reinterpret_cast<void*>(to), copy.data(), copy.size()); });
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return SUCCESS;
    if (!the().spans(from, bytes)) return the().complain(INVALID_VALUE, "a copy from memory that is not the device's");
    if (stream->recording) {
        stream->broken = true;
        return the().complain(CAPTURE_UNSUPPORTED, "a graph would copy to the host");
    }
    the().counts.from_device++;
    const auto held = hold(reinterpret_cast<uint64_t>(to), bytes);
    TRY(the().put(stream, [=] {
        memcpy(to, reinterpret_cast<void*>(from), bytes);
        let_go(held);
    }));
    if (held) return SUCCESS;
    the().counts.waits++;
    return the().drain(stream, stream->given);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return SUCCESS;
    if (!the().spans(to, bytes) || !the().spans(from, bytes)) return the().complain(INVALID_VALUE, "a copy of memory that is not the device's");
    the().counts.on_device++;
    return the().put(stream, [=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}
API cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return SUCCESS;
    if (!the().spans(to, bytes)) return the().complain(INVALID_VALUE, "a fill of memory that is not the device's");
    the().counts.fills++;
    return the().put(stream, [=] { memset(reinterpret_cast<void*>(to), byte, bytes); });
}

// Kernels
API cuModuleLoadData(void** out, const void*) {
    ENTER;
    TRY(the().refuse_while_recording("cuModuleLoadData"));
    return *out = new char, SUCCESS;
}
API cuModuleUnload(void* module) { return delete static_cast<char*>(module), SUCCESS; }
API cuModuleGetFunction(void** out, void*, const char* name) {
    ENTER;
    static std::map<std::string, Function*> functions;
    const auto found = functions.find(name);
    if (found != functions.end()) return *out = found->second, SUCCESS;
    // Its code is loaded now.
    TRY(the().refuse_while_recording("the first cuModuleGetFunction of a kernel"));
    const auto kernel = cuda_cpu::kernels().find(name);
    if (kernel == cuda_cpu::kernels().end()) return the().complain(NOT_FOUND, std::string("no kernel ") + name);
    return *out = functions[name] = new Function{kernel->second, name}, SUCCESS;
}
// The compiler places no shared memory here, so a kernel's own counts as none.
API cuFuncGetAttribute(int* value, int attribute, void*) { return attribute == 1 ? (*value = 0, SUCCESS) : NOT_SUPPORTED; }
API cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value > MOST_SHARED) return the().complain(INVALID_VALUE, "more shared memory than a block can have");
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
    *out = stream->broken ? nullptr : stream->recording;
    stream->recording = nullptr;
    return stream->broken ? CAPTURE_INVALIDATED : SUCCESS;
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
    for (const uint64_t address : graph->kept)
        if (!the().outstanding.insert(address).second) return the().complain(INVALID_VALUE, "a graph is launched whose last memory is not freed");
    the().counts.graphs++;
    for (const auto& node : graph->nodes) TRY(the().put(stream, node.run));
    return SUCCESS;
}
API cuGraphExecDestroy(void*) { return SUCCESS; }
API cuGraphDestroy(void* handle) {
    ENTER;
    auto* graph = static_cast<Graph*>(handle);
    if (!the().graphs.erase(graph)) return INVALID_HANDLE;
    // What was launched runs to its end; its memory is given back then.
    TRY(the().drain_all());
    for (const auto& [address, bytes] : graph->memory)
        if (!graph->kept.count(address)) the().give(address);
    return delete graph, SUCCESS;
}
