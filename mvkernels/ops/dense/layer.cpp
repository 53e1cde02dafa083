// Operations between the matrix products of a decoder, in fp32, each in one call where PyTorch takes several:
//
//     rms_norm        y = w x / sqrt(mean(x^2) + eps)
//     rotate_append   q and k, head by head: normed where the model does so, and rotated by their positions (RoPE, halves
//                     of a head as in transformers); k and v into pages
//     gate            y = silu(g) u = g u / (1 + e^-g)
//     likeliest       the first of the largest numbers of a row, of logits; where it has NaN, the first NaN
//     decoder_layer   a whole layer: these, and kernels for products and attention given as function pointers;
//                     decoder_layers: several layers
//
// An element depends only on its row and its index there, so that the bits of a row depend neither on other rows nor on
// the number of threads.
//
// Shapes: x and y [rows, dim], weight [dim]; others are at the functions. Contiguous, except rows of a product's
// output.

#include <cmath>

#include "../native.h"

namespace {

constexpr int MAX_DIM = 256;  // of a head
constexpr int SUMS = 4;  // independent accumulators, to hide latency
constexpr int64_t PIECE = 1024;
// For fewer elements, one thread takes less time than waking others.
constexpr int64_t NUMBERS = 1 << 15;

void norm(const float* x, const float* weight, float eps, int64_t dim, float* y) {
    Floats sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= dim; i += SUMS * WIDTH)
        for (int s = 0; s < SUMS; ++s) {
            const Floats xs = load_floats(x + i + s * WIDTH);
            sums[s] += xs * xs;
        }
    float total = 0;
    for (; i < dim; ++i) total += x[i] * x[i];
    total += sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float factor = 1 / std::sqrt(total / float(dim) + eps);
    for (i = 0; i < dim; ++i) y[i] = weight[i] * (x[i] * factor);
}

// One head, [dim]; weight (or null), cos and sin [dim].
void norm_rotate(const float* x, const float* weight, float eps, const float* cos, const float* sin, int64_t dim,
                 float* y) {
    float normed[MAX_DIM];
    if (weight) {
        norm(x, weight, eps, dim, normed);
        x = normed;
    }
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; ++d) {
        y[d] = x[d] * cos[d] - x[d + half] * sin[d];
        y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
    }
}

inline Floats silu_times(Floats g, Floats u) {
    const Floats small = exp2_of((g < 0.0f ? g : -g) * LOG2_E);  // e^-|g|, which cannot overflow
    return g * u * (g < 0.0f ? small : Floats{} + 1.0f) / (1.0f + small);
}

// All ones where there is NaN.
inline Ints nan_in(Floats x) { return x != x; }

// b where a has NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline bool any_of(Ints x) {
    int64_t parts[VECTOR_BYTES / 8], found = 0;
    std::memcpy(parts, &x, VECTOR_BYTES);
    for (const int64_t part : parts) found |= part;
    return found != 0;
}

// Piece by piece, each in one vectorised pass; only the piece with the largest number is searched for its place.
int64_t likeliest_of(const float* x, int64_t dim) {
    float best = -INFINITY;
    int64_t first = 0;
    for (int64_t from = 0; from < dim; from += PIECE) {
        const int64_t to = from + PIECE < dim ? from + PIECE : dim;
        Floats largest[SUMS];
        for (Floats& part : largest) part = Floats{} - INFINITY;
        Ints nan{};
        int64_t i = from;
        for (; i + SUMS * WIDTH <= to; i += SUMS * WIDTH)
            for (int s = 0; s < SUMS; ++s) {
                const Floats xs = load_floats(x + i + s * WIDTH);
                nan |= nan_in(xs);
                largest[s] = larger(xs, largest[s]);
            }
        bool bad = any_of(nan);
        const Floats whole = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
        float high = best;
        if (any_of(whole > best)) high = largest_of(whole);  // in few pieces
        for (; i < to; ++i) {
            bad |= x[i] != x[i];
            high = x[i] > high ? x[i] : high;
        }
        if (bad) {
            while (x[from] == x[from]) ++from;
            return from;
        }
        if (high > best) best = high, first = from;
    }
    while (x[first] != best) ++first;
    return first;
}

}  // namespace

extern "C" {

void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t dim, float* y, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) norm(x + row * dim, weight, eps, dim, y + row * dim);
}

// qkv: rows of `stride` numbers, q [heads, dim], k and v [kv_heads, dim] side by side. cos, sin [rows, dim]. q [rows,
// heads, dim]. caches [slots, kv_heads, dim]: row r goes to slots[r], nowhere below 0. Weights of the heads' norms or
// null.
void rotate_append(const float* qkv, int64_t rows, int64_t stride, int64_t heads, int64_t kv_heads, int64_t dim,
                   const float* cos, const float* sin, const float* q_weight, const float* k_weight, float eps,
                   const int64_t* slots, float* q, float* k_cache, float* v_cache, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const float* const from = qkv + row * stride;
        const float *const c = cos + row * dim, *const s = sin + row * dim;
        for (int64_t h = 0; h < heads; ++h)
            norm_rotate(from + h * dim, q_weight, eps, c, s, dim, q + (row * heads + h) * dim);
        if (slots[row] < 0) continue;
        const float* const k = from + heads * dim;
        const int64_t to = slots[row] * kv_heads * dim;
        for (int64_t h = 0; h < kv_heads; ++h)
            norm_rotate(k + h * dim, k_weight, eps, c, s, dim, k_cache + to + h * dim);
        std::memcpy(v_cache + to, k + kv_heads * dim, kv_heads * dim * sizeof(float));
    }
}

// gu: rows of g [dim] and u [dim] side by side.
void gate(const float* gu, int64_t rows, int64_t dim, float* y, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const float *const g = gu + row * 2 * dim, *const u = g + dim;
        float* const to = y + row * dim;
        int64_t i = 0;
        for (; i + WIDTH <= dim; i += WIDTH) {
            const Floats result = silu_times(load_floats(g + i), load_floats(u + i));
            std::memcpy(to + i, &result, VECTOR_BYTES);
        }
        if (i < dim) {  // the rest as a vector too, so that bits do not depend on dim
            const Floats result = silu_times(load_floats(g + i, dim - i), load_floats(u + i, dim - i));
            std::memcpy(to + i, &result, (dim - i) * 4);
        }
    }
}

// x: rows of `stride` numbers, of which the first `dim` count, at least one -> index, value [rows].
void likeliest(const float* x, int64_t rows, int64_t stride, int64_t dim, int64_t* index, float* value,
               int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        index[row] = likeliest_of(x + row * stride, dim);
        value[row] = x[row * stride + index[row]];
    }
}

// A product of `product.py`: its function and struct.
struct Product {
    void (*run)(const void* what, const float* x, int64_t rows, float* y, const float* residual, void* space,
                int32_t num_threads);
    const void* what;
};

struct DecoderLayer {
    Product qkv, out, gates, down;
    void (*attend)(const void* plan, int32_t element, const void* q, const void* k, const void* v, void* out, float* lse,
                   float scale);
    const float *before, *after, *q_norm, *k_norm;
    float before_eps, after_eps, head_eps, scale;
    int64_t hidden, heads, kv_heads, dim, inner;
};

// rows: of x. planned: rows of the step, which come first; other rows attend to nothing. Buffers [rows, ..].
struct DecoderStep {
    const float *cos, *sin;
    const int64_t* slots;
    const void* plan;
    int64_t rows, planned;
    float *normed, *projected, *q, *attended, *mixed, *opened, *gated;
    void* space;
    int32_t num_threads;
};

// x, y [rows, hidden]; caches of the layer as in `rotate_append`.
void decoder_layer(const DecoderLayer* layer, const DecoderStep* step, const float* x, float* k_cache, float* v_cache,
                   float* y) {
    const int64_t rows = step->rows, stride = (layer->heads + 2 * layer->kv_heads) * layer->dim;
    const auto threads = [&](int64_t numbers) { return numbers >= NUMBERS ? step->num_threads : 1; };
    const auto multiply = [&](const Product& product, const float* from, float* to, const float* residual) {
        product.run(product.what, from, rows, to, residual, step->space, step->num_threads);
    };
    rms_norm(x, layer->before, layer->before_eps, rows, layer->hidden, step->normed, threads(rows * layer->hidden));
    multiply(layer->qkv, step->normed, step->projected, nullptr);
    rotate_append(step->projected, step->planned, stride, layer->heads, layer->kv_heads, layer->dim, step->cos, step->sin,
                  layer->q_norm, layer->k_norm, layer->head_eps, step->slots, step->q, k_cache, v_cache,
                  threads(rows * stride));
    layer->attend(step->plan, 0, step->q, k_cache, v_cache, step->attended, nullptr, layer->scale);
    const int64_t width = layer->heads * layer->dim;
    std::memset(step->attended + step->planned * width, 0, (rows - step->planned) * width * sizeof(float));
    multiply(layer->out, step->attended, step->mixed, x);
    rms_norm(step->mixed, layer->after, layer->after_eps, rows, layer->hidden, step->normed,
             threads(rows * layer->hidden));
    multiply(layer->gates, step->normed, step->opened, nullptr);
    gate(step->opened, rows, layer->inner, step->gated, threads(2 * rows * layer->inner));
    multiply(layer->down, step->gated, y, step->mixed);
}

// Layer after layer, in place: a layer does not read x after it has written y.
void decoder_layers(const DecoderLayer* const* layers, int64_t count, const DecoderStep* step, float* x,
                    float* const* k_caches, float* const* v_caches) {
    for (int64_t i = 0; i < count; ++i) decoder_layer(layers[i], step, x, k_caches[i], v_caches[i], x);
}
}
