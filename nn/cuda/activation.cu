// ReLU and leaky ReLU with a bias; copies.

// y = x + b, times `slope` where that is not above 0; b (C,) or null. y may be x.
extern "C" __global__ void __launch_bounds__(THREADS) activation_forward(
    const ELEM* x, const REAL* __restrict__ b, ELEM* y, double slope, int c, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) {
        ACC a = value(x[i]) + (b ? (ACC)b[i % c] : (ACC)0);
        if (slope == 0) a = rectified(a, 1);
        else if (a < 0) a *= (ACC)slope;
        y[i] = element(a);
    }
}

// dy (rows, C) is multiplied by `slope` where y is not above 0 (y null: nowhere); db (C,), where given, is its
// sum. partial (gridDim.x, C), arrived (gridDim.y) zeros. Blocks as in norm.cu.
extern "C" __global__ void __launch_bounds__(THREADS) activation_backward(
    ELEM* dy, const ELEM* __restrict__ y, double* partial, unsigned* arrived, REAL* db, double slope, int rows,
    int c) {
    __shared__ double shared[THREADS];
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    double sum = 0;
    if (channel < c) {
        for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
            size_t i = (size_t)row * c + channel;
            ACC g = value(dy[i]);
            if (y && !(value(y[i]) > 0)) {
                g = slope == 0 ? (ACC)0 : g * (ACC)slope;
                dy[i] = element(g);
            }
            sum += g;
        }
    }
    if (!db) return;
    sum = sum_over_lanes(sum, shared);
    if (channel < c && threadIdx.y == 0) partial[(size_t)blockIdx.x * c + channel] = sum;
    if (!last_to_arrive(arrived + blockIdx.y)) return;
    sum = 0;
    for (int block = threadIdx.y; channel < c && block < gridDim.x; block += blockDim.y)
        sum += partial[(size_t)block * c + channel];
    sum = sum_over_lanes(sum, shared);
    if (channel < c && threadIdx.y == 0) db[channel] = (REAL)sum;
}

// y = x
extern "C" __global__ void __launch_bounds__(THREADS) copy(
    const ELEM* __restrict__ x, ELEM* __restrict__ y, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) y[i] = x[i];
}
