// Pooling over whole images and over windows.

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

// Windows of rows × columns pixels of images (N, H, W, C), `stride` apart in a frame of `padding`; their outputs
// are (N, P, Q, C).

// y = max or mean of each window, winners (as y; may be null) the number of the first largest pixel.
extern "C" __global__ void __launch_bounds__(THREADS) pool_forward(
    const ELEM* __restrict__ x, ELEM* __restrict__ y, int* __restrict__ winners, int h, int w, int p, int q,
    int rows, int columns, int stride, int padding, int average, int c, Step size) {
    for (Step at = first_of_thread(); at < size; at += threads_of_grid()) {
        Step place = at / c;
        int top = (int)(place / q % p) * stride - padding, left = (int)(place % q) * stride - padding;
        const ELEM* image = x + place / q / p * h * w * c + at % c;
        ACC found = 0;
        int winner = -1;
        for (int k = 0; k < rows * columns; k++) {
            int i = top + k / columns, j = left + k % columns;
            if (i < 0 || i >= h || j < 0 || j >= w) continue;
            ACC a = value(image[((size_t)i * w + j) * c]);
            if (average) found += a;
            else if (winner < 0 || a > found || a != a) found = a, winner = k;  // NaN wins
        }
        y[at] = element(average ? found / (rows * columns) : found);
        if (winners) winners[at] = winner;
    }
}

// dx for dy (N, P, Q, C): to each pixel from the windows that it won, or a share of all it lies in.
extern "C" __global__ void __launch_bounds__(THREADS) pool_backward(
    const ELEM* __restrict__ dy, const int* __restrict__ winners, ELEM* __restrict__ dx, int h, int w, int p,
    int q, int rows, int columns, int stride, int padding, int average, int c, Step size) {
    ACC share = (ACC)1 / (rows * columns);
    for (Step at = first_of_thread(); at < size; at += threads_of_grid()) {
        Step place = at / c;
        int i = (int)(place / w % h) + padding, j = (int)(place % w) + padding;
        Step image = place / w / h * p * q;
        ACC sum = 0;
        for (int k = 0; k < rows * columns; k++) {
            int top = i - k / columns, left = j - k % columns;
            if (top < 0 || left < 0 || top % stride || left % stride) continue;
            if (top / stride >= p || left / stride >= q) continue;
            size_t out = (size_t)(image + (Step)(top / stride) * q + left / stride) * c + at % c;
            if (average) sum += value(dy[out]) * share;
            else if (winners[out] == k) sum += value(dy[out]);
        }
        dx[at] = element(sum);
    }
}
