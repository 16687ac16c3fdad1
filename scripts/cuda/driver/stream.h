// The device of the stand-in driver: memory, streams, events and recorded graphs, without the names that libcuda gives them.
//
// Work runs when somebody waits for it and not before (but for who asks a thousand times whether it is done, and streams that end), so
// a copy from memory that has changed meanwhile, a buffer that was freed too early and a missing wait give wrong results every time, where a
// GPU gives them now and then. Device memory holds NaN until something is written to it. It is closed to all but work after every 16th wait.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace device {
// Codes of cuda.h.
enum Status {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
    NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901,
};

using Work = std::function<void()>;

struct Stream;
struct Graph {
    std::vector<Work> nodes;
    std::set<uint64_t> memory;  // what its nodes allocate: the same addresses at every launch
    std::set<uint64_t> kept;    // of it, what they do not free
    Stream* launched = nullptr;
};
struct Stream {
    std::deque<Work> queue;
    uint64_t given = 0, done = 0;
    Graph* recording = nullptr;
    bool broken = false;   // the recording
    bool working = false;  // a thread runs its queue
    // Of the thread that records.
    const void* thread = nullptr;
};
struct Event {
    bool timing;
    Stream* stream = nullptr;  // the last one that it was recorded on
    uint64_t at = 0;
    bool captured = false;
    double seconds = 0;
};

// How often each thing was done, for `CUDA_STAND_IN_LOG`.
struct Counts {
    uint64_t launches, graphs, to_device, to_device_bytes, from_device, on_device, fills, allocations, waits;
};

// All of it, behind one lock.
struct Device {
    std::recursive_mutex lock;
    std::condition_variable_any idle;  // a stream's queue is nobody's
    Counts counts{};
    std::string refuse;    // "graph": what is recorded; "memory:N": the N-th piece
    int failed = SUCCESS;  // a failure of work stays, as a context's does
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Graph*> graphs;
    std::map<uint64_t, size_t> live;         // memory that a caller may name now
    std::map<uint64_t, size_t> page_locked;  // of the host
    std::map<uint64_t, int> in_flight;       // copies from or to page-locked memory that have not run

    // Takes an address for `bytes`, or 0. `give` puts it back.
    uint64_t take(size_t bytes);
    void give(uint64_t address);
    size_t free_bytes() const { return total - used; }
    size_t total = size_t(8) << 30, used = 0;

    // Whether all of it is one live allocation.
    bool spans(uint64_t address, size_t bytes) const { return within(live, address, bytes) != live.end(); }
    std::map<uint64_t, size_t>::const_iterator within(const std::map<uint64_t, size_t>& all, uint64_t address, size_t bytes) const;

    // Runs what the stream was given, up to number `upto`. The lock, which the caller has taken once, is free meanwhile.
    int drain(Stream* stream, uint64_t upto);
    int drain_all();
    // Puts work at the end of the stream, whether or not it records; `put`: or of what it records.
    void append(Stream* stream, Work work);
    int put(Stream* stream, Work work);
    // What the calling thread may not do while it records.
    int refuse_while_recording(const char* call);
    // What nobody may do while any thread records: wait for the whole context. It spoils that recording.
    int refuse_while_any_records(const char* call);
    // Makes the recording worthless, and says why.
    int refuse_recording(Stream* stream, int status, const std::string& why);
    int complain(int status, const std::string& why);

  private:
    uint64_t arena();
    void protect(int how);
    void open_memory();
    void close_memory();
    bool accessible = false;
    int workers = 0, closed = 0;
    uint64_t start = 0, next = 0;
    std::map<uint64_t, size_t> taken;
    std::map<size_t, std::vector<uint64_t>> spare;
};
Device& the();
const void* this_thread();
}  // namespace device
