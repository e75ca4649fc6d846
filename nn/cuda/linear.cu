// The linear layer, in the type of parameters.

// y (N, K) = x (N, C) wᵀ + b. One block an image, one warp a class at a time.
extern "C" __global__ void __launch_bounds__(THREADS) linear_forward(
    const REAL* __restrict__ x, const REAL* __restrict__ w, const REAL* __restrict__ b, REAL* __restrict__ y,
    int c, int classes) {
    const REAL* row = x + (size_t)blockIdx.x * c;
    int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < classes; k += blockDim.x / 32) {
        ACC sum = 0;
        for (int i = lane; i < c; i += 32) sum += (ACC)row[i] * (ACC)w[(size_t)k * c + i];
        for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
        if (lane == 0) y[(size_t)blockIdx.x * classes + k] = (REAL)(sum + (ACC)b[k]);
    }
}

// Blocks 0 … n−1: dx of an image; blocks n … n+K−1: dw[k] and db[k].
extern "C" __global__ void __launch_bounds__(THREADS) linear_backward(
    const REAL* __restrict__ dy, const REAL* __restrict__ x, const REAL* __restrict__ w, REAL* dw, REAL* db,
    REAL* dx, int n, int c, int classes) {
    int image = blockIdx.x, k = blockIdx.x - n;
    if (image < n) {
        const REAL* d = dy + (size_t)image * classes;
        for (int i = threadIdx.x; i < c; i += blockDim.x) {
            ACC sum = 0;
            for (int j = 0; j < classes; j++) sum += (ACC)d[j] * (ACC)w[(size_t)j * c + i];
            dx[(size_t)image * c + i] = (REAL)sum;
        }
        return;
    }
    double bias = 0;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        double sum = 0;
#pragma unroll (sizeof(REAL) == 8 ? 4 : 8)  // NVRTC 13 spills on sm_100 with 8 in float64
        for (int m = 0; m < n; m++) sum += (ACC)dy[(size_t)m * classes + k] * (ACC)x[(size_t)m * c + i];
        dw[(size_t)k * c + i] = (REAL)sum;
    }
    if (threadIdx.x == 0) {
#pragma unroll 8
        for (int m = 0; m < n; m++) bias += dy[(size_t)m * classes + k];
        db[k] = (REAL)bias;
    }
}
