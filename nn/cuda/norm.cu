// Batch norm with what follows it: y = pool(relu(γ·x̂ + β + residual)), x̂ = (z − mean)·inverse_std.
// A block is (lanes of channels, lanes of rows); blockIdx.y counts groups of channels. Nothing but z, the
// statistics and, with a residual, y is kept for the backward: masks and maxima are computed again.

struct Norm {  // of one channel
    ACC mean, inverse_std, scale, beta;
    __device__ ACC centred(ACC z) const { return z - mean; }
    __device__ ACC activation(ACC z) const { return multiply_add(centred(z), scale, beta); }
};

// max(a, 0) where there is a ReLU; NaN stays NaN, or a run that diverged would look sound.
static __device__ __forceinline__ ACC rectified(ACC a, int relu) { return relu && a <= 0 ? (ACC)0 : a; }

static __device__ Norm norm_of(ACC mean, ACC inverse_std, REAL gamma, REAL beta) {
    return Norm{mean, inverse_std, (ACC)((double)inverse_std * (double)gamma), (ACC)beta};
}

// The 2×2 windows of an image, those cut off by its edge included, and the rows of their four pixels.
struct Windows {
    int h, w;
    __device__ int across() const { return (w + 1) / 2; }
    __device__ int count(int n) const { return n * ((h + 1) / 2) * across(); }
    // Rows of window u's pixels, −1 outside the image; returns the row of its output, −1 if it is cut off.
    __device__ int rows(int u, int row[4]) const {
        int j = u % across(), i = u / across() % ((h + 1) / 2), n = u / across() / ((h + 1) / 2);
        for (int k = 0; k < 4; k++) {
            int y = 2 * i + k / 2, x = 2 * j + k % 2;
            row[k] = y < h && x < w ? (n * h + y) * w + x : -1;
        }
        return row[3] < 0 ? -1 : (n * (h / 2) + i) * (w / 2) + j;
    }
};

// First of the four with the largest x̂·sign(γ): the order of γ·x̂ + β, ties apart that rounding makes.
struct Winner {
    int index;
    ACC z;
    __device__ Winner(const Norm& norm, REAL gamma, const ACC four[4]) : index(0), z(four[0]) {
        ACC sign = gamma < 0 || (gamma == 0 && 1 / gamma < 0) ? -1 : 1, top = sign * norm.centred(z);
#pragma unroll
        for (int k = 1; k < 4; k++) {
            ACC other = sign * norm.centred(four[k]);
            // NaN wins, as NumPy has it
            if (other > top || other != other) top = other, index = k, z = four[k];
        }
    }
};

// A count of values, their mean and their squares about it; `add` merges two (Chan et al. 1979, eq. 2.1).
struct Moments {
    double n, mean, squares;
    __device__ void add(double n2, double mean2, double squares2) {
        if (n2 == 0) return;
        double total = n + n2, share = n2 / total, apart = mean2 - mean;
        mean += apart * share;
        squares += squares2 + apart * apart * n * share;
        n = total;
    }
};

static __device__ Moments moments_over_lanes(Moments own, Moments* shared) {
    int at = threadIdx.y * blockDim.x + threadIdx.x;
    shared[at] = own;
    __syncthreads();
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        if (threadIdx.y < half) {
            Moments other = shared[at + half * blockDim.x];
            shared[at].add(other.n, other.mean, other.squares);
        }
        __syncthreads();
    }
    Moments total = shared[threadIdx.x];
    __syncthreads();
    return total;
}

// moments (3, C): this rank's Σz; the same, to be summed over ranks; Σ(z − this rank's mean)².
// partial (gridDim.x, C, 3), arrived (gridDim.y) zeros.
extern "C" __global__ void __launch_bounds__(THREADS) norm_statistics(
    const ELEM* __restrict__ z, double* partial, unsigned* arrived, double* moments, int rows, int c) {
    __shared__ Moments shared[THREADS];
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
    Moments own = {0, 0, 0};
    if (channel < c) {
        for (int row = lane; row < rows; row += 8 * lanes) {
            ACC x[8], sum = 0, squares = 0;
            int count = min(8, (rows - row + lanes - 1) / lanes);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] = i < count ? value(z[(size_t)(row + i * lanes) * c + channel]) : (ACC)0;
                sum += x[i];
            }
            ACC mean = sum / count, rest = 0;  // rounded: `rest` is what it lacks
#pragma unroll
            for (int i = 0; i < 8; i++) {
                ACC apart = i < count ? x[i] - mean : (ACC)0;
                rest += apart;
                squares += apart * apart;
            }
            double lacking = (double)rest / count;
            own.add(count, mean + lacking, squares - lacking * rest);
        }
    }
    Moments block = moments_over_lanes(own, shared);
    double* cell = partial + ((size_t)blockIdx.x * c + channel) * 3;
    if (channel < c && threadIdx.y == 0) cell[0] = block.n, cell[1] = block.mean, cell[2] = block.squares;
    if (!last_to_arrive(arrived + blockIdx.y)) return;
    Moments merged = {0, 0, 0};
    for (int first = threadIdx.y; channel < c && first < gridDim.x; first += AHEAD * blockDim.y) {
        // loaded together: their way from memory is the longest part
        double n[AHEAD], mean[AHEAD], squares[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int b = first + i * blockDim.y;
            const double* p = partial + ((size_t)min(b, (int)gridDim.x - 1) * c + channel) * 3;
            n[i] = b < gridDim.x ? p[0] : 0, mean[i] = p[1], squares[i] = p[2];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) merged.add(n[i], mean[i], squares[i]);
    }
    merged = moments_over_lanes(merged, shared);
    if (channel < c && threadIdx.y == 0) {
        moments[channel] = moments[c + channel] = merged.n * merged.mean;
        moments[2 * c + channel] = merged.squares;
    }
}

// After the means' sum over ranks: this rank's squares about the mean of all, to be summed over ranks.
extern "C" __global__ void norm_recentre(double* moments, double own, double count, int c) {
    int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c || own == 0) return;
    double apart = moments[channel] / own - moments[c + channel] / count;
    moments[2 * c + channel] += own * apart * apart;
}

// Running statistics take in a batch's; `saved` (2, C) keeps mean and inverse_std for the backward.
static __device__ Norm remember(
    double mean, double variance, double count, bool first, REAL gamma, REAL beta, REAL* running_mean,
    REAL* running_var, ACC* saved, int channel, int c) {
    ACC inverse_std = (ACC)(1 / sqrt(variance + EPS));
    if (first) {
        running_mean[channel] = (REAL)(running_mean[channel] + MOMENTUM * (mean - running_mean[channel]));
        double unbiased = variance * (count / (count > 2 ? count - 1 : 1));
        running_var[channel] = (REAL)(running_var[channel] + MOMENTUM * (unbiased - running_var[channel]));
        saved[channel] = (ACC)mean;
        saved[c + channel] = inverse_std;
    }
    return norm_of((ACC)mean, inverse_std, gamma, beta);
}

// y from z. With moments (3, C), summed over ranks: training; without: the running statistics. y may be z.
extern "C" __global__ void __launch_bounds__(THREADS) norm_apply(
    const ELEM* z, const ELEM* __restrict__ residual, const double* __restrict__ moments,
    const REAL* __restrict__ gamma, const REAL* __restrict__ beta, REAL* running_mean, REAL* running_var,
    ACC* saved, ELEM* y, double count, int n, int h, int w, int c, int pool, int relu) {
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
    if (channel >= c) return;
    Norm norm;
    if (moments)
        norm = remember(moments[c + channel] / count, moments[2 * c + channel] / count, count, lane == 0,
                        gamma[channel], beta[channel], running_mean, running_var, saved, channel, c);
    else
        norm = norm_of(running_mean[channel], (ACC)(1 / sqrt((double)running_var[channel] + EPS)),
                       gamma[channel], beta[channel]);
    if (pool) {
        Windows windows = {h, w};
        for (int u = lane; u < windows.count(n); u += lanes) {
            int row[4], out = windows.rows(u, row);
            if (out < 0) continue;
            ACC four[4];
#pragma unroll
            for (int k = 0; k < 4; k++) four[k] = value(z[(size_t)row[k] * c + channel]);
            ACC a = norm.activation(Winner(norm, gamma[channel], four).z);
            y[(size_t)out * c + channel] = element(rectified(a, relu));
        }
        return;
    }
    int rows = n * h * w;
#pragma unroll 4
    for (int row = lane; row < rows; row += lanes) {
        size_t at = (size_t)row * c + channel;
        ACC a = norm.activation(value(z[at])) + (residual ? value(residual[at]) : (ACC)0);
        y[at] = element(rectified(a, relu));
    }
}

// g: dy where the activation was let through, 0 elsewhere. `y` decides where there is a residual.
static __device__ __forceinline__ ACC passed(
    ACC dy, const Norm& norm, ACC z, const ELEM* y, size_t at, int relu) {
    if (!relu) return dy;
    return (y ? value(y[at]) : norm.activation(z)) > 0 ? dy : (ACC)0;
}

// dy, to which `part` is added where it comes in two.
static __device__ __forceinline__ ACC whole(ELEM* dy, const ELEM* part, size_t at) {
    ELEM sum = dy[at];
    if (part) dy[at] = sum = element(value(sum) + value(part[at]));
    return value(sum);
}

// sums (2, C): Σg and Σg·x̂, for d_beta and d_gamma and, summed over ranks, for norm_input_gradient. With y,
// g also replaces dy. partial (gridDim.x, C, 2), arrived (gridDim.y) zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 4) norm_gradient_sums(
    ELEM* dy, const ELEM* __restrict__ part, const ELEM* __restrict__ z, const ELEM* __restrict__ y,
    const ACC* __restrict__ saved, const REAL* __restrict__ gamma, const REAL* __restrict__ beta,
    double* partial, unsigned* arrived, double* sums, REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c,
    int pool, int relu) {
    __shared__ double shared[2 * THREADS];
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
    double total = 0, product = 0;
    if (channel < c) {
        Norm norm = norm_of(saved[channel], saved[c + channel], gamma[channel], beta[channel]);
        if (pool) {
            Windows windows = {h, w};
            for (int u = lane; u < windows.count(n); u += lanes) {
                int row[4], out = windows.rows(u, row);
                if (out < 0) continue;
                ACC four[4];
#pragma unroll
                for (int k = 0; k < 4; k++) four[k] = value(z[(size_t)row[k] * c + channel]);
                ACC top = Winner(norm, gamma[channel], four).z;
                ACC g = passed(whole(dy, part, (size_t)out * c + channel), norm, top, 0, 0, relu);
                total += g;
                product += g * norm.centred(top);
            }
        } else {
            int rows = n * h * w;
#pragma unroll 4
            for (int row = lane; row < rows; row += lanes) {
                size_t at = (size_t)row * c + channel;
                ACC x = value(z[at]), g = passed(whole(dy, part, at), norm, x, y, at, relu);
                if (y) dy[at] = element(g);
                total += g;
                product += g * norm.centred(x);
            }
        }
        product *= norm.inverse_std;
    }
    double both[2] = {total, product};
    sum_over_lanes(both, shared);
    double* cell = partial + ((size_t)blockIdx.x * c + channel) * 2;
    if (channel < c && threadIdx.y == 0) cell[0] = both[0], cell[1] = both[1];
    if (!last_to_arrive(arrived + blockIdx.y)) return;
    both[0] = both[1] = 0;
    for (int first = threadIdx.y; channel < c && first < gridDim.x; first += AHEAD * blockDim.y) {
        double sum[AHEAD], of_products[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int b = first + i * blockDim.y;
            const double* p = partial + ((size_t)min(b, (int)gridDim.x - 1) * c + channel) * 2;
            sum[i] = b < gridDim.x ? p[0] : 0, of_products[i] = b < gridDim.x ? p[1] : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) both[0] += sum[i], both[1] += of_products[i];
    }
    sum_over_lanes(both, shared);
    if (channel < c && threadIdx.y == 0) {
        sums[channel] = both[0];
        sums[c + channel] = both[1];
        d_beta[channel] = (REAL)both[0];
        d_gamma[channel] = (REAL)both[1];
    }
}

// dx = γ·inverse_std·(g − Σg/count − x̂·Σ(g·x̂)/count)
struct InputGradient {
    ACC scale, slope, shift;
    __device__ InputGradient(const Norm& norm, double sum, double product, double count) {
        double s = norm.scale;
        scale = norm.scale;
        slope = (ACC)(-s * norm.inverse_std * (product / count));
        shift = (ACC)(-s * (sum / count));
    }
    __device__ ELEM at(ACC g, ACC centred) const {
        return element(multiply_add(g, scale, multiply_add(centred, slope, shift)));
    }
};

// dz over z. `relu` is 0 where dy holds g already.
extern "C" __global__ void __launch_bounds__(THREADS) norm_input_gradient(
    const ELEM* __restrict__ dy, ELEM* z, const ACC* __restrict__ saved, const REAL* __restrict__ gamma,
    const REAL* __restrict__ beta, const double* __restrict__ sums, double count, int n, int h, int w, int c,
    int pool, int relu) {
    int channel = blockIdx.y * blockDim.x + threadIdx.x;
    int lane = blockIdx.x * blockDim.y + threadIdx.y, lanes = gridDim.x * blockDim.y;
    if (channel >= c) return;
    Norm norm = norm_of(saved[channel], saved[c + channel], gamma[channel], beta[channel]);
    InputGradient gradient(norm, sums[channel], sums[c + channel], count);
    if (pool) {
        Windows windows = {h, w};
        for (int u = lane; u < windows.count(n); u += lanes) {
            int row[4], out = windows.rows(u, row), best = 0;
            ACC four[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                four[k] = row[k] < 0 ? (ACC)0 : value(z[(size_t)row[k] * c + channel]);
            ACC g = 0;
            if (out >= 0) {
                Winner top(norm, gamma[channel], four);
                g = passed(value(dy[(size_t)out * c + channel]), norm, top.z, 0, 0, relu);
                best = top.index;
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (row[k] >= 0)
                    z[(size_t)row[k] * c + channel] =
                        gradient.at(k == best ? g : (ACC)0, norm.centred(four[k]));
        }
        return;
    }
    int rows = n * h * w;
#pragma unroll 4
    for (int row = lane; row < rows; row += lanes) {
        size_t at = (size_t)row * c + channel;
        ACC x = value(z[at]);
        z[at] = gradient.at(passed(value(dy[at]), norm, x, 0, 0, relu), norm.centred(x));
    }
}
