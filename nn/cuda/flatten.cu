// Images (N, pixels, C) as vectors (N, C·pixels), in the type of parameters.

extern "C" __global__ void __launch_bounds__(THREADS) flatten(
    const ELEM* __restrict__ x, REAL* __restrict__ y, int pixels, int c, Step size) {
    for (Step at = first_of_thread(); at < size; at += threads_of_grid()) {
        Step image = at / pixels / c, channel = at / pixels % c, pixel = at % pixels;
        y[at] = (REAL)value(x[(image * pixels + pixel) * c + channel]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) unflatten(
    const REAL* __restrict__ dy, ELEM* __restrict__ dx, int pixels, int c, Step size) {
    for (Step at = first_of_thread(); at < size; at += threads_of_grid()) {
        Step image = at / pixels / c, channel = at / pixels % c, pixel = at % pixels;
        dx[(image * pixels + pixel) * c + channel] = element((ACC)dy[at]);
    }
}
