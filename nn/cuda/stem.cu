// The first convolution of images with one channel: 3×3, padding 1.

// The nine pixels around pixel (i, j) of an image, 0 outside it.
static __device__ __forceinline__ void neighbours(
    const ELEM* image, int i, int j, int h, int w, ACC around[9]) {
#pragma unroll
    for (int k = 0; k < 9; k++) {
        int y = i + k / 3 - 1, x = j + k % 3 - 1;
        around[k] = y >= 0 && y < h && x >= 0 && x < w ? value(image[y * w + x]) : (ACC)0;
    }
}

// z (N, H, W, O) = x (N, H, W) * weights (O, 3, 3). A thread has one channel; a warp reads the same pixels.
extern "C" __global__ void __launch_bounds__(THREADS) stem_forward(
    const ELEM* __restrict__ x, const ELEM* __restrict__ weights, ELEM* __restrict__ z, int n, int h, int w,
    int c) {
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    ACC kernel[9], around[9];
    for (int k = 0; k < 9; k++) kernel[k] = value(weights[channel * 9 + k]);
    int rows = n * h * w;
    for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        int j = row % w, i = row / w % h;
        neighbours(x + (size_t)(row / w / h) * h * w, i, j, h, w, around);
        ACC sum = 0;
#pragma unroll
        for (int k = 0; k < 9; k++) sum = multiply_add(around[k], kernel[k], sum);
        z[(size_t)row * c + channel] = element(sum);
    }
}

// dw (O, 3, 3) = Σ over pixels of dz · the nine pixels around. partial (gridDim.x, 9, C), arrived: zeros.
// A thread takes RUN pixels in a row, so that it divides once for them and can load ahead.
extern "C" __global__ void __launch_bounds__(THREADS, 3) stem_weight_gradient(
    const ELEM* __restrict__ x, const ELEM* __restrict__ dz, double* partial, unsigned* arrived, REAL* dw,
    int n, int h, int w, int c) {
    __shared__ double shared[9 * THREADS];
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    double sum[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    int rows = n * h * w, runs = gridDim.x * blockDim.y;
    for (int first = (blockIdx.x * blockDim.y + threadIdx.y) * RUN; channel < c && first < rows;
         first += RUN * runs) {
        int j = first % w, i = first / w % h;
        const ELEM* image = x + (size_t)(first / w / h) * h * w;
        ACC part[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0}, around[9];
#pragma unroll
        for (int run = 0; run < RUN; run++) {
            bool here = first + run < rows;
            ACC g = here ? value(dz[(size_t)(first + run) * c + channel]) : (ACC)0;
            neighbours(image, i, j, here ? h : 0, w, around);
#pragma unroll
            for (int k = 0; k < 9; k++) part[k] = multiply_add(g, around[k], part[k]);
            if (++j < w) continue;
            j = 0;
            if (++i == h) i = 0, image += h * w;
        }
#pragma unroll
        for (int k = 0; k < 9; k++) sum[k] += part[k];
    }
    sum_over_lanes(sum, shared);
#pragma unroll
    for (int k = 0; k < 9; k++) {
        if (channel < c && threadIdx.y == 0) partial[((size_t)blockIdx.x * 9 + k) * c + channel] = sum[k];
        sum[k] = 0;
    }
    if (!last_to_arrive(arrived + blockIdx.y)) return;
#pragma unroll 2
    for (int b = threadIdx.y; channel < c && b < gridDim.x; b += blockDim.y)
#pragma unroll
        for (int k = 0; k < 9; k++) sum[k] += partial[((size_t)b * 9 + k) * c + channel];
    sum_over_lanes(sum, shared);
#pragma unroll
    for (int k = 0; k < 9; k++)
        if (channel < c && threadIdx.y == 0) dw[channel * 9 + k] = (REAL)sum[k];
}
