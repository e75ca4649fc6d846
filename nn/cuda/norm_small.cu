// Batch norm in one launch, for few rows and one rank: a block has all rows of SMALL_LANES channels and holds
// them in registers, KEEP values a thread, of P channels. Statistics in two passes over the registers. For the
// operations see norm.cu.

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

// What counts of a unit in one channel: its pixel, or the first largest of four; `index`: which of them.
template <int P>
static __device__ __forceinline__ ACC top_of(
    const Norm&, REAL, const Pack<ELEM, P> (&one)[1], int channel, int* index = 0) {
    if (index) *index = 0;
    return value(one[0].at[channel]);
}

template <int P>
static __device__ __forceinline__ ACC top_of(
    const Norm& norm, REAL gamma, const Pack<ELEM, P> (&four)[4], int channel, int* index = 0) {
    Winner winner(norm, gamma, four, channel);
    if (index) *index = winner.index;
    return winner.z;
}

// Units that a thread holds.
template <int PER, int P> constexpr int HELD = (KEEP / PER + P - 1) / P;

template <int PER, int P>
static __device__ void small_forward(
    const ELEM* z, const ELEM* residual, const REAL* gamma, const REAL* beta, REAL* running_mean,
    REAL* running_var, ACC* saved, ELEM* y, int n, int h, int w, int c, int relu, double* shared) {
    int channel = blockIdx.x * SMALL_LANES + threadIdx.x * P;
    bool live = channel < c;
    Windows windows = {h, w};
    int units = PER == 1 ? n * h * w : windows.count(n), count = n * h * w;
    Pack<ELEM, P> x[HELD<PER, P>][PER];
    double sum[P] = {}, squares[P] = {};
#pragma unroll
    for (int i = 0; i < HELD<PER, P>; i++) {
        int row[PER];
        rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS * P, units, row);
        ACC part[P] = {};
#pragma unroll
        for (int j = 0; j < PER; j++) {
            bool here = live && row[j] >= 0;
            x[i][j] = here ? load<P>(z + row[j] * c + channel) : Pack<ELEM, P>();
#pragma unroll
            for (int k = 0; k < P; k++) part[k] += value(x[i][j].at[k]);
        }
#pragma unroll
        for (int k = 0; k < P; k++) sum[k] += part[k];
    }
    sum_over_lanes(sum, shared);
#pragma unroll
    for (int i = 0; i < HELD<PER, P>; i++) {
        int row[PER];
        rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS * P, units, row);
#pragma unroll
        for (int k = 0; k < P; k++) {
            ACC part = 0, mean = (ACC)(sum[k] / count);
#pragma unroll
            for (int j = 0; j < PER; j++) {
                ACC apart = row[j] >= 0 ? value(x[i][j].at[k]) - mean : (ACC)0;
                part += apart * apart;
            }
            squares[k] += part;
        }
    }
    sum_over_lanes(squares, shared);
    if (!live) return;
    Norm norm[P];
#pragma unroll
    for (int k = 0; k < P; k++) {
        int at = channel + k;
        norm[k] = remember(sum[k] / count, squares[k] / count, count, threadIdx.y == 0, gamma[at], beta[at],
                           running_mean, running_var, saved, at, c);
    }
#pragma unroll
    for (int i = 0; i < HELD<PER, P>; i++) {
        int row[PER], out = rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS * P, units, row);
        if (out < 0) continue;
        int at = out * c + channel;
        Pack<ELEM, P> a, more = {};
        if (PER == 1 && residual) more = load<P>(residual + at);
#pragma unroll
        for (int k = 0; k < P; k++) {
            ACC top = top_of(norm[k], gamma[channel + k], x[i], k);
            a.at[k] = element(rectified(norm[k].activation(top) + value(more.at[k]), relu));
        }
        store(y + at, a);
    }
}

extern "C" __global__ void __launch_bounds__(SMALL_LANES* SMALL_ROWS, 1) norm_small_forward(
    const ELEM* __restrict__ z, const ELEM* __restrict__ residual, const REAL* __restrict__ gamma,
    const REAL* __restrict__ beta, REAL* running_mean, REAL* running_var, ACC* saved, ELEM* y, int n, int h,
    int w, int c, int pool, int relu) {
    __shared__ double shared[PACK * SMALL_LANES * SMALL_ROWS];
    over_channels(c, [&](auto width) {
        if (pool)
            small_forward<4, width>(z, 0, gamma, beta, running_mean, running_var, saved, y, n, h, w, c, relu,
                                    shared);
        else
            small_forward<1, width>(z, residual, gamma, beta, running_mean, running_var, saved, y, n, h, w, c,
                                    relu, shared);
    });
}

template <int PER, int P>
static __device__ void small_backward(
    ELEM* dy, const ELEM* part, ELEM* z, const ELEM* y, const ACC* saved, const REAL* gamma, const REAL* beta,
    REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c, int relu, double* shared) {
    int channel = blockIdx.x * SMALL_LANES + threadIdx.x * P;
    bool live = channel < c;
    Windows windows = {h, w};
    int units = PER == 1 ? n * h * w : windows.count(n);
    Norm norm[P] = {};
    if (live) {
#pragma unroll
        for (int k = 0; k < P; k++) {
            int at = channel + k;
            norm[k] = norm_of(saved[at], saved[c + at], gamma[at], beta[at]);
        }
    }
    Pack<ELEM, P> x[HELD<PER, P>][PER];
    double both[2 * P] = {};  // Σg of each channel, then Σg·x̂
#pragma unroll
    for (int i = 0; i < HELD<PER, P>; i++) {
        int row[PER], out = rows_of<PER>(windows, threadIdx.y + i * SMALL_ROWS * P, units, row);
#pragma unroll
        for (int j = 0; j < PER; j++)
            x[i][j] = live && row[j] >= 0 ? load<P>(z + row[j] * c + channel) : Pack<ELEM, P>();
        if (!live || out < 0) continue;
        int at = out * c + channel;
        Pack<ELEM, P> d = whole<P>(dy, part, at), a = {};
        if (y) a = load<P>(y + at);
#pragma unroll
        for (int k = 0; k < P; k++) {
            ACC top = top_of(norm[k], gamma[channel + k], x[i], k);
            ACC g = passed(value(d.at[k]), norm[k], top, y ? &a.at[k] : 0, relu);
            d.at[k] = element(g);
            both[k] += g;
            both[P + k] += g * norm[k].centred(top);
        }
        if (y) store(dy + at, d);
    }
#pragma unroll
    for (int k = 0; k < P; k++) both[P + k] *= norm[k].inverse_std;
    sum_over_lanes(both, shared);
    // adds 0, which the compiler cannot know: it would keep the first loop's addresses in registers
    int first = threadIdx.y + __syncthreads_or(0);
    if (!live) return;
    InputGradient gradient[P];
#pragma unroll
    for (int k = 0; k < P; k++) {
        if (threadIdx.y == 0) d_beta[channel + k] = (REAL)both[k], d_gamma[channel + k] = (REAL)both[P + k];
        gradient[k] = InputGradient(norm[k], both[k], both[P + k], n * h * w);
    }
#pragma unroll
    for (int i = 0; i < HELD<PER, P>; i++) {
        int row[PER], out = rows_of<PER>(windows, first + i * SMALL_ROWS * P, units, row);
        Pack<ELEM, P> d = {};  // dy again: kept in registers, it would not leave enough of them
        if (out >= 0) d = load<P>(dy + out * c + channel);
#pragma unroll
        for (int k = 0; k < P; k++) {
            int best;
            ACC top = top_of(norm[k], gamma[channel + k], x[i], k, &best);
            ACC g = out < 0 ? (ACC)0 : passed(value(d.at[k]), norm[k], top, 0, relu && !y);
#pragma unroll
            for (int j = 0; j < PER; j++) {
                ACC centred = norm[k].centred(value(x[i][j].at[k]));
                x[i][j].at[k] = gradient[k].at(j == best ? g : (ACC)0, centred);
            }
        }
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (row[j] >= 0) store(z + row[j] * c + channel, x[i][j]);
    }
}

// dz over z; `part` is added to dy, and with y, g replaces it.
extern "C" __global__ void __launch_bounds__(SMALL_LANES* SMALL_ROWS, 1) norm_small_backward(
    ELEM* dy, const ELEM* __restrict__ part, ELEM* z, const ELEM* __restrict__ y,
    const ACC* __restrict__ saved, const REAL* __restrict__ gamma, const REAL* __restrict__ beta,
    REAL* d_gamma, REAL* d_beta, int n, int h, int w, int c, int pool, int relu) {
    __shared__ double shared[2 * PACK * SMALL_LANES * SMALL_ROWS];
    over_channels(c, [&](auto width) {
        if (pool)
            small_backward<4, width>(dy, part, z, 0, saved, gamma, beta, d_gamma, d_beta, n, h, w, c, relu,
                                     shared);
        else
            small_backward<1, width>(dy, part, z, y, saved, gamma, beta, d_gamma, d_beta, n, h, w, c, relu,
                                     shared);
    });
}
