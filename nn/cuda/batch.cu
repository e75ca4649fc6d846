// From stored images, N×H×W×C bytes, to the input of the network.

// One channel of an image, 0 outside of it, at (row, column) between its pixels: bilinear.
static __device__ ACC between(const unsigned char* image, ACC row, ACC column, int h, int w, int channels) {
    row = fmin(fmax(row, (ACC)-1), (ACC)h);
    column = fmin(fmax(column, (ACC)-1), (ACC)w);
    int top = (int)floor(row), left = (int)floor(column);
    ACC corner[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = top + k / 2, j = left + k % 2;
        corner[k] = i >= 0 && i < h && j >= 0 && j < w ? (ACC)image[(i * w + j) * channels] : (ACC)0;
    }
    ACC upper = corner[0] + (column - left) * (corner[1] - corner[0]);
    ACC lower = corner[2] + (column - left) * (corner[3] - corner[2]);
    return upper + (row - top) * (lower - upper);
}

// x[i] = images[order[at·batch + start + i]] / 255, and the labels alike: one block an image. With warps,
// (a, b, c, d, p, q, top, left) for each image, (i, j) from the centre is taken from (a·i + b·j + p, c·i + d·j + q),
// and a square of `cutout` pixels from (top, left) on is 0.
extern "C" __global__ void __launch_bounds__(THREADS) gather_batch(
    const unsigned char* __restrict__ images, const int* __restrict__ labels, const int* __restrict__ order,
    const Step* __restrict__ at, int batch, int start, ELEM* x, int* y, const float* __restrict__ warps,
    int cutout, int h, int w, int channels) {
    int values = h * w * channels, image = order[at[0] * batch + start + blockIdx.x];
    const unsigned char* from = images + (size_t)image * values;
    const float* m = warps + (size_t)8 * image;
    ACC middle = (ACC)(h - 1) / 2, centre = (ACC)(w - 1) / 2;
    for (int i = threadIdx.x; i < values; i += blockDim.x) {
        int pixel = i / channels;
        ACC u = pixel / w - middle, v = pixel % w - centre;
        ACC level = from[i];
        if (warps) {
            ACC row = m[0] * u + m[1] * v + m[4] + middle, column = m[2] * u + m[3] * v + m[5] + centre;
            ACC down = pixel / w - (ACC)m[6], across = pixel % w - (ACC)m[7];
            bool cut = down >= 0 && down < cutout && across >= 0 && across < cutout;
            level = cut ? (ACC)0 : between(from + i % channels, row, column, h, w, channels);
        }
        x[(size_t)blockIdx.x * values + i] = element(level / 255);
    }
    if (threadIdx.x == 0) y[blockIdx.x] = labels[image];
}
