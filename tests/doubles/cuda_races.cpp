// Finds races between the threads of a kernel, and accesses outside its arguments, for cuda_double.py.
//
// -fsanitize=thread makes the compiler call a function before each load and store of a kernel. These are ours.
// They know who wrote each element last and who has read it since, and what orders two accesses:
// * of one thread: its program;
// * of two threads of a block: a block barrier between them (that of a warp does not count);
// * of two blocks: the first fences and then counts in an atomic; the second counts there, and then fences.
//   A thread's fence covers its own accesses, and its block's before the last barrier.
// Blocks run one after another, and a later one finds all earlier ones counted. So a kernel that believes to be
// the last without having looked is found in another order of blocks: run it in more than one.
#include "cuda_races.h"

#include <stdlib.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace cuda_on_cpu {
[[noreturn]] void fail(const std::string& why);
}

namespace {

using cuda_races::NOBODY;
using cuda_races::now;
using cuda_races::Span;

/// The `time`-th access of a launch.
struct Access {
    unsigned block, thread, epoch;  // block 0: there was none
    bool atomic;
    unsigned long long time;
};

/// A block's last read of an element, and whether several of its threads have read it since the same barrier.
struct Reads {
    Access last;
    bool several;
};

/// The last write of an element, and the last block's reads after it.
struct Element {
    Access written;
    Reads read;
    bool by_blocks;   // whether other blocks have read it since: see `earlier`
    bool came, went;  // whether it was ever read, and ever written
};

struct Array {
    Span span;
    Element* elements;  // zeros, allocated as they are touched
    unsigned block;     // whose shared memory it is; 0: an argument
};

struct Memory {
    size_t from, to;
};

/// What a fence of the thread `thread` of this block has made visible to it: all that `by` covers.
struct Acquired {
    Access by;
    unsigned thread, epoch;
};

std::vector<Array> arrays, shared_arrays;
std::vector<Memory> own;                                     // the double's
std::unordered_map<size_t, std::vector<Access>> counted;     // by atomic: the fences of those who counted in it
std::unordered_map<unsigned, Access> fences;                 // by thread of this block: its last
std::unordered_map<unsigned, std::vector<Access>> observed;  // by thread of this block: fences before its own
std::vector<Acquired> acquired;                              // by this block
std::unordered_map<const Element*, std::vector<Reads>> earlier;  // by other blocks than the last that read
unsigned long long accesses = 0, looked_at = 0;  // the latter: of arguments and shared memory

Access access_of_now(bool atomic) { return {now.block, now.thread, now.epoch, atomic, accesses}; }

/// Whether something makes an access come before what the running thread does now; of `several` threads, all.
bool ordered(const Access& before, bool several = false) {
    if (!before.block) return true;
    if (before.block == now.block) return (before.thread == now.thread && !several) || before.epoch != now.epoch;
    for (const Acquired& found : acquired) {
        const bool seen = found.thread == now.thread || found.epoch != now.epoch;
        const bool covered = (found.by.thread == before.thread && !several) || found.by.epoch != before.epoch;
        if (seen && covered && found.by.block == before.block && found.by.time > before.time) return true;
    }
    return false;
}

[[noreturn]] void report(const char* what, const Access& before, const Array& array, size_t index) {
    cuda_on_cpu::fail(std::string("race: ") + what + " " + array.span.name + ", element " +
                      std::to_string(index) + ", after that by thread " + std::to_string(before.thread) +
                      " of the block that ran as number " + std::to_string(before.block) + ", which nothing orders");
}

void read(const Array& array, size_t index, bool atomic) {
    Element& element = array.elements[index];
    if (!(atomic && element.written.atomic) && !ordered(element.written))
        report("read after write of", element.written, array, index);
    const auto [last, several] = element.read;
    const bool together = last.block == now.block && last.epoch == now.epoch;
    if (last.block && last.block != now.block) {
        earlier[&element].push_back(element.read);
        element.by_blocks = true;
    }
    element.read = {access_of_now(atomic), together && (several || last.thread != now.thread)};
    element.came |= !element.went;
}

void write(const Array& array, size_t index, bool atomic) {
    Element& element = array.elements[index];
    if (!(atomic && element.written.atomic) && !ordered(element.written))
        report("write after write of", element.written, array, index);
    const auto look = [&](const Reads& read) {
        if (!(atomic && read.last.atomic) && !ordered(read.last, read.several))
            report("write after read of", read.last, array, index);
    };
    look(element.read);
    if (element.by_blocks) {
        for (const Reads& read : earlier[&element]) look(read);
        earlier.erase(&element);
    }
    element = {access_of_now(atomic), {}, false, element.came, true};
}

[[noreturn]] void report_outside(size_t at, size_t bytes, bool writes) {
    std::string nearest;
    size_t least = ~size_t(0);
    for (const std::vector<Array>* each : {&arrays, &shared_arrays})
        for (const Array& array : *each) {
            const bool before = at < array.span.from;
            const size_t apart = before ? array.span.from - at : at + bytes - array.span.to;
            if (apart >= least) continue;
            least = apart;
            nearest = std::string("; the nearest is ") + array.span.name + ", which it is " +
                      std::to_string(apart) + " bytes " + (before ? "before" : "beyond");
        }
    cuda_on_cpu::fail((writes ? "write" : "read") + std::string(" of ") + std::to_string(bytes) +
                      " bytes outside every argument" + nearest);
}

void access(size_t at, size_t bytes, bool writes, bool atomic = false) {
    if (now.thread == NOBODY) return;
    accesses++;
    for (const std::vector<Array>* each : {&arrays, &shared_arrays})
        for (const Array& array : *each) {
            const Span& span = array.span;
            if (at < span.from || at + bytes > span.to || (array.block && array.block != now.block)) continue;
            looked_at++;
            for (size_t i = (at - span.from) / span.item; span.from + i * span.item < at + bytes; i++)
                (writes ? write : read)(array, i, atomic);
            return;
        }
    for (const Array& array : shared_arrays)
        if (at < array.span.to + cuda_races::RED_ZONE && at + bytes > array.span.to)
            report_outside(at, bytes, writes);
    for (const Memory& memory : own)
        if (at >= memory.from && at + bytes <= memory.to) return;
    report_outside(at, bytes, writes);
}

Array array_of(const Span& span, unsigned block) {
    const size_t count = (span.to - span.from) / span.item + 1;
    return {span, static_cast<Element*>(calloc(count, sizeof(Element))), block};
}

void free_all(std::vector<Array>& all) {
    for (Array& array : all) free(array.elements);
    all.clear();
}

}  // namespace

namespace cuda_races {

Now now;

void begin_block() {
    now.block++, now.epoch = 0;
    free_all(shared_arrays);
    fences.clear(), observed.clear(), acquired.clear();
}

void shared(void* memory, size_t bytes, size_t item) {
    const size_t from = reinterpret_cast<size_t>(memory);
    shared_arrays.push_back(array_of({from, from + bytes, item, "shared memory"}, now.block));
}

void fence() {
    if (now.thread == NOBODY) return;
    accesses++;
    fences[now.thread] = access_of_now(false);
    for (const Access& other : observed[now.thread]) acquired.push_back({other, now.thread, now.epoch});
    observed.erase(now.thread);
}

void atomic(void* address, size_t bytes) {
    const size_t at = reinterpret_cast<size_t>(address);
    access(at, bytes, true, true);
    std::vector<Access>&others = counted[at], &seen = observed[now.thread];
    seen.insert(seen.end(), others.begin(), others.end());
    if (const auto own = fences.find(now.thread); own != fences.end()) others.push_back(own->second);
}

void own_memory(size_t from, size_t to) { own.push_back({from, to}); }

}  // namespace cuda_races

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

/// Before a launch: the arrays among its arguments, and the memory of these, which is the double's.
EXPORTED void races_begin(const Span* spans, int count, size_t slots, size_t bytes) {
    now = {}, accesses = looked_at = 0;
    counted.clear(), earlier.clear(), free_all(arrays), free_all(shared_arrays);
    for (int i = 0; i < count; i++) arrays.push_back(array_of(spans[i], 0));
    own = {{reinterpret_cast<size_t>(&__ehdr_start), reinterpret_cast<size_t>(&_end)}, {slots, slots + bytes}};
}

/// Loads and stores of the last launch, those of a thread's own memory apart.
EXPORTED unsigned long long races_accesses() { return looked_at; }

/// Bytes that the last launch had to bring from memory and to bring back, each once.
EXPORTED unsigned long long races_bytes() {
    unsigned long long bytes = 0;
    for (const Array& array : arrays)
        for (size_t i = 0; i < (array.span.to - array.span.from) / array.span.item; i++)
            bytes += array.span.item * (array.elements[i].came + array.elements[i].went);
    return bytes;
}

extern "C" {
#define ACCESS(BYTES)                                                            \
    void __tsan_read##BYTES(size_t at) { access(at, BYTES, false); }             \
    void __tsan_write##BYTES(size_t at) { access(at, BYTES, true); }             \
    void __tsan_unaligned_read##BYTES(size_t at) { access(at, BYTES, false); }   \
    void __tsan_unaligned_write##BYTES(size_t at) { access(at, BYTES, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(size_t at, size_t bytes) { access(at, bytes, false); }
void __tsan_write_range(size_t at, size_t bytes) { access(at, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
