// ReLU and leaky ReLU with a bias; copies.

// y = x + b, times `slope` where that is not above 0; b (C,) or null. y may be x.
extern "C" __global__ void __launch_bounds__(THREADS) activation_forward(
    const ELEM* x, const REAL* __restrict__ b, ELEM* y, double slope, int c, Step size) {
    auto body = [&](auto width, Step i) {
        auto z = load<width>(x + i);
        int channel = b ? i % c : 0;
        for (int k = 0; k < width; k++) {
            ACC a = value(z.at[k]) + (b ? (ACC)b[channel] : (ACC)0);
            if (++channel == c) channel = 0;
            if (slope == 0) a = rectified(a, 1);
            else if (a < 0) a *= (ACC)slope;
            z.at[k] = element(a);
        }
        store(y + i, z);
    };
    over_vector(size, body, x, y);
}

// dy (rows, C) is multiplied by `slope` where y is not above 0 (y null: nowhere); db (C,), where given, is its
// sum. partial (gridDim.x, C), arrived (gridDim.y) zeros. Blocks as in norm.cu.
extern "C" __global__ void __launch_bounds__(THREADS) activation_backward(
    ELEM* dy, const ELEM* __restrict__ y, double* partial, unsigned* arrived, REAL* db, double slope, int rows,
    int c) {
    __shared__ double shared[THREADS];
    over_channels(c, [&](auto width) {
        int channel = (blockIdx.y * blockDim.x + threadIdx.x) * width;
        bool live = channel < c;
        double sum[width] = {};
        int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
        for (int row = lane; live && row < rows; row += lanes) {
            size_t at = (size_t)row * c + channel;
            auto g = load<width>(dy + at);
            if (y) {
                auto a = load<width>(y + at);
                for (int k = 0; k < width; k++) {
                    ACC closed = slope == 0 ? (ACC)0 : value(g.at[k]) * (ACC)slope;
                    if (!(value(a.at[k]) > 0)) g.at[k] = element(closed);
                }
                store(dy + at, g);
            }
            for (int k = 0; k < width; k++) sum[k] += value(g.at[k]);
        }
        if (!db) return;
        for (int k = 0; k < width; k++) {
            double total = sum_over_lanes(sum[k], shared);
            if (live && threadIdx.y == 0) partial[(size_t)blockIdx.x * c + channel + k] = total;
        }
        if (!last_to_arrive(arrived + blockIdx.y)) return;
        for (int k = 0; k < width; k++) {
            double total = 0;
            for (int block = threadIdx.y; live && block < gridDim.x; block += blockDim.y)
                total += partial[(size_t)block * c + channel + k];
            total = sum_over_lanes(total, shared);
            if (live && threadIdx.y == 0) db[channel + k] = (REAL)total;
        }
    });
}

// y = x
extern "C" __global__ void __launch_bounds__(THREADS) copy(
    const ELEM* __restrict__ x, ELEM* __restrict__ y, Step size) {
    over_vector(size, [&](auto width, Step i) { store(y + i, load<width>(x + i)); }, x, y);
}
