// Batch norm with what follows it: y = pool(relu(γ·x̂ + β + residual)), x̂ = (z − mean)·inverse_std.
// A block is (lanes of packs of channels, lanes of rows); blockIdx.y counts groups of them. Nothing but z, the
// statistics and, with a residual, y is kept for the backward: masks and maxima are computed again.

// moments (3, C): this rank's Σz; the same, to be summed over ranks; Σ(z − this rank's mean)².
// partial (gridDim.x, C, 3), arrived (gridDim.y) zeros.
extern "C" __global__ void __launch_bounds__(THREADS) norm_statistics(
    const ELEM* __restrict__ z, double* partial, unsigned* arrived, double* moments, int rows, int c) {
    __shared__ Moments shared[THREADS];
    over_channels(c, [&](auto width) {
        int channel = (blockIdx.y * blockDim.x + threadIdx.x) * width;
        int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
        bool live = channel < c;
        Moments own[width] = {};
        for (int row = lane; live && row < rows; row += 8 * lanes) {
            Pack<ELEM, width> x[8];
            int count = min(8, (rows - row + lanes - 1) / lanes);
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = i < count ? load<width>(z + (size_t)(row + i * lanes) * c + channel)
                                 : Pack<ELEM, width>();
#pragma unroll
            for (int k = 0; k < width; k++) {
                ACC sum = 0, squares = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) sum += value(x[i].at[k]);
                ACC mean = sum / count, rest = 0;  // rounded: `rest` is what it lacks
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    ACC apart = i < count ? value(x[i].at[k]) - mean : (ACC)0;
                    rest += apart;
                    squares += apart * apart;
                }
                double lacking = (double)rest / count;
                own[k].add(count, mean + lacking, squares - lacking * rest);
            }
        }
#pragma unroll
        for (int k = 0; k < width; k++) {
            Moments block = moments_over_lanes(own[k], shared);
            double* cell = partial + ((size_t)blockIdx.x * c + channel + k) * 3;
            if (live && threadIdx.y == 0) cell[0] = block.n, cell[1] = block.mean, cell[2] = block.squares;
        }
        if (!last_to_arrive(arrived + blockIdx.y)) return;
        for (int own_channel = channel; own_channel < channel + width; own_channel++) {
            Moments merged = {0, 0, 0};
            for (int first = threadIdx.y; live && first < gridDim.x; first += AHEAD * blockDim.y) {
                // loaded together: their way from memory is the longest part
                double n[AHEAD], mean[AHEAD], squares[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    int b = first + i * blockDim.y;
                    const double* p = partial + ((size_t)min(b, (int)gridDim.x - 1) * c + own_channel) * 3;
                    n[i] = b < gridDim.x ? p[0] : 0, mean[i] = p[1], squares[i] = p[2];
                }
#pragma unroll
                for (int i = 0; i < AHEAD; i++) merged.add(n[i], mean[i], squares[i]);
            }
            merged = moments_over_lanes(merged, shared);
            if (live && threadIdx.y == 0) {
                moments[own_channel] = moments[c + own_channel] = merged.n * merged.mean;
                moments[2 * c + own_channel] = merged.squares;
            }
        }
    });
}

// After the means' sum over ranks: this rank's squares about the mean of all, to be summed over ranks.
extern "C" __global__ void norm_recentre(double* moments, double own, double count, int c) {
    int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c || own == 0) return;
    double apart = moments[channel] / own - moments[c + channel] / count;
    moments[2 * c + channel] += own * apart * apart;
}

// y from z. With moments (3, C), summed over ranks: training; without: the running statistics. y may be z.
extern "C" __global__ void __launch_bounds__(THREADS) norm_apply(
    const ELEM* z, const ELEM* __restrict__ residual, const double* __restrict__ moments,
    const REAL* __restrict__ gamma, const REAL* __restrict__ beta, REAL* running_mean, REAL* running_var,
    ACC* saved, ELEM* y, double count, int n, int h, int w, int c, int pool, int relu) {
    over_channels(c, [&](auto width) {
        int channel = (blockIdx.y * blockDim.x + threadIdx.x) * width;
        int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
        if (channel >= c) return;
        Norm norm[width];
#pragma unroll
        for (int k = 0; k < width; k++) {
            int at = channel + k;
            if (moments)
                norm[k] = remember(moments[c + at] / count, moments[2 * c + at] / count, count, lane == 0,
                                   gamma[at], beta[at], running_mean, running_var, saved, at, c);
            else
                norm[k] = norm_of(running_mean[at], (ACC)(1 / sqrt((double)running_var[at] + EPS)), gamma[at],
                                  beta[at]);
        }
        if (pool) {
            Windows windows = {h, w};
            for (int u = lane; u < windows.count(n); u += lanes) {
                int row[4], out = windows.rows(u, row);
                if (out < 0) continue;
                Pack<ELEM, width> four[4], a;
#pragma unroll
                for (int i = 0; i < 4; i++) four[i] = load<width>(z + (size_t)row[i] * c + channel);
#pragma unroll
                for (int k = 0; k < width; k++) {
                    ACC top = norm[k].activation(Winner(norm[k], gamma[channel + k], four, k).z);
                    a.at[k] = element(rectified(top, relu));
                }
                store(y + (size_t)out * c + channel, a);
            }
            return;
        }
        int rows = n * h * w;
#pragma unroll 4
        for (int row = lane; row < rows; row += lanes) {
            size_t at = (size_t)row * c + channel;
            Pack<ELEM, width> a = load<width>(z + at), more = {};
            if (residual) more = load<width>(residual + at);
#pragma unroll
            for (int k = 0; k < width; k++)
                a.at[k] = element(rectified(norm[k].activation(value(a.at[k])) + value(more.at[k]), relu));
            store(y + at, a);
        }
    });
}

// sums (2, C): Σg and Σg·x̂, for d_beta and d_gamma and, summed over ranks, for norm_input_gradient. With y,
// g also replaces dy. partial (gridDim.x, C, 2), arrived (gridDim.y) zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 4) norm_gradient_sums(
    ELEM* dy, const ELEM* __restrict__ part, const ELEM* __restrict__ z, const ELEM* __restrict__ y,
    const ACC* __restrict__ saved, const REAL* __restrict__ gamma, const REAL* __restrict__ beta,
    double* partial, unsigned* arrived, double* sums, REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c,
    int pool, int relu) {
    __shared__ double shared[2 * THREADS];
    over_channels(c, [&](auto width) {
        int channel = (blockIdx.y * blockDim.x + threadIdx.x) * width;
        int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
        bool live = channel < c;
        double both[width][2] = {};
        if (live) {
            Norm norm[width];
#pragma unroll
            for (int k = 0; k < width; k++) {
                int at = channel + k;
                norm[k] = norm_of(saved[at], saved[c + at], gamma[at], beta[at]);
            }
            if (pool) {
                Windows windows = {h, w};
                for (int u = lane; u < windows.count(n); u += lanes) {
                    int row[4], out = windows.rows(u, row);
                    if (out < 0) continue;
                    Pack<ELEM, width> four[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) four[i] = load<width>(z + (size_t)row[i] * c + channel);
                    auto d = whole<width>(dy, part, (size_t)out * c + channel);
#pragma unroll
                    for (int k = 0; k < width; k++) {
                        ACC top = Winner(norm[k], gamma[channel + k], four, k).z;
                        ACC g = passed(value(d.at[k]), norm[k], top, 0, relu);
                        both[k][0] += g;
                        both[k][1] += g * norm[k].centred(top);
                    }
                }
            } else {
                int rows = n * h * w;
#pragma unroll 4
                for (int row = lane; row < rows; row += lanes) {
                    size_t at = (size_t)row * c + channel;
                    auto x = load<width>(z + at), d = whole<width>(dy, part, at);
                    Pack<ELEM, width> a = {};
                    if (y) a = load<width>(y + at);
#pragma unroll
                    for (int k = 0; k < width; k++) {
                        ACC g = passed(value(d.at[k]), norm[k], value(x.at[k]), y ? &a.at[k] : 0, relu);
                        d.at[k] = element(g);
                        both[k][0] += g;
                        both[k][1] += g * norm[k].centred(value(x.at[k]));
                    }
                    if (y) store(dy + at, d);
                }
            }
            for (int k = 0; k < width; k++) both[k][1] *= norm[k].inverse_std;
        }
#pragma unroll
        for (int k = 0; k < width; k++) {
            sum_over_lanes(both[k], shared);
            double* cell = partial + ((size_t)blockIdx.x * c + channel + k) * 2;
            if (live && threadIdx.y == 0) cell[0] = both[k][0], cell[1] = both[k][1];
        }
        if (!last_to_arrive(arrived + blockIdx.y)) return;
        for (int own_channel = channel; own_channel < channel + width; own_channel++) {
            double total[2] = {0, 0};
            for (int first = threadIdx.y; live && first < gridDim.x; first += AHEAD * blockDim.y) {
                double sum[AHEAD], of_products[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    int b = first + i * blockDim.y;
                    const double* p = partial + ((size_t)min(b, (int)gridDim.x - 1) * c + own_channel) * 2;
                    sum[i] = b < gridDim.x ? p[0] : 0, of_products[i] = b < gridDim.x ? p[1] : 0;
                }
#pragma unroll
                for (int i = 0; i < AHEAD; i++) total[0] += sum[i], total[1] += of_products[i];
            }
            sum_over_lanes(total, shared);
            if (live && threadIdx.y == 0) {
                sums[own_channel] = total[0];
                sums[c + own_channel] = total[1];
                d_beta[own_channel] = (REAL)total[0];
                d_gamma[own_channel] = (REAL)total[1];
            }
        }
    });
}

// dz over z. `relu` is 0 where dy holds g already.
extern "C" __global__ void __launch_bounds__(THREADS) norm_input_gradient(
    const ELEM* __restrict__ dy, ELEM* z, const ACC* __restrict__ saved, const REAL* __restrict__ gamma,
    const REAL* __restrict__ beta, const double* __restrict__ sums, double count, int n, int h, int w, int c,
    int pool, int relu) {
    over_channels(c, [&](auto width) {
        int channel = (blockIdx.y * blockDim.x + threadIdx.x) * width;
        int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
        if (channel >= c) return;
        Norm norm[width];
        InputGradient gradient[width];
#pragma unroll
        for (int k = 0; k < width; k++) {
            int at = channel + k;
            norm[k] = norm_of(saved[at], saved[c + at], gamma[at], beta[at]);
            gradient[k] = InputGradient(norm[k], sums[at], sums[c + at], count);
        }
        if (pool) {
            Windows windows = {h, w};
            for (int u = lane; u < windows.count(n); u += lanes) {
                int row[4], out = windows.rows(u, row);
                Pack<ELEM, width> four[4], d = {};
#pragma unroll
                for (int i = 0; i < 4; i++)
                    four[i] = row[i] < 0 ? Pack<ELEM, width>{} : load<width>(z + (size_t)row[i] * c + channel);
                if (out >= 0) d = load<width>(dy + (size_t)out * c + channel);
#pragma unroll
                for (int k = 0; k < width; k++) {
                    Winner top(norm[k], gamma[channel + k], four, k);
                    ACC g = out < 0 ? (ACC)0 : passed(value(d.at[k]), norm[k], top.z, 0, relu);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        ACC centred = norm[k].centred(value(four[i].at[k]));
                        four[i].at[k] = gradient[k].at(i == top.index ? g : (ACC)0, centred);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (row[i] >= 0) store(z + (size_t)row[i] * c + channel, four[i]);
            }
            return;
        }
        int rows = n * h * w;
#pragma unroll 4
        for (int row = lane; row < rows; row += lanes) {
            size_t at = (size_t)row * c + channel;
            auto x = load<width>(z + at), d = load<width>(dy + at);
#pragma unroll
            for (int k = 0; k < width; k++) {
                ACC g = passed(value(d.at[k]), norm[k], value(x.at[k]), 0, relu);
                x.at[k] = gradient[k].at(g, norm[k].centred(value(x.at[k])));
            }
            store(z + at, x);
        }
    });
}
