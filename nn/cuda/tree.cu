// Sums along one fixed tree (see nn/ops/tree.py).

// leaf = x · share
extern "C" __global__ void __launch_bounds__(THREADS) put_leaf(
    const REAL* __restrict__ x, REAL* __restrict__ leaf, double share, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) leaf[i] = x[i] * (REAL)share;
}

// total (size,) = the sum of the rows at `places`, neighbours first; the rows are overwritten.
extern "C" __global__ void __launch_bounds__(THREADS) add_leaves(
    REAL* rows, const int* __restrict__ places, REAL* __restrict__ total, int leaves, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid()) {
        for (int width = 1; width < leaves; width *= 2)
            for (int left = 0; left + width < leaves; left += 2 * width)
                rows[places[left] * size + i] += rows[places[left + width] * size + i];
        total[i] = rows[places[0] * size + i];
    }
}
