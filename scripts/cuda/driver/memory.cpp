// libcuda: memory of the device, page-locked memory of the host, and copies.
#include <sys/mman.h>

#include <cstring>

#include "api.h"

namespace {
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

API cuMemAllocAsync(uint64_t* out, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return the().complain(INVALID_VALUE, "memory of no bytes");
    static uint64_t asked;
    const bool refused = the().refuse == "memory:" + std::to_string(++asked);
    uint64_t address = refused ? 0 : the().take(bytes);
    if (!address && !refused && !stream->recording) {
        // What the stream frees is its own to take again.
        TRY(the().drain(stream, stream->given));
        address = the().take(bytes);
    }
    if (!address) return OUT_OF_MEMORY;
    // NaN, whatever the type.
    if (const int status = the().put(stream, [address, bytes] { memset(reinterpret_cast<void*>(address), 0xff, bytes); })) return the().give(address), status;
    the().counts.allocations += !stream->recording;
    if (stream->recording) stream->recording->memory.insert(address), stream->recording->kept.insert(address);
    the().live[address] = bytes;
    return *out = address, SUCCESS;
}
API cuMemFreeAsync(uint64_t address, void* handle) {
    ON(handle);
    const auto block = the().live.find(address);
    if (block == the().live.end()) return the().complain(INVALID_VALUE, "memory is freed that is not there");
    const size_t bytes = block->second;
    const auto poison = [address, bytes] { memset(reinterpret_cast<void*>(address), 0xff, bytes); };
    if (stream->recording) {
        if (!stream->recording->memory.count(address)) return the().refuse_recording(stream, INVALID_VALUE, "a graph frees memory that it has not allocated");
        // The address stays the graph's own.
        stream->recording->kept.erase(address);
        the().live.erase(block);
        return the().put(stream, poison);
    }
    the().live.erase(block);
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
    if (stream->recording) return the().refuse_recording(stream, CAPTURE_UNSUPPORTED, "a graph would copy from the host's memory as it is when the graph is launched");
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
    if (stream->recording) return the().refuse_recording(stream, CAPTURE_UNSUPPORTED, "a graph would copy to the host");
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
    the().counts.on_device += !stream->recording;
    return the().put(stream, [=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}
API cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void* handle) {
    ON(handle);
    if (bytes == 0) return SUCCESS;
    if (!the().spans(to, bytes)) return the().complain(INVALID_VALUE, "a fill of memory that is not the device's");
    the().counts.fills += !stream->recording;
    return the().put(stream, [=] { memset(reinterpret_cast<void*>(to), byte, bytes); });
}
