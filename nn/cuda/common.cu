// What all kernels share. ELEM is the type of activations in memory, REAL that of parameters and gradients,
// ACC that of arithmetic on both; `nn/cuda/kernels.py` defines them. Sums over images end in double.
// Activations are dense N×H×W×C; a row is one pixel of one image: C values.
// No headers and no atomics on floating-point numbers: the same bits come out of every run.

#define AHEAD 4  // partial results that a thread loads at once

#ifdef BFLOAT16
struct bf16 { unsigned short bits; };  // the upper half of a float32

static __device__ __forceinline__ ACC value(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

static __device__ __forceinline__ bf16 element(ACC x) {  // to nearest, ties to even; NaN stays NaN
    unsigned bits = __float_as_uint(x);
    unsigned rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    return bf16{(unsigned short)(rounded >> 16)};
}
#else
static __device__ __forceinline__ ACC value(ELEM x) { return x; }
static __device__ __forceinline__ ELEM element(ACC x) { return x; }
#endif

// Neighbours in memory, which a thread loads and stores at once. In bfloat16 PACK is 2: one at a time, a warp
// would ask for half of what memory gives at once.
template <class T, int P> struct alignas(P * sizeof(T)) Pack { T at[P]; };

template <int P, class T> static __device__ __forceinline__ Pack<T, P> load(const T* from) {
    return *reinterpret_cast<const Pack<T, P>*>(from);
}
template <class T, int P> static __device__ __forceinline__ void store(T* to, const Pack<T, P>& x) {
    *reinterpret_cast<Pack<T, P>*>(to) = x;
}

template <int P> struct Width {  // a number that the compiler knows, as an argument
    __device__ constexpr operator int() const { return P; }
};

// Calls body(width): how many of its c channels a thread takes at once.
template <class Body> static __device__ __forceinline__ void over_channels(int c, Body body) {
    if (c % PACK == 0) body(Width<PACK>());
    else body(Width<1>());
}

// A rank's step counter, which lives on the device: a captured step reads it, so that the host only replays.
// Sizes and indices of vectors too.
typedef long long Step;

// The elements of a vector that a thread takes: from its number on, in steps of the grid's threads.
static __device__ __forceinline__ Step first_of_thread() {
    return (Step)blockIdx.x * blockDim.x + threadIdx.x;
}
static __device__ __forceinline__ Step threads_of_grid() { return (Step)gridDim.x * blockDim.x; }

template <class T> static __device__ __forceinline__ bool aligned(const T* array) {
    return reinterpret_cast<size_t>(array) % (PACK * sizeof(T)) == 0;
}

// Calls body(width, i) for the elements of a vector, `width` of them from the i-th on at once. `arrays` are all
// that it goes through: a slice of a vector may begin anywhere.
template <class Body, class... T>
static __device__ __forceinline__ void over_vector(Step size, Body body, const T*... arrays) {
    Step packs = PACK > 1 && (aligned(arrays) && ...) ? size / PACK : 0;
#pragma unroll 2
    for (Step i = first_of_thread(); i < packs; i += threads_of_grid()) body(Width<PACK>(), i * PACK);
#pragma unroll (PACK > 1 ? 1 : 4)
    for (Step i = packs * PACK + first_of_thread(); i < size; i += threads_of_grid()) body(Width<1>(), i);
}

// x · y + z, rounded once, in every kernel alike: what the forward let through, the backward must find again.
static __device__ __forceinline__ ACC multiply_add(ACC x, ACC y, ACC z) { return fma(x, y, z); }

// Sums over threadIdx.y of a block (blockDim.x, blockDim.y a power of two), of COUNT values at once; `shared`:
// COUNT doubles a thread.
template <int COUNT>
static __device__ __forceinline__ void sum_over_lanes(double (&x)[COUNT], double* shared) {
    int threads = blockDim.x * blockDim.y, at = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int k = 0; k < COUNT; k++) shared[k * threads + at] = x[k];
    __syncthreads();
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        if (threadIdx.y < half)
#pragma unroll
            for (int k = 0; k < COUNT; k++)
                shared[k * threads + at] += shared[k * threads + at + half * blockDim.x];
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) x[k] = shared[k * threads + threadIdx.x];
    __syncthreads();  // `shared` may be used again at once
}

static __device__ double sum_over_lanes(double x, double* shared) {
    double one[1] = {x};
    sum_over_lanes(one, shared);
    return one[0];
}

// True in all threads of the block that comes last of gridDim.x; they see what the others wrote before. The
// counter is left at zero for the next launch. One thread fences for its block: the barriers carry it on.
static __device__ bool last_to_arrive(unsigned* arrived) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        if (last) {
            __threadfence();
            *arrived = 0;
        }
    }
    return __syncthreads_or(last);
}
