// Global pooling, the linear layer, and the two losses with their gradients.

// pooled (N, C) = max or mean over the pixels of x (N, pixels, C); logits (N, K) = pooled wᵀ + b. One block an image.
extern "C" __global__ void __launch_bounds__(THREADS) head_forward(
    const ELEM* __restrict__ x, const REAL* __restrict__ w, const REAL* __restrict__ b, REAL* pooled,
    REAL* __restrict__ logits, int pixels, int c, int classes, int average) {
    const ELEM* image = x + (size_t)blockIdx.x * pixels * c;
    REAL* row = pooled + (size_t)blockIdx.x * c;
    ACC share = average ? (ACC)1 / pixels : (ACC)1;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        ACC found = value(image[i]);
        for (int p = 1; p < pixels; p++) {
            ACC a = value(image[p * c + i]);
            found = average ? found + a : a > found || a != a ? a : found;  // NaN wins
        }
        row[i] = (REAL)(found * share);
    }
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < classes; k += blockDim.x / 32) {
        ACC sum = 0;
        for (int i = lane; i < c; i += 32) sum += (ACC)row[i] * (ACC)w[k * c + i];
        for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
        if (lane == 0) logits[(size_t)blockIdx.x * classes + k] = (REAL)(sum + (ACC)b[k]);
    }
}

// Cross-entropy of one image: writes dlogits, returns the loss; target = (1 − s)·onehot + s/K.
static __device__ ACC softmax_row(const REAL* z, REAL* dz, int label, int classes, ACC count, ACC smoothing) {
    ACC top = z[0], total = 0, loss = 0;
    for (int k = 1; k < classes; k++) top = z[k] > top ? (ACC)z[k] : top;
    for (int k = 0; k < classes; k++) total += exp((ACC)z[k] - top);
    for (int k = 0; k < classes; k++) {
        ACC target = (k == label ? 1 - smoothing : (ACC)0) + smoothing / classes;
        loss += (log(total) - ((ACC)z[k] - top)) * target;
        dz[k] = (REAL)((exp((ACC)z[k] - top) / total - target) / count);
    }
    return loss;
}

// Sigmoid with binary cross-entropy of one image against the one-hot label.
static __device__ ACC sigmoid_row(const REAL* z, REAL* dz, int label, int classes, ACC count) {
    ACC loss = 0;
    for (int k = 0; k < classes; k++) {
        ACC x = z[k], target = k == label, decay = exp(-fabs(x));
        loss += (x > 0 ? x : (ACC)0) - x * target + log1p(decay);
        dz[k] = (REAL)(((x >= 0 ? 1 / (1 + decay) : decay / (1 + decay)) - target) / (count * classes));
    }
    return loss / classes;
}

// dlogits, and tail = [Σ loss/count, correct, stop], own = [Σ loss/count] of these n images. One block, all lanes in y.
extern "C" __global__ void __launch_bounds__(THREADS) loss_and_gradient(
    const REAL* __restrict__ logits, const unsigned char* __restrict__ labels, const REAL* __restrict__ stop,
    REAL* __restrict__ dlogits, REAL* own, REAL* tail, double count, double smoothing, int n, int classes, int binary) {
    __shared__ double shared[THREADS];
    double loss = 0, correct = 0;
    for (int i = threadIdx.y; i < n; i += blockDim.y) {
        const REAL* z = logits + (size_t)i * classes;
        REAL* dz = dlogits + (size_t)i * classes;
        int best = 0;
        for (int k = 1; k < classes; k++) best = z[k] > z[best] ? k : best;
        correct += best == labels[i];
        loss += binary ? sigmoid_row(z, dz, labels[i], classes, (ACC)count)
                       : softmax_row(z, dz, labels[i], classes, (ACC)count, (ACC)smoothing);
    }
    loss = sum_over_lanes(loss / count, shared);
    correct = sum_over_lanes(correct, shared);
    if (threadIdx.y == 0) {
        own[0] = tail[0] = (REAL)loss;
        tail[1] = (REAL)correct;
        tail[2] = stop[0];
    }
}

// Blocks 0 … n−1: dx (N, pixels, C) of an image; blocks n … n+K−1: dw[k] and db[k].
extern "C" __global__ void __launch_bounds__(THREADS) head_backward(
    const REAL* __restrict__ dlogits, const ELEM* __restrict__ x, const REAL* __restrict__ pooled,
    const REAL* __restrict__ w, REAL* dw, REAL* db, ELEM* dx, int n, int pixels, int c, int classes, int average) {
    int image = blockIdx.x, k = blockIdx.x - n;
    if (image < n) {
        const REAL* d = dlogits + (size_t)image * classes;
        const ELEM* from = x + (size_t)image * pixels * c;
        ELEM* to = dx + (size_t)image * pixels * c;
        ACC share = average ? (ACC)1 / pixels : (ACC)1;
        for (int i = threadIdx.x; i < c; i += blockDim.x) {
            ACC sum = 0;
            for (int j = 0; j < classes; j++) sum += (ACC)d[j] * (ACC)w[j * c + i];
            sum *= share;
            ACC top = pooled[(size_t)image * c + i];
            bool open = !average;  // the first of equal maxima takes the gradient
            for (int p = 0; p < pixels; p++) {
                bool wins = open && value(from[p * c + i]) == top;
                open = open && !wins;
                to[p * c + i] = element(average || wins ? sum : (ACC)0);
            }
        }
        return;
    }
    double bias = 0;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        double sum = 0;
#pragma unroll 8
        for (int m = 0; m < n; m++) sum += (ACC)dlogits[(size_t)m * classes + k] * (ACC)pooled[(size_t)m * c + i];
        dw[k * c + i] = (REAL)sum;
    }
    if (threadIdx.x == 0) {
#pragma unroll 8
        for (int m = 0; m < n; m++) bias += dlogits[(size_t)m * classes + k];
        db[k] = (REAL)bias;
    }
}
