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

// A rank's step counter, which lives on the device: a captured step reads it, so that the host only replays.
// Sizes and indices of vectors too.
typedef long long Step;

// The elements of a vector that a thread takes: from its number on, in steps of the grid's threads.
static __device__ __forceinline__ Step first_of_thread() {
    return (Step)blockIdx.x * blockDim.x + threadIdx.x;
}
static __device__ __forceinline__ Step threads_of_grid() { return (Step)gridDim.x * blockDim.x; }

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
