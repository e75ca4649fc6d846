// The addition of a residual outside of batch norm's pass, and of gradients.

// y = relu(x + residual)
extern "C" __global__ void __launch_bounds__(THREADS) add_relu_forward(
    const ELEM* __restrict__ x, const ELEM* __restrict__ residual, ELEM* __restrict__ y, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid())
        y[i] = element(rectified(value(x[i]) + value(residual[i]), 1));
}

// dy and d_residual become dy where y is above 0, 0 elsewhere.
extern "C" __global__ void __launch_bounds__(THREADS) add_relu_backward(
    ELEM* dy, const ELEM* __restrict__ y, ELEM* __restrict__ d_residual, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid())
        dy[i] = d_residual[i] = element(value(y[i]) > 0 ? value(dy[i]) : (ACC)0);
}

// x += y
extern "C" __global__ void __launch_bounds__(THREADS) add(ELEM* x, const ELEM* __restrict__ y, Step size) {
    for (Step i = first_of_thread(); i < size; i += threads_of_grid())
        x[i] = element(value(x[i]) + value(y[i]));
}
