// Dropout; see nn/ops/dropout.py.

static __device__ __forceinline__ unsigned scrambled(unsigned x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// y = x / (1 − rate) where the hash of an element is at least `threshold`, 0 elsewhere; y may be x.
extern "C" __global__ void __launch_bounds__(THREADS) dropout(
    const ELEM* x, ELEM* y, const unsigned* __restrict__ keys, Step salt, Step threshold, double rate, int values,
    Step size) {
    ACC scale = (ACC)(1 / (1 - rate));
    auto body = [&](auto width, Step i) {
        auto a = load<width>(x + i);
        Step image = i / values;
        int place = i - image * values;
        for (int k = 0; k < width; k++) {
            unsigned key = scrambled(keys[image] ^ (unsigned)salt);
            unsigned drawn = scrambled(key + (unsigned)place * GOLDEN);
            if (++place == values) place = 0, image++;
            a.at[k] = element(drawn < (unsigned)threshold ? (ACC)0 : value(a.at[k]) * scale);
        }
        store(y + i, a);
    };
    over_vector(size, body, x, y);
}

// keys[i] = source[order[at·batch + start + i]]
extern "C" __global__ void __launch_bounds__(THREADS) gather_keys(
    unsigned* keys, const unsigned* __restrict__ source, const int* __restrict__ order,
    const Step* __restrict__ at, int batch, int start, int n) {
    for (Step i = first_of_thread(); i < n; i += threads_of_grid())
        keys[i] = source[order[at[0] * batch + start + i]];
}
