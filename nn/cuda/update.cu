// Adam and SGD over the flat vectors; the last update of a step has a history, and ends it. rates (steps, 2) is a table of the epoch's
// learning rates, of which row at[0] holds; `compute`, where given, is the values that convolutions read.

static __device__ __forceinline__ void put(REAL* values, ELEM* compute, Step i, REAL x) {
    values[i] = x;
    if (compute) compute[i] = element((ACC)x);
}

// history[at mod rows] = local_loss, step_metrics; then the step counter, which every block has read, moves on.
static __device__ void end_step(
    REAL* history, const REAL* local_loss, const REAL* step_metrics, unsigned* arrived, int rows, Step* at) {
    if (!history || !last_to_arrive(arrived) || threadIdx.x > 0) return;
    REAL* row = history + at[0] % rows * 4;
    row[0] = local_loss[0];
    for (int i = 0; i < 3; i++) row[i + 1] = step_metrics[i];
    at[0]++;
}

// m += (1−β1)(g − m); v += (1−β2)(g² − v); θ = θ·(1 − lr·λ) − lr_t·m/(√v + ε̂), with rates = lr, lr_t.
extern "C" __global__ void __launch_bounds__(THREADS, 4) adam(
    REAL* values, const REAL* __restrict__ grads, REAL* __restrict__ m, REAL* __restrict__ v,
    const double* __restrict__ rates, Step* at, ELEM* compute, double decay, Step size, REAL* history,
    const REAL* local_loss, const REAL* step_metrics, unsigned* arrived, int history_rows) {
    double lr = rates[2 * at[0]], lr_t = rates[2 * at[0] + 1];
    REAL keep = (REAL)(1 - lr * decay);
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) {
        REAL g = grads[i];
        REAL first = m[i] += (g - m[i]) * (REAL)(1 - BETA1);
        REAL second = v[i] += (g * g - v[i]) * (REAL)(1 - BETA2);
        put(values, compute, i, values[i] * keep - first / (sqrt(second) + (REAL)EPS_HAT) * (REAL)lr_t);
    }
    end_step(history, local_loss, step_metrics, arrived, history_rows, at);
}

// g += λθ; u = μu + g; θ −= lr·u, or with Nesterov θ −= lr·(g + μu); without momentum u = g.
extern "C" __global__ void __launch_bounds__(THREADS) sgd(
    REAL* values, const REAL* __restrict__ grads, REAL* velocity, const double* __restrict__ rates, Step* at,
    ELEM* compute, double momentum, int nesterov, double decay, Step size, REAL* history,
    const REAL* local_loss, const REAL* step_metrics, unsigned* arrived, int history_rows) {
    REAL lr = (REAL)rates[2 * at[0]], mu = (REAL)momentum;
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) {
        REAL g = values[i] * (REAL)decay + grads[i], u = g;
        if (velocity) {
            u = velocity[i] = velocity[i] * mu + g;
            if (nesterov) u = g + u * mu;
        }
        put(values, compute, i, values[i] - u * lr);
    }
    end_step(history, local_loss, step_metrics, arrived, history_rows, at);
}

// mean += (1 − decay)(values − mean).
extern "C" __global__ void __launch_bounds__(THREADS) average(
    REAL* __restrict__ mean, const REAL* __restrict__ values, double decay, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid())
        mean[i] += (values[i] - mean[i]) * (REAL)(1 - decay);
}

// y = x in the type of activations, and back: for the weights that convolutions read, gradients that travel.
extern "C" __global__ void __launch_bounds__(THREADS) to_bf16(
    const REAL* __restrict__ x, ELEM* y, Step size) {
    auto body = [&](auto width, Step i) {
        auto wide = load<width>(x + i);
        Pack<ELEM, width> narrow;
        for (int k = 0; k < width; k++) narrow.at[k] = element((ACC)wide.at[k]);
        store(y + i, narrow);
    };
    over_vector(size, body, x, y);
}

extern "C" __global__ void __launch_bounds__(THREADS) from_bf16(
    const ELEM* __restrict__ x, REAL* y, Step size) {
    auto body = [&](auto width, Step i) {
        auto narrow = load<width>(x + i);
        Pack<REAL, width> wide;
        for (int k = 0; k < width; k++) wide.at[k] = (REAL)value(narrow.at[k]);
        store(y + i, wide);
    };
    over_vector(size, body, x, y);
}
