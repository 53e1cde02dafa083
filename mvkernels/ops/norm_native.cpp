// RMSNorm of rows, y = w x / sqrt(mean(x^2) + eps) in fp32: one call where PyTorch takes seven. A row's numbers are added
// in an order of its own, so that it has the same bits whoever is beside it, with any number of threads.
//
// Shapes: x and y [rows, dim], weight [dim], contiguous.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

constexpr int WIDTH = VECTOR_BYTES / 4;
constexpr int SUMS = 4;  // that are added to by turns, so that none waits for the one before

typedef float Floats __attribute__((vector_size(VECTOR_BYTES), may_alias));

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, VECTOR_BYTES);
    return x;
}

void norm(const float* x, const float* weight, float eps, int64_t dim, float* y) {
    Floats sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= dim; i += SUMS * WIDTH)
        for (int s = 0; s < SUMS; ++s) {
            const Floats xs = load(x + i + s * WIDTH);
            sums[s] += xs * xs;
        }
    float total = 0;
    for (; i < dim; ++i) total += x[i] * x[i];
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int n = 0; n < WIDTH; ++n) total += sum[n];
    const float factor = 1 / std::sqrt(total / float(dim) + eps);
    for (i = 0; i < dim; ++i) y[i] = weight[i] * (x[i] * factor);
}

}  // namespace

extern "C" void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t dim, float* y,
                         int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) norm(x + row * dim, weight, eps, dim, y + row * dim);
}
