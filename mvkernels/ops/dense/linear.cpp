// Linear layers for small batches, y = r + x W^T + b in fp32: bound by one read of the weights, which are not copied.
//
//     up to FEW rows    vectors along the inner dimension: weights and rows are multiplied element by element
//     more              vectors of rows (of x transposed): one weight times a vector adds to a vector of results
//
// A weight may also be given in bf16, if that represents it exactly. With up to FEW rows the bf16 copy is read instead,
// half the memory traffic; the products are the same as in fp32, bit for bit.
//
// The order of summation depends only on which of the two methods is used. Within each, the bits of a row depend
// neither on other rows nor on the number of threads. Several layers with the same input are one call.
//
// Shapes: x [rows, inner], weight [outer, inner], bias [outer] or null, r (or null) and y [rows, stride], of which each
// layer fills its own columns; all contiguous.

#include <algorithm>

#include "../native.h"

#if defined(__AVX512F__)
#define REGISTERS 24  // for sums; the others hold operands
#else
#define REGISTERS 8
#endif

namespace {

constexpr int LANES = 2 * WIDTH;
constexpr int FEW = 8;
constexpr int TILE = REGISTERS / 3;  // weights at a time, by vectors of rows
constexpr int64_t BLOCK = 48;        // rows of W for one thread: they stay in its cache for all rows of x
// With more rows PyTorch's products are as fast; with few registers this kernel is bound by the latency of sums.
constexpr int MOST = REGISTERS > 8 ? 512 : 64;

}  // namespace

extern "C" struct Layer {
    const float *weight, *bias;
    const uint16_t* narrow;  // the weight in bf16, or null
    int64_t outer, column;   // column: its first column of y
};

namespace {

// The same of bf16.
inline Floats load_floats(const uint16_t* from, int64_t count = WIDTH) {
    typedef uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    Narrow narrow{};
    std::memcpy(&narrow, from, count * sizeof *from);
    return (Floats)(__builtin_convertvector(narrow, Bits) << 16);
}

// Keeps a compiler from reading x again for every product.
inline void keep([[maybe_unused]] Floats& x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#endif
}

// Destination of results, from a row and column on; residual: added to them, or null.
struct Target {
    float* y;
    const float* residual;
    int64_t stride;

    Target at(int64_t row, int64_t column) const {
        const int64_t place = row * stride + column;
        return {y + place, residual ? residual + place : nullptr, stride};
    }
    void put(int64_t row, int64_t column, float result) const {
        const int64_t place = row * stride + column;
        y[place] = residual ? residual[place] + result : result;
    }
};

// The next weights are prefetched, each line once (bf16 lines twice), into the L2 cache: the L1 cache has no room for
// them beside x.
inline void fetch(const void* weight) { __builtin_prefetch(weight, 0, 2); }

// COUNT weights on ROWS rows, by vectors along the inner dimension.
template <int ROWS, int COUNT, typename Weight>
inline void along(const Weight* weight, const float* bias, const float* x, int64_t inner, const Target& to) {
    Floats sum[COUNT][ROWS] = {};
    int64_t i = 0;
    for (; i + WIDTH <= inner; i += WIDTH) {
        Floats w[COUNT];
        for (int c = 0; c < COUNT; ++c) {
            w[c] = load_floats(weight + c * inner + i);
            fetch(weight + (COUNT + c) * inner + i);
        }
        for (int r = 0; r < ROWS; ++r) {
            Floats xs = load_floats(x + r * inner + i);
            keep(xs);
            for (int c = 0; c < COUNT; ++c) sum[c][r] += w[c] * xs;
        }
    }
    if (const int64_t rest = inner - i; rest > 0)
        for (int c = 0; c < COUNT; ++c) {
            const Floats w = load_floats(weight + c * inner + i, rest);
            for (int r = 0; r < ROWS; ++r) sum[c][r] += w * load_floats(x + r * inner + i, rest);
        }
    for (int c = 0; c < COUNT; ++c)
        for (int r = 0; r < ROWS; ++r) to.put(r, c, (bias ? bias[c] : 0) + sum_of(sum[c][r]));
}

template <int ROWS, typename Weight>
void few(const Layer& layer, const Weight* weight, int64_t first, int64_t last, const float* x, int64_t inner,
         const Target& to) {
    constexpr int COUNT = std::min(REGISTERS / ROWS, 8);
    const auto bias = [&](int64_t n) { return layer.bias ? layer.bias + n : nullptr; };
    for (; first + COUNT <= last; first += COUNT)
        along<ROWS, COUNT>(weight + first * inner, bias(first), x, inner, to.at(0, layer.column + first));
    for (; first < last; ++first)
        along<ROWS, 1>(weight + first * inner, bias(first), x, inner, to.at(0, layer.column + first));
}

// COUNT weights on up to NV vectors of rows. xt: [inner, NV] Floats.
template <int NV, int COUNT>
inline void across(const float* weight, const float* bias, const Floats* xt, int64_t inner, const Target& to, int rows) {
    Floats sum[COUNT][NV];
    for (int c = 0; c < COUNT; ++c)
        for (int n = 0; n < NV; ++n) sum[c][n] = Floats{} + (bias ? bias[c] : 0);
    const auto add = [&](int64_t i) {
        for (int c = 0; c < COUNT; ++c)
            for (int n = 0; n < NV; ++n) sum[c][n] += weight[c * inner + i] * xt[i * NV + n];
    };
    constexpr int EACH = WIDTH / COUNT > 0 ? WIDTH / COUNT : 1;  // so that prefetches are spread over the loop
    int64_t i = 0;
    for (; i + WIDTH <= inner; i += WIDTH)
        for (int e = 0; e < WIDTH; ++e) {
            if (e % EACH == 0 && e / EACH < COUNT) fetch(weight + (COUNT + e / EACH) * inner + i);
            add(i + e);
        }
    for (; i < inner; ++i) add(i);
    float found[COUNT][NV * WIDTH];
    std::memcpy(found, sum, sizeof found);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < COUNT; ++c) to.put(r, c, found[c][r]);
}

template <int NV>
void many(const Layer& layer, int64_t first, int64_t last, const Floats* xt, int64_t inner, const Target& to,
          int rows) {
    const auto bias = [&](int64_t n) { return layer.bias ? layer.bias + n : nullptr; };
    for (; first + TILE <= last; first += TILE)
        across<NV, TILE>(layer.weight + first * inner, bias(first), xt, inner, to.at(0, layer.column + first), rows);
    for (; first < last; ++first)
        across<NV, 1>(layer.weight + first * inner, bias(first), xt, inner, to.at(0, layer.column + first), rows);
}

template <typename Weight>
void any_few(int rows, const Layer& layer, const Weight* weight, int64_t first, int64_t last, const float* x,
             int64_t inner, const Target& to) {
    switch (rows) {
        case 1: return few<1>(layer, weight, first, last, x, inner, to);
        case 2: return few<2>(layer, weight, first, last, x, inner, to);
        case 3: return few<3>(layer, weight, first, last, x, inner, to);
        case 4: return few<4>(layer, weight, first, last, x, inner, to);
        case 5: return few<5>(layer, weight, first, last, x, inner, to);
        case 6: return few<6>(layer, weight, first, last, x, inner, to);
        case 7: return few<7>(layer, weight, first, last, x, inner, to);
        default: return few<8>(layer, weight, first, last, x, inner, to);
    }
}

}  // namespace

extern "C" {

// Layers that are multiplied together.
struct Layers {
    const Layer* layers;
    int64_t num_layers, inner, outer;
};

int32_t few_rows() { return FEW; }
int32_t most_rows() { return MOST; }

// Workspace of `product` in bytes.
int64_t space_bytes(const Layers* what, int64_t rows) {
    return rows > FEW ? ((rows + LANES - 1) / LANES * LANES * what->inner + LANES) * sizeof(float) : 0;
}

void product(const Layers* what, const float* x, int64_t rows, float* y, const float* residual, void* space,
             int32_t num_threads) {
    const int64_t inner = what->inner;
    const Layer* const layers = what->layers;
    const bool by_rows = rows > FEW;
    float* const xt = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(space) + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES);
    int64_t blocks = 0;
    for (int64_t l = 0; l < what->num_layers; ++l) blocks += (layers[l].outer + BLOCK - 1) / BLOCK;
    // Reading the weights takes as long as multiplying them with four rows.
    num_threads = threads_for(std::max<int64_t>(rows, 4) * inner * what->outer, num_threads);
    const Target to{y, residual, what->outer};
    const int64_t tiles = (rows + LANES - 1) / LANES;
    // Tiles of rows, transposed: [inner, lanes], as many lanes as whole vectors need.
    const auto lanes_of = [&](int64_t tile) { return rows - tile * LANES <= WIDTH ? WIDTH : LANES; };

#pragma omp parallel num_threads(num_threads)
    {
        if (by_rows) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < inner; ++i)
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t lanes = lanes_of(tile), first = tile * LANES;
                    float* const to = xt + first * inner + i * lanes;
                    for (int64_t r = 0; r < lanes; ++r) to[r] = first + r < rows ? x[(first + r) * inner + i] : 0;
                }
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t at = block;
            const Layer* layer = layers;
            while (at >= (layer->outer + BLOCK - 1) / BLOCK) at -= (layer->outer + BLOCK - 1) / BLOCK, ++layer;
            const int64_t first = at * BLOCK, last = std::min(first + BLOCK, layer->outer);
            if (!by_rows) {
                if (layer->narrow)
                    any_few(int(rows), *layer, layer->narrow, first, last, x, inner, to);
                else
                    any_few(int(rows), *layer, layer->weight, first, last, x, inner, to);
                continue;
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t row = tile * LANES;
                const Floats* const xs = reinterpret_cast<const Floats*>(xt + row * inner);
                const int count = int(std::min<int64_t>(LANES, rows - row));
                if (lanes_of(tile) == WIDTH)
                    many<1>(*layer, first, last, xs, inner, to.at(row, 0), count);
                else
                    many<2>(*layer, first, last, xs, inner, to.at(row, 0), count);
            }
        }
    }
}
}
