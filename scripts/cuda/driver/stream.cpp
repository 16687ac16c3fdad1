#include "stream.h"

#include <sys/mman.h>

#include <cstdio>
#include <stdexcept>
#include <utility>

namespace device {
Device& the() {
    static Device& device = *new Device;  // never destroyed: threads may outlive main
    return device;
}
const void* this_thread() {
    static thread_local char mark;
    return &mark;
}

// Addresses that nothing else has. What lies there cannot be read but by work.
constexpr size_t ADDRESSES = size_t(64) << 30;
uint64_t Device::arena() {
    if (!start) {
        void* mapped = mmap(nullptr, ADDRESSES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::runtime_error("no addresses for the device's memory");
        start = next = reinterpret_cast<uint64_t>(mapped);
    }
    return start;
}

static size_t rounded(size_t bytes) {
    size_t size = 512;
    while (size < bytes) size *= 2;
    return size;
}

uint64_t Device::take(size_t bytes) {
    arena();
    // A gap after each, so that what runs past the end meets memory of nobody.
    const size_t size = rounded(bytes + 256);
    if (bytes == 0 || bytes > free_bytes()) return 0;
    auto& free = spare[size];
    uint64_t address;
    if (!free.empty()) {
        address = free.back();
        free.pop_back();
    } else {
        if (next + size > start + ADDRESSES) return 0;
        address = next;
        next += size;
        if (accessible) protect(PROT_READ | PROT_WRITE);
    }
    taken[address] = bytes;
    used += bytes;
    return address;
}

void Device::give(uint64_t address) {
    const auto found = taken.find(address);
    if (found == taken.end()) return;
    used -= found->second;
    spare[rounded(found->second + 256)].push_back(address);
    taken.erase(found);
}

std::map<uint64_t, size_t>::const_iterator Device::within(const std::map<uint64_t, size_t>& all, uint64_t address, size_t bytes) const {
    auto after = all.upper_bound(address);
    if (after == all.begin()) return all.end();
    --after;
    return address + bytes <= after->first + after->second ? after : all.end();
}

int Device::complain(int status, const std::string& why) {
    fprintf(stderr, "stand-in driver: %s (%d)\n", why.c_str(), status);
    return status;
}

// Opening and closing all of it costs more than most work, so it is closed now and then.
void Device::protect(int how) { mprotect(reinterpret_cast<void*>(arena()), next - start, how); }
void Device::open_memory() {
    workers++;
    if (!std::exchange(accessible, true)) protect(PROT_READ | PROT_WRITE);
}
void Device::close_memory() {
    if (--workers > 0 || ++closed % 16 > 0) return;
    accessible = false;
    protect(PROT_NONE);
}

int Device::drain(Stream* stream, uint64_t upto) {
    while (stream->working) idle.wait(lock);
    if (failed) return failed;
    if (stream->done >= upto) return SUCCESS;
    stream->working = true;
    open_memory();
    while (stream->done < upto && !failed) {
        const Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        std::string error;
        lock.unlock();
        try {
            work();
        } catch (const std::exception& e) {
            error = e.what();
        }
        lock.lock();
        stream->done++;
        if (!error.empty()) failed = complain(LAUNCH_FAILED, error);
    }
    close_memory();
    stream->working = false;
    idle.notify_all();
    return failed;
}

int Device::drain_all() {
    for (auto* stream : std::set(streams)) {
        if (const int status = drain(stream, stream->given)) return status;
    }
    return SUCCESS;
}

int Device::put(Stream* stream, Work work) {
    if (failed) return failed;
    if (stream->recording) {
        if (stream->broken) return CAPTURE_INVALIDATED;
        if (stream->thread != this_thread()) return complain(INVALID_VALUE, "work of another thread would get into a graph");
        if (refuse == "graph" && stream->recording->nodes.size() == 20) return refuse_recording(stream, CAPTURE_UNSUPPORTED, "as asked");
        stream->recording->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    append(stream, std::move(work));
    return SUCCESS;
}

void Device::append(Stream* stream, Work work) {
    stream->queue.push_back(std::move(work));
    stream->given++;
}

int Device::refuse_while_recording(const char* call) {
    for (auto* stream : streams) {
        if (!stream->recording || stream->thread != this_thread()) continue;
        return refuse_recording(stream, CAPTURE_UNSUPPORTED, std::string(call) + " while its thread records a graph");
    }
    return SUCCESS;
}

int Device::refuse_while_any_records(const char* call) {
    int status = SUCCESS;
    for (auto* stream : streams) {
        if (stream->recording) status = refuse_recording(stream, CAPTURE_UNSUPPORTED, std::string(call) + " while a thread records a graph");
    }
    return status;
}

int Device::refuse_recording(Stream* stream, int status, const std::string& why) {
    stream->broken = true;
    return complain(status, why);
}
}  // namespace device
