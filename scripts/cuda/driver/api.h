// What the calls of the libraries have in common.
#pragma once
#include <string>

#include "stream.h"

using namespace device;
using Lock = std::lock_guard<std::recursive_mutex>;

// Of every call that needs a context: the calling thread must have it.
int ready();
// The stream, or what is wrong with the call.
int on_stream(void* handle, Stream*& stream);

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
