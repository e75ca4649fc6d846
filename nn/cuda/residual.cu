// The addition of a residual outside of batch norm's pass, and of gradients.

// y = relu(x + residual)
extern "C" __global__ void __launch_bounds__(THREADS) add_relu_forward(
    const ELEM* __restrict__ x, const ELEM* __restrict__ residual, ELEM* __restrict__ y, Step size) {
    auto body = [&](auto width, Step i) {
        auto a = load<width>(x + i), b = load<width>(residual + i);
        for (int k = 0; k < width; k++) a.at[k] = element(rectified(value(a.at[k]) + value(b.at[k]), 1));
        store(y + i, a);
    };
    over_vector(size, body, x, residual, y);
}

// dy and d_residual become dy where y is above 0, 0 elsewhere.
extern "C" __global__ void __launch_bounds__(THREADS) add_relu_backward(
    ELEM* dy, const ELEM* __restrict__ y, ELEM* __restrict__ d_residual, Step size) {
    auto body = [&](auto width, Step i) {
        auto g = load<width>(dy + i), a = load<width>(y + i);
        for (int k = 0; k < width; k++) g.at[k] = element(value(a.at[k]) > 0 ? value(g.at[k]) : (ACC)0);
        store(dy + i, g);
        store(d_residual + i, g);
    };
    over_vector(size, body, dy, y, d_residual);
}

// x += y
extern "C" __global__ void __launch_bounds__(THREADS) add(ELEM* x, const ELEM* __restrict__ y, Step size) {
    auto body = [&](auto width, Step i) {
        auto a = load<width>(x + i), b = load<width>(y + i);
        for (int k = 0; k < width; k++) a.at[k] = element(value(a.at[k]) + value(b.at[k]));
        store(x + i, a);
    };
    over_vector(size, body, x, y);
}
