// Pooling over whole images.

// y (N, C) = max or mean over the pixels of x (N, pixels, C). One block an image.
extern "C" __global__ void __launch_bounds__(THREADS) global_pool_forward(
    const ELEM* __restrict__ x, REAL* __restrict__ y, int pixels, int c, int average) {
    const ELEM* image = x + (size_t)blockIdx.x * pixels * c;
    ACC share = average ? (ACC)1 / pixels : (ACC)1;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        ACC found = value(image[i]);
        for (int p = 1; p < pixels; p++) {
            ACC a = value(image[(size_t)p * c + i]);
            found = average ? found + a : a > found || a != a ? a : found;  // NaN wins
        }
        y[(size_t)blockIdx.x * c + i] = (REAL)(found * share);
    }
}

// dx (N, pixels, C) for dy (N, C): all to the first maximum, or shared. One block an image.
extern "C" __global__ void __launch_bounds__(THREADS) global_pool_backward(
    const REAL* __restrict__ dy, const ELEM* __restrict__ x, const REAL* __restrict__ y,
    ELEM* __restrict__ dx, int pixels, int c, int average) {
    const ELEM* from = x + (size_t)blockIdx.x * pixels * c;
    ELEM* to = dx + (size_t)blockIdx.x * pixels * c;
    ACC share = average ? (ACC)1 / pixels : (ACC)1;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        ACC g = (ACC)dy[(size_t)blockIdx.x * c + i] * share, top = y[(size_t)blockIdx.x * c + i];
        bool open = !average;  // the first of equal maxima takes the gradient
        for (int p = 0; p < pixels; p++) {
            bool wins = open && value(from[(size_t)p * c + i]) == top;
            open = open && !wins;
            to[(size_t)p * c + i] = element(average || wins ? g : (ACC)0);
        }
    }
}
