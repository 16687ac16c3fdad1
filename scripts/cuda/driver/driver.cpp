// libcuda for one device that is this processor: what cudarc and prefixd call of it, with what a GPU's driver would refuse refused.
// Signatures are those of cuda.h. Here: the device, its context, streams and events. Memory is in memory.cpp, kernels and graphs in launch.cpp.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "api.h"
#include "cuda_cpu.h"

namespace {
bool initialised;
thread_local void* current;
char context, pool;  // their addresses are the handles

void print_counts() {
    const auto& c = the().counts;
    fprintf(stderr,
            "stand-in driver: %lu launches, %lu graphs, %lu copies to the device (%lu bytes), %lu from it, %lu on it, %lu fills, %lu allocations, %lu "
            "waits\n",
            c.launches, c.graphs, c.to_device, c.to_device_bytes, c.from_device, c.on_device, c.fills, c.allocations, c.waits);
}
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

int ready() {
    if (!initialised) return NOT_INITIALIZED;
    if (current != &context) return the().complain(INVALID_CONTEXT, "a call of a thread that has no context");
    return the().failed;
}
int on_stream(void* handle, Stream*& stream) {
    TRY(ready());
    const auto found = the().streams.find(static_cast<Stream*>(handle));
    if (found == the().streams.end()) return the().complain(INVALID_HANDLE, "no such stream");
    return stream = *found, SUCCESS;
}

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
        // As a card of compute capability 8.6 has, but few multiprocessors.
        case 16: *value = 4; break;
        case 75: *value = 8; break;
        case 76: *value = 6; break;
        case 97: *value = int(cuda_cpu::MOST_SHARED); break;
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
    TRY(the().refuse_while_any_records("cuCtxSynchronize"));
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
