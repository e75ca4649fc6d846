// The double's side of cuda_races.cpp: what it tells of the kernel that runs. Nothing without RACES.
#pragma once
#include <stddef.h>

namespace cuda_races {

/// An array among a kernel's arguments.
struct Span {
    size_t from, to, item;  // addresses, bytes of an element
    const char* name;       // of the parameter
};

constexpr unsigned NOBODY = ~0u;
constexpr size_t RED_ZONE = 1 << 16;  // bytes behind shared memory that nobody may touch

/// Who runs.
struct Now {
    unsigned block = 0, thread = NOBODY;  // blocks count from 1 on
    unsigned epoch = 0;                   // barriers of the block so far
};

#ifdef RACES
extern Now now;
void begin_block();
void shared(void* memory, size_t bytes, size_t item);  // found anew, by a block
void fence();
void atomic(void* address, size_t bytes);
void own_memory(size_t from, size_t to);  // of the double, not of the kernel: for one launch
#else
static Now now;
static inline void begin_block() {}
static inline void shared(void*, size_t, size_t) {}
static inline void fence() {}
static inline void atomic(void*, size_t) {}
static inline void own_memory(size_t, size_t) {}
#endif

}  // namespace cuda_races
