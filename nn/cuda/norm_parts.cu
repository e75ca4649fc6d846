// What the kernels of batch norm share; see norm.cu.

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
    template <int P>
    __device__ Winner(const Norm& norm, REAL gamma, const Pack<ELEM, P> (&four)[4], int channel)
        : index(0), z(value(four[0].at[channel])) {
        ACC sign = gamma < 0 || (gamma == 0 && 1 / gamma < 0) ? -1 : 1, top = sign * norm.centred(z);
#pragma unroll
        for (int k = 1; k < 4; k++) {
            ACC next = value(four[k].at[channel]), other = sign * norm.centred(next);
            // NaN wins, as NumPy has it
            if (other > top || other != other) top = other, index = k, z = next;
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

// g: dy where the activation was let through, 0 elsewhere. *y decides where there is a residual.
static __device__ __forceinline__ ACC passed(ACC dy, const Norm& norm, ACC z, const ELEM* y, int relu) {
    if (!relu) return dy;
    return (y ? value(*y) : norm.activation(z)) > 0 ? dy : (ACC)0;
}

// dy, to which `part` is added where it comes in two.
template <int P>
static __device__ __forceinline__ Pack<ELEM, P> whole(ELEM* dy, const ELEM* part, size_t at) {
    auto sum = load<P>(dy + at);
    if (!part) return sum;
    auto more = load<P>(part + at);
#pragma unroll
    for (int k = 0; k < P; k++) sum.at[k] = element(value(sum.at[k]) + value(more.at[k]));
    store(dy + at, sum);
    return sum;
}

// dx = γ·inverse_std·(g − Σg/count − x̂·Σ(g·x̂)/count)
struct InputGradient {
    ACC scale, slope, shift;
    InputGradient() = default;
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
