// The two losses with their gradients, for any number of classes.

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

// The loss of one image, by its number in LOSS_NUMBERS of ops.py; another number fails the launch.
static __device__ ACC loss_row(
    int number, const REAL* z, REAL* dz, int label, int classes, ACC count, ACC smoothing) {
    if (number == 0) return softmax_row(z, dz, label, classes, count, smoothing);
    if (number == 1) return sigmoid_row(z, dz, label, classes, count);
    __trap();
    return 0;
}

// dlogits, step_metrics = [Σ loss/count, correct, stop] and local_loss = [Σ loss/count] of these n images.
// One block, all lanes in y.
extern "C" __global__ void __launch_bounds__(THREADS) loss_and_gradient(
    const REAL* __restrict__ logits, const int* __restrict__ labels, const REAL* __restrict__ stop,
    REAL* __restrict__ dlogits, REAL* local_loss, REAL* step_metrics, double count, double smoothing, int n,
    int classes, int number) {
    __shared__ double shared[2 * THREADS];
    double loss = 0, correct = 0;
    for (int i = threadIdx.y; i < n; i += blockDim.y) {
        const REAL* z = logits + (size_t)i * classes;
        REAL* dz = dlogits + (size_t)i * classes;
        int best = 0;
        for (int k = 1; k < classes; k++) best = z[k] > z[best] ? k : best;
        correct += best == labels[i];
        loss += loss_row(number, z, dz, labels[i], classes, (ACC)count, (ACC)smoothing);
    }
    double both[2] = {loss / count, correct};
    sum_over_lanes(both, shared);
    if (threadIdx.y == 0) {
        local_loss[0] = step_metrics[0] = (REAL)both[0];
        step_metrics[1] = (REAL)both[1];
        step_metrics[2] = stop[0];
    }
}
