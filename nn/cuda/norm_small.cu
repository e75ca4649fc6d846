// Batch norm in one launch, for few rows and one rank: a block has all rows of SMALL_LANES channels and holds
// them in registers, KEEP a thread. Statistics in two passes over the registers. Operations as in norm.cu.

// Unit u of a thread: a window's four pixels with pooling, else one pixel. Returns the output's row or −1.
template <int PER>
static __device__ __forceinline__ int rows_of(const Windows& windows, int unit, int units, int row[PER]) {
    if (PER == 1) {
        row[0] = unit < units ? unit : -1;
        return row[0];
    }
    int four[4], out = -1;
    if (unit < units) out = windows.rows(unit, four);
#pragma unroll
    for (int k = 0; k < PER; k++) row[k] = unit < units ? four[k] : -1;
    return out;
}

template <int PER>
static __device__ void small_forward(
    const ELEM* z, const ELEM* residual, const REAL* gamma, const REAL* beta, REAL* running_mean,
    REAL* running_var, ACC* saved, ELEM* y, int n, int h, int w, int c, int relu, double* shared) {
    int channel = blockIdx.x * SMALL_LANES + threadIdx.x;
    bool live = channel < c;
    Windows windows = {h, w};
    int units = PER == 1 ? n * h * w : windows.count(n), count = n * h * w;
    ACC x[KEEP / PER][PER];
    double sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < KEEP / PER; i++) {
        int row[PER];
        rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS, units, row);
        ACC part = 0;
#pragma unroll
        for (int k = 0; k < PER; k++) {
            bool here = live && row[k] >= 0;
            x[i][k] = here ? value(z[row[k] * c + channel]) : (ACC)0;
            part += x[i][k];
        }
        sum += part;
    }
    double mean = sum_over_lanes(sum, shared) / count;
#pragma unroll
    for (int i = 0; i < KEEP / PER; i++) {
        int row[PER];
        rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS, units, row);
        ACC part = 0;
#pragma unroll
        for (int k = 0; k < PER; k++) {
            ACC apart = row[k] >= 0 ? x[i][k] - (ACC)mean : (ACC)0;
            part += apart * apart;
        }
        squares += part;
    }
    double variance = sum_over_lanes(squares, shared) / count;
    if (!live) return;
    Norm norm = remember(mean, variance, count, threadIdx.y == 0, gamma[channel], beta[channel], running_mean,
                         running_var, saved, channel, c);
#pragma unroll
    for (int i = 0; i < KEEP / PER; i++) {
        int row[PER], out = rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS, units, row);
        if (out < 0) continue;
        int at = out * c + channel;
        ACC a;
        if (PER == 1)
            a = norm.activation(x[i][0]) + (residual ? value(residual[at]) : (ACC)0);
        else
            a = norm.activation(Winner(norm, gamma[channel], x[i]).z);
        y[at] = element(rectified(a, relu));
    }
}

extern "C" __global__ void __launch_bounds__(SMALL_LANES* SMALL_ROWS, 1) norm_small_forward(
    const ELEM* __restrict__ z, const ELEM* __restrict__ residual, const REAL* __restrict__ gamma,
    const REAL* __restrict__ beta, REAL* running_mean, REAL* running_var, ACC* saved, ELEM* y, int n, int h,
    int w, int c, int pool, int relu) {
    __shared__ double shared[SMALL_LANES * SMALL_ROWS];
    if (pool)
        small_forward<4>(z, 0, gamma, beta, running_mean, running_var, saved, y, n, h, w, c, relu, shared);
    else
        small_forward<1>(z, residual, gamma, beta, running_mean, running_var, saved, y, n, h, w, c, relu,
            shared);
}

template <int PER>
static __device__ void small_backward(
    ELEM* dy, const ELEM* part, ELEM* z, const ELEM* y, const ACC* saved, const REAL* gamma, const REAL* beta,
    REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c, int relu, double* shared) {
    int channel = blockIdx.x * SMALL_LANES + threadIdx.x;
    bool live = channel < c;
    Windows windows = {h, w};
    int units = PER == 1 ? n * h * w : windows.count(n);
    Norm norm = {0, 0, 0, 0};
    if (live) norm = norm_of(saved[channel], saved[c + channel], gamma[channel], beta[channel]);
    ACC x[KEEP / PER][PER];
    double total = 0, product = 0;
#pragma unroll
    for (int i = 0; i < KEEP / PER; i++) {
        int row[PER], out = rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS, units, row);
#pragma unroll
        for (int k = 0; k < PER; k++)
            x[i][k] = live && row[k] >= 0 ? value(z[row[k] * c + channel]) : (ACC)0;
        if (!live || out < 0) continue;
        int at = out * c + channel;
        ACC top = PER == 1 ? x[i][0] : Winner(norm, gamma[channel], x[i]).z;
        ACC g = passed(whole(dy, part, at), norm, top, y, at, relu);
        if (y) dy[at] = element(g);
        total += g;
        product += g * norm.centred(top);
    }
    double both[2] = {total, product * norm.inverse_std};
    sum_over_lanes(both, shared);
    total = both[0], product = both[1];
    // adds 0, which the compiler cannot know: it would keep the first loop's addresses in registers
    int first = threadIdx.y + __syncthreads_or(0);
    if (!live) return;
    if (threadIdx.y == 0) d_beta[channel] = (REAL)total, d_gamma[channel] = (REAL)product;
    InputGradient gradient(norm, total, product, n * h * w);
#pragma unroll
    for (int i = 0; i < KEEP / PER; i++) {
        int row[PER], best = 0, out = rows_of<PER>(windows, first + i * SMALL_ROWS, units, row);
        ACC g = 0;
        if (out >= 0) {  // dy again: kept in registers, it would not leave enough of them
            ACC top = x[i][0];
            if (PER == 4) {
                Winner window(norm, gamma[channel], x[i]);
                top = window.z, best = window.index;
            }
            g = passed(value(dy[out * c + channel]), norm, top, 0, 0, relu && !y);
        }
#pragma unroll
        for (int k = 0; k < PER; k++)
            if (row[k] >= 0)
                z[row[k] * c + channel] = gradient.at(k == best ? g : (ACC)0, norm.centred(x[i][k]));
    }
}

// dz over z; `part` is added to dy, and with y, g replaces it.
extern "C" __global__ void __launch_bounds__(SMALL_LANES* SMALL_ROWS, 1) norm_small_backward(
    ELEM* dy, const ELEM* __restrict__ part, ELEM* z, const ELEM* __restrict__ y,
    const ACC* __restrict__ saved, const REAL* __restrict__ gamma, const REAL* __restrict__ beta,
    REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c, int pool, int relu) {
    __shared__ double shared[2 * SMALL_LANES * SMALL_ROWS];
    if (pool)
        small_backward<4>(dy, part, z, 0, saved, gamma, beta, d_gamma, d_beta, n, h, w, c, relu, shared);
    else
        small_backward<1>(dy, part, z, y, saved, gamma, beta, d_gamma, d_beta, n, h, w, c, relu, shared);
}
