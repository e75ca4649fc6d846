// CUDA C++ on the CPU, for cuda_double.py: blocks run one after another, the threads of a block as fibers.
//
// A fiber runs until it waits at a barrier or a warp primitive, or ends. A warp primitive completes when all
// lanes of its mask that have not exited are at it; a block barrier when all threads that have not exited are.
// Where nobody can go on, the launch fails. So it does where CUDA leaves the result undefined: barriers
// of one block on different lines, a lane outside its own mask, an index outside an array of known size.
// A value shuffled from a lane that takes no part, and shared memory before it is written, are all ones (NaN).
#pragma once
#include <cmath>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_races.h"

// -------------------------------------------------------------------- types and built-in variables
#define VECTOR1(T, X) struct X##1 { T x; }; static inline X##1 make_##X##1(T x) { return {x}; }
#define VECTOR2(T, X) struct alignas(2 * sizeof(T)) X##2 { T x, y; }; \
    static inline X##2 make_##X##2(T x, T y) { return {x, y}; }
#define VECTOR3(T, X) struct X##3 { T x, y, z; }; \
    static inline X##3 make_##X##3(T x, T y, T z) { return {x, y, z}; }
#define VECTOR4(T, X) struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) X##4 { T x, y, z, w; }; \
    static inline X##4 make_##X##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define VECTORS(T, X) VECTOR1(T, X) VECTOR2(T, X) VECTOR3(T, X) VECTOR4(T, X)
VECTORS(float, float)
VECTORS(double, double)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(long long, longlong)
VECTORS(unsigned long long, ulonglong)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(signed char, char)
VECTORS(unsigned char, uchar)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

uint3 threadIdx, blockIdx;  // not static: the compiler must expect every barrier to change them
dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------ the fibers
namespace cuda_on_cpu {

enum class Status { ready, at_warp, at_block, done };

struct Fiber {
    jmp_buf state;
    ucontext_t first;  // entered once; later switches go through `state`
    bool entered = false;
    Status status = Status::done;
    uint3 index;
    const char* call;  // of the primitive it waits at
    int line;
    unsigned mask;
    int source;  // lane whose value it asks for; -1: the votes
    unsigned long long value, result;
};

constexpr int MAX_THREADS = 1024;
constexpr size_t PAGE = 4096, STACK = 256 << 10;  // bytes; the lowest page of a stack is a guard

std::vector<Fiber> fibers(MAX_THREADS);
char* stacks = nullptr;
Fiber* current = nullptr;
jmp_buf home;
int threads = 0;  // of a block
unsigned long long block_serial = 0;
std::string error;
void (*body)(char*) = nullptr;
char* arguments = nullptr;

/// Leave the current fiber for the scheduler until that resumes it.
__attribute__((noipa)) void suspend() {
    if (!_setjmp(current->state)) _longjmp(home, 1);
}

/// Make the launch fail; the fiber never goes on.
[[noreturn]] __attribute__((noipa)) void fail(const std::string& why) {
    cuda_races::now.thread = cuda_races::NOBODY;
    error = why + ", thread (" + std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ", " +
            std::to_string(threadIdx.z) + ") of block (" + std::to_string(blockIdx.x) + ", " +
            std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    _longjmp(home, 1);
}

void enter() {
    for (;;) {
        body(arguments);
        current->status = Status::done;
        suspend();
    }
}

__attribute__((noipa)) void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(home)) {
        cuda_races::now.thread = cuda_races::NOBODY;
        return;
    }
    cuda_races::now.thread = &fiber - fibers.data();
    if (fiber.entered) _longjmp(fiber.state, 1);
    fiber.entered = true;
    setcontext(&fiber.first);
}

/// Wait at a primitive; what it gives this thread.
__attribute__((noipa)) unsigned long long wait(Status status, const char* call, int line, unsigned mask,
                                               int source, unsigned long long value) {
    Fiber& self = *current;
    self.status = status;
    self.call = call, self.line = line, self.mask = mask, self.source = source, self.value = value;
    suspend();
    return current->result;
}

inline int lane() { return (current - fibers.data()) % warpSize; }

inline unsigned long long wait_warp(const char* call, int line, unsigned mask, int source,
                                    unsigned long long value) {
    if (!(mask >> lane() & 1))
        fail(std::string(call) + ": the calling lane is not in its mask, line " + std::to_string(line));
    return wait(Status::at_warp, call, line, mask, source, value);
}

/// Complete the warp primitives of the warp that starts at thread `base`; whether there was one.
bool release_warp(int base) {
    const int lanes = std::min(warpSize, threads - base);
    Fiber* warp = &fibers[base];
    bool released = false;
    for (int i = 0; i < lanes; i++) {
        if (warp[i].status != Status::at_warp) continue;
        unsigned group = 0, votes = 0;
        bool complete = true;
        for (int j = 0; j < lanes; j++) {
            if (!(warp[i].mask >> j & 1) || warp[j].status == Status::done) continue;
            complete &= warp[j].status == Status::at_warp && warp[j].mask == warp[i].mask &&
                        strcmp(warp[j].call, warp[i].call) == 0;
            group |= 1u << j;
            votes |= unsigned(warp[j].value != 0) << j;
        }
        if (!complete) continue;
        for (int j = 0; j < lanes; j++) {
            if (!(group >> j & 1)) continue;
            const int source = warp[j].source;
            warp[j].result = source < 0 ? votes | (unsigned long long)group << 32
                             : group >> source & 1 ? warp[source].value : ~0ull;
            warp[j].status = Status::ready;
        }
        released = true;
    }
    return released;
}

/// Complete the block barrier if all live threads are at it; false, maybe with `error`, if not.
bool release_block() {
    unsigned long long live = 0, votes = 0;
    const Fiber* first = nullptr;
    for (int t = 0; t < threads; t++) {
        const Fiber& fiber = fibers[t];
        if (fiber.status == Status::done) continue;
        if (fiber.status != Status::at_block) return false;
        if (!first) first = &fiber;
        if (fiber.line != first->line) {
            error = "threads of a block wait at different barriers, lines " + std::to_string(first->line) +
                    " and " + std::to_string(fiber.line);
            return false;
        }
        live++, votes += fiber.value != 0;
    }
    for (int t = 0; t < threads; t++) {
        if (fibers[t].status == Status::done) continue;
        fibers[t].status = Status::ready, fibers[t].result = votes | live << 32;
    }
    cuda_races::now.epoch++;
    return true;
}

/// Where the threads wait of which none can go on.
std::string deadlock() {
    std::string places;
    int counted = 0;
    for (int t = 0; t < threads; t++) {
        const Fiber& fiber = fibers[t];
        if (fiber.status == Status::done) continue;
        const std::string place = std::string(fiber.call) + " on line " + std::to_string(fiber.line);
        if (places.find(place) == std::string::npos && counted++ < 4)
            places += (places.empty() ? "" : ", ") + place;
    }
    return "divergent barrier, no thread can go on: they wait at " + places;
}

/// Run one block; `order` lists its threads, warp by warp. Each warp runs as far as it can before the next.
void run_block(const std::vector<int>& order) {
    for (int t = 0; t < threads; t++) fibers[t].status = Status::ready;
    block_serial++;
    cuda_races::begin_block();
    for (;;) {
        for (size_t from = 0, to; from < order.size(); from = to) {
            const int warp = order[from] / warpSize;
            for (to = from; to < order.size() && order[to] / warpSize == warp;) to++;
            do {
                for (size_t i = from; i < to; i++) {
                    if (fibers[order[i]].status != Status::ready) continue;
                    resume(fibers[order[i]]);
                    if (!error.empty()) return;
                }
            } while (release_warp(warp * warpSize));
        }
        bool finished = true;
        for (int t = 0; t < threads; t++) finished &= fibers[t].status == Status::done;
        if (finished) return;
        if (!release_block()) {
            if (error.empty()) error = deadlock();
            return;
        }
    }
}

enum Order { FORWARD, REVERSE, SHUFFLED };

template <class Random>
std::vector<int> permutation(int count, Order order, Random& random) {
    std::vector<int> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == REVERSE) std::reverse(numbers.begin(), numbers.end());
    if (order == SHUFFLED) std::shuffle(numbers.begin(), numbers.end(), random);
    return numbers;
}

template <class Random>
std::vector<int> thread_order(Order order, Random& random) {
    std::vector<int> result;
    for (int warp : permutation((threads + warpSize - 1) / warpSize, order, random))
        for (int lane : permutation(std::min(warpSize, threads - warp * warpSize), order, random))
            result.push_back(warp * warpSize + lane);
    return result;
}

bool prepare() {
    if (!stacks) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, MAX_THREADS * STACK, PROT_NONE, flags, -1, 0);
        if (memory == MAP_FAILED) return false;
        stacks = static_cast<char*>(memory);
    }
    for (int t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        if (fiber.entered) continue;
        char* stack = stacks + t * STACK + PAGE;
        if (mprotect(stack, STACK - PAGE, PROT_READ | PROT_WRITE)) return false;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stack;
        fiber.first.uc_stack.ss_size = STACK - PAGE;  // else all tops share few cache lines
        fiber.first.uc_link = nullptr;
        makecontext(&fiber.first, enter, 0);
    }
    return true;
}

/// Run a grid; the error, "" if there was none.
const char* launch(void (*kernel)(char*), const unsigned* shape, char* slots, Order order, unsigned seed) {
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    threads = blockDim.x * blockDim.y * blockDim.z;
    body = kernel, arguments = slots;
    error.clear();
    if (!prepare()) return "no memory for the stacks of the fibers";
    cuda_races::own_memory(size_t(stacks), size_t(stacks + MAX_THREADS * STACK));
    cuda_races::own_memory(size_t(fibers.data()), size_t(fibers.data() + MAX_THREADS));
    std::minstd_rand random(seed + 1);
    std::vector<int> threads_in_order = thread_order(order, random);
    for (unsigned number : permutation(gridDim.x * gridDim.y * gridDim.z, order, random)) {
        blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / (gridDim.x * gridDim.y)};
        if (order == SHUFFLED) threads_in_order = thread_order(order, random);
        run_block(threads_in_order);
        if (error.empty()) continue;
        for (Fiber& fiber : fibers) fiber.entered = false;  // some stopped midway: start them anew
        break;
    }
    return error.c_str();
}

/// Memory of one `__shared__` variable; each block finds it full of ones. `Where` is a type per variable.
template <class T, class Where>
struct Shared {
    struct Place {
        alignas(16) T memory;
        char red_zone[cuda_races::RED_ZONE];  // what runs past the end lands here
    };
    static inline Place place;
    static inline T& memory = place.memory;
    static inline unsigned long long filled = 0;

    __attribute__((always_inline)) static T& get() {
        if (filled != block_serial) {
            fill();
            cuda_races::shared(&memory, sizeof memory, sizeof(std::remove_all_extents_t<T>));
            filled = block_serial;
        }
        return memory;
    }

    __attribute__((noinline, no_sanitize("thread"))) static void fill() {
        memset((void*)&memory, 0xff, sizeof memory);
    }
};

/// NumPy's name of a parameter's type, with `const` and `*` for pointers; "?" where it has none.
template <class T>
std::string type_name() {
    using Pointee = std::remove_pointer_t<T>;
    if constexpr (std::is_pointer_v<T>)
        return (std::is_const_v<Pointee> ? "const " : "") + type_name<std::remove_cv_t<Pointee>>() + "*";
    else if constexpr (std::is_void_v<T>) return "void";
    else if constexpr (std::is_same_v<T, bool>) return "bool";
    else if constexpr (std::is_floating_point_v<T>) return "float" + std::to_string(8 * sizeof(T));
    else if constexpr (std::is_integral_v<T>)
        return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
    else if constexpr (sizeof(T) == 2) return "uint16";  // a struct that holds a bfloat16
    else return "?";
}

struct Kernel {
    void (*call)(char*);
    std::string types;  // of the parameters, joined by ";"
    int bound;          // of __launch_bounds__
};

template <auto F>
struct Launcher;

template <class... P, void (*F)(P...)>
struct Launcher<F> {
    template <size_t... I>
    static void spread(char* slots, std::index_sequence<I...>) {
        F(*reinterpret_cast<std::remove_cv_t<P>*>(slots + 8 * I)...);
    }
    static void call(char* slots) { spread(slots, std::index_sequence_for<P...>()); }
    static Kernel kernel(int bound) { return {call, ((type_name<P>() + ";") + ... + ""), bound}; }
};

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) >= sizeof(From));
    To to{};
    memcpy(&to, &from, sizeof from);
    return to;
}

template <class T>
inline T shuffle(const char* call, int line, unsigned mask, T value, int source) {
    static_assert(std::is_arithmetic_v<T>, "CUDA shuffles int, long long, float and double");
    const unsigned long long result = wait_warp(call, line, mask, source, bits<unsigned long long>(value));
    T to;
    memcpy(&to, &result, sizeof to);
    return to;
}

}  // namespace cuda_on_cpu

// --------------------------------------------------------- barriers, warp primitives, fences, atomics
#define HERE int line = __builtin_LINE()

static inline unsigned long long syncthreads_votes(int predicate, int line) {
    return cuda_on_cpu::wait(cuda_on_cpu::Status::at_block, "__syncthreads", line, 0, 0, predicate != 0);
}
static inline void __syncthreads(HERE) { syncthreads_votes(0, line); }
static inline int __syncthreads_count(int predicate, HERE) { return int(syncthreads_votes(predicate, line)); }
static inline int __syncthreads_or(int predicate, HERE) { return int(syncthreads_votes(predicate, line)) != 0; }
static inline int __syncthreads_and(int predicate, HERE) {
    const unsigned long long votes = syncthreads_votes(predicate, line);
    return int(votes) == int(votes >> 32);
}

static inline void __syncwarp(unsigned mask = 0xffffffff, HERE) {
    cuda_on_cpu::wait_warp("__syncwarp", line, mask, -1, 0);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, HERE) {
    return unsigned(cuda_on_cpu::wait_warp("__ballot_sync", line, mask, -1, predicate != 0));
}
static inline int __any_sync(unsigned mask, int predicate, HERE) {
    return unsigned(cuda_on_cpu::wait_warp("__any_sync", line, mask, -1, predicate != 0)) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, HERE) {
    const unsigned long long votes = cuda_on_cpu::wait_warp("__all_sync", line, mask, -1, predicate != 0);
    return unsigned(votes) == unsigned(votes >> 32);
}

template <class T>
auto __shfl_sync(unsigned mask, T value, int from, int width = warpSize, HERE) {
    const int base = cuda_on_cpu::lane() & ~(width - 1);
    return cuda_on_cpu::shuffle("__shfl_sync", line, mask, +value, base + (from & (width - 1)));
}
template <class T>
auto __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HERE) {
    const int lane = cuda_on_cpu::lane(), from = lane - int(delta);
    return cuda_on_cpu::shuffle("__shfl_up_sync", line, mask, +value, from < (lane & ~(width - 1)) ? lane : from);
}
template <class T>
auto __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HERE) {
    const int lane = cuda_on_cpu::lane(), from = lane + int(delta);
    return cuda_on_cpu::shuffle("__shfl_down_sync", line, mask, +value, from > (lane | (width - 1)) ? lane : from);
}
template <class T>
auto __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, HERE) {
    const int lane = cuda_on_cpu::lane(), from = lane ^ bits;
    return cuda_on_cpu::shuffle("__shfl_xor_sync", line, mask, +value, from > (lane | (width - 1)) ? lane : from);
}

static inline void __threadfence() { cuda_races::fence(); }
static inline void __threadfence_block() {}
static inline void __threadfence_system() { cuda_races::fence(); }

template <class T> using same = std::common_type_t<T>;  // keeps a parameter out of template deduction
#define UNSEEN __attribute__((noinline, no_sanitize("thread")))
#define ATOMIC(NAME, NEW)                       \
    template <class T>                          \
    UNSEEN T NAME(T* p, same<T> v) {            \
        cuda_races::atomic((void*)p, sizeof *p); \
        T old = *p;                             \
        *p = NEW;                               \
        return old;                             \
    }
ATOMIC(atomicAdd, old + v)
ATOMIC(atomicSub, old - v)
ATOMIC(atomicExch, v)
ATOMIC(atomicMin, v < old ? v : old)
ATOMIC(atomicMax, old < v ? v : old)
ATOMIC(atomicAnd, old & v)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicXor, old ^ v)
ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T> UNSEEN T atomicCAS(T* p, same<T> expected, same<T> v) {
    cuda_races::atomic((void*)p, sizeof *p);
    T old = *p;
    if (old == expected) *p = v;
    return old;
}

// ------------------------------------------------------------------------------------- mathematics
// min and max of a NaN and a number give the number, as in CUDA.
template <class A, class B>
auto min(A a, B b) {
    using T = decltype(a + b);
    if constexpr (std::is_floating_point_v<T>) return T(std::fmin(T(a), T(b)));
    else return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
auto max(A a, B b) {
    using T = decltype(a + b);
    if constexpr (std::is_floating_point_v<T>) return T(std::fmax(T(a), T(b)));
    else return T(a) < T(b) ? T(b) : T(a);
}

static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline float rsqrt(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / ::sqrt(x); }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline int __float2int_rn(float x) { return int(lrintf(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
static inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
static inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }
static inline int __mulhi(int x, int y) { return (long long)x * y >> 32; }
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned __int128)x * y >> 64;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, same<T> v) { *p = v; }
template <class T> void __stcs(T* p, same<T> v) { *p = v; }
#define __expf(x) expf(x)  // glibc declares functions of these names
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __trap() cuda_on_cpu::fail("__trap, line " + std::to_string(__LINE__))
#define __builtin_assume(x) ((void)0)

// -------------------------------------------------------------------------------------- keywords
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))  // CUDA takes it in more places than the C++ standard
#define __launch_bounds__(...)

// ------------------------------------------------- called by -fsanitize, in place of its own library
struct UbsanSource {
    const char* file;
    unsigned line, column;
};
#define UBSAN(NAME, WHY, ...)                                                                              \
    extern "C" [[noreturn]] __attribute__((used)) void __ubsan_handle_##NAME##_abort(UbsanSource* at, ##__VA_ARGS__) { \
        cuda_on_cpu::fail(WHY ", line " + std::to_string(at->line));                                       \
    }
UBSAN(out_of_bounds, "index outside an array")
UBSAN(divrem_overflow, "integer division by zero")
UBSAN(type_mismatch_v1, "misaligned or null pointer")
UBSAN(add_overflow, "integer overflow")
UBSAN(sub_overflow, "integer overflow")
UBSAN(mul_overflow, "integer overflow")
UBSAN(negate_overflow, "integer overflow")

// ------------------------------------------------- what Python calls; `kernels` is generated
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define KERNELS(...)                                                                                       \
    static const std::vector<cuda_on_cpu::Kernel> kernels = {__VA_ARGS__};                                 \
    EXPORTED const char* kernel_types(int number) { return kernels[number].types.c_str(); }                \
    EXPORTED int kernel_bound(int number) { return kernels[number].bound; }                                \
    EXPORTED const char* launch(int number, const unsigned* shape, char* slots, int order, unsigned seed) { \
        return cuda_on_cpu::launch(kernels[number].call, shape, slots, cuda_on_cpu::Order(order), seed);   \
    }
