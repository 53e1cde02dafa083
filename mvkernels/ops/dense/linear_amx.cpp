// Linear layers with bf16 weights, y = r + x W^T + b in fp32, on matrix units (Intel's AMX).
//
// The units multiply bf16 only, and accumulate in fp32. So each element of x is split into three of bf16, which
// together have its 24 bits: x = high + middle + low. Their products with a weight are exact, so the result has fp32
// accuracy. Parts of x, weights, products and sums below 2^-126 are flushed to zero.
//
// The order of summation of a row is fixed, so its bits depend neither on the number of rows nor on that of threads.
// Weights must be finite, because infinity times a zero of padding is NaN.
//
// Shapes: x [rows, inner], residual (or null) and y [rows, outer]; bias [outer] or null. weight, in the order in which
// it is read: [outer / 16, inner / 32, 16, 16, 2], that is [tile of 16 outputs, step, pair of inputs, output, input of
// the pair], padded with zeros.

#include <algorithm>
#include <initializer_list>

#include "../native.h"

#if !defined(HAVE_TILES) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_TILES 1

namespace tiles {

// Linux requires a request for permission, once per process.
inline bool allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

}  // namespace tiles
#endif

extern "C" {

// 0: AMX can be used; 1: the processor or the compiler does not have it; 2: the system refuses it to this process.
int32_t tiles_state() {
#if defined(HAVE_TILES)
    return tiles::allowed() ? 0 : 2;
#else
    return 1;
#endif
}
}

#if defined(HAVE_TILES)

namespace {

constexpr int OUTPUTS = 16, STEP = 32;  // of a tile of weights: outputs, inputs
constexpr int PARTS = 3;
constexpr int MOST = 16;                    // rows of a tile
constexpr int64_t TILE = OUTPUTS * STEP;    // numbers
constexpr int AHEAD = 4;                    // steps of which weights are prefetched
constexpr int64_t KEPT_BYTES = 512 * 1024;  // of weights that stay in the L2 cache for all rows

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// All tiles except those of weights have this many rows.
Config config_of(int rows, std::initializer_list<int> weights) {
    Config config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = uint8_t(rows);
    for (const int t : weights) config.rows[t] = STEP / 2;
    return config;
}

inline void configure(const Config& config) {
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC assumes that only its first 8 bytes are read
    _tile_loadconfig(&config);
}

typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));

// Split off the first 8 bits of the significands, as in bf16; x keeps the rest. Truncated, so never infinity.
inline Bits cut(Floats& x) {
    const Bits high = (Bits)x & 0xFFFF0000u;
    x -= (Floats)high;
    return high;
}

inline void store(Bits x, uint16_t* to) {
    const Narrow narrow = __builtin_convertvector(x >> 16, Narrow);
    std::memcpy(to, &narrow, sizeof narrow);
}

// Split elements into three parts, `apart` elements from one to the next. Infinity and NaN have one part.
inline void split(Floats x, uint16_t* to, int64_t apart) {
    const Bits finite = (Bits)(((Bits)x & 0x7F800000u) != 0x7F800000u);
    const Bits quiet = (Bits)(x != x) & 0x400000u;  // keeps NaN a NaN without its last bits
    const Bits high = cut(x) | quiet, middle = cut(x), low = cut(x);
    store(high, to);
    store(middle & finite, to + apart);
    store(low & finite, to + 2 * apart);
}

// A few tiles of weights, one or two tiles of rows. parts: of x, [steps, PARTS, rows, STEP] of each tile of rows.
struct Task {
    const uint16_t *weight, *parts;
    int64_t steps;
    int64_t apart;  // numbers from one part to the next
    bool fetch;     // whether the weights come from memory
};

// Each load is used as often as eight tile registers allow. GCC requires literal register numbers. With one tile of
// rows: sums 0 to 2, weights 3 to 5, parts of x 6 and 7; with two: sums 0 to 3, weights 4 and 5, parts of x 6 and 7.
#define LOAD_WEIGHTS(T, N)                                                                       \
    {                                                                                            \
        const uint16_t* const tile = task.weight + (N * task.steps + s) * TILE;                  \
        if (task.fetch)                                                                          \
            for (int l = 0; l < 16; ++l) __builtin_prefetch(tile + AHEAD * TILE + l * 32, 0, 2); \
        _tile_loadd(T, tile, 64);                                                                \
    }

constexpr int ALONE = 3, PAIRED = 2;  // tiles of weights at a time, with one and two of rows

template <int COUNT>
void multiply(const Task& task, float (*sums)[MOST * OUTPUTS]) {
    _tile_zero(0);
    if constexpr (COUNT > 1) _tile_zero(1);
    if constexpr (COUNT > 2) _tile_zero(2);
    for (int64_t s = 0; s < task.steps; ++s) {
        const uint16_t* const parts = task.parts + s * PARTS * task.apart;
        LOAD_WEIGHTS(3, 0)
        if constexpr (COUNT > 1) LOAD_WEIGHTS(4, 1)
        if constexpr (COUNT > 2) LOAD_WEIGHTS(5, 2)
#define MULTIPLY_PART(T, PART)                          \
    _tile_loadd(T, parts + PART * task.apart, 64);      \
    _tile_dpbf16ps(0, T, 3);                            \
    if constexpr (COUNT > 1) _tile_dpbf16ps(1, T, 4);   \
    if constexpr (COUNT > 2) _tile_dpbf16ps(2, T, 5);
        MULTIPLY_PART(6, 0)
        MULTIPLY_PART(7, 1)
        MULTIPLY_PART(6, 2)
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (COUNT > 1) _tile_stored(1, sums[1], 64);
    if constexpr (COUNT > 2) _tile_stored(2, sums[2], 64);
}

template <int COUNT>
void multiply_pair(const Task& task, float (*sums)[MOST * OUTPUTS]) {
    const int64_t other = task.steps * PARTS * task.apart;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (COUNT > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < task.steps; ++s) {
        const uint16_t* const parts = task.parts + s * PARTS * task.apart;
        LOAD_WEIGHTS(4, 0)
        if constexpr (COUNT > 1) LOAD_WEIGHTS(5, 1)
#define MULTIPLY_PARTS(PART)                               \
    _tile_loadd(6, parts + PART * task.apart, 64);         \
    _tile_loadd(7, parts + other + PART * task.apart, 64); \
    _tile_dpbf16ps(0, 6, 4);                               \
    _tile_dpbf16ps(1, 7, 4);                               \
    if constexpr (COUNT > 1) {                             \
        _tile_dpbf16ps(2, 6, 5);                           \
        _tile_dpbf16ps(3, 7, 5);                           \
    }
        MULTIPLY_PARTS(0)
        MULTIPLY_PARTS(1)
        MULTIPLY_PARTS(2)
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if constexpr (COUNT > 1) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

struct Output {
    float* y;
    const float *residual, *bias;
    int64_t outer;
};

// Write the sums of one row, [16].
inline void put_row(const float* sums, int64_t column, int64_t count, const Output& to) {
    for (int64_t c = 0; c < count; c += WIDTH) {
        const int64_t some = std::min<int64_t>(WIDTH, count - c);
        Floats found = load_floats(sums + c, some);
        if (to.bias) found += load_floats(to.bias + column + c, some);
        if (to.residual) found = load_floats(to.residual + column + c, some) + found;
        std::memcpy(to.y + column + c, &found, some * sizeof(float));
    }
}

// Write one tile of sums, [rows, 16]. Whole tiles are a case of their own, with vectors of constant size.
inline void put(const float* sums, int rows, int64_t column, const Output& to) {
    const int64_t count = std::min<int64_t>(OUTPUTS, to.outer - column);
    for (int r = 0; r < rows; ++r) {
        const int64_t row = r * to.outer;
        const Output there{to.y + row, to.residual ? to.residual + row : nullptr, to.bias, to.outer};
        if (count == OUTPUTS)
            put_row(sums + r * OUTPUTS, column, OUTPUTS, there);
        else
            put_row(sums + r * OUTPUTS, column, count, there);
    }
}

}  // namespace

extern "C" {

// Layers that are multiplied together.
struct Layers {
    const uint16_t* weight;
    const float* bias;
    int64_t outer, inner;
};

// Workspace of `product` in bytes, at an address that is a multiple of 64.
int64_t space_bytes(const Layers* what, int64_t rows) {
    const int64_t tiles = (rows + MOST - 1) / MOST, each = tiles ? (rows + tiles - 1) / tiles : 0;
    return PARTS * tiles * each * ((what->inner + STEP - 1) / STEP * STEP) * sizeof(uint16_t);
}

void product(const Layers* what, const float* x, int64_t rows, float* y, const float* residual, void* space,
             int32_t num_threads) {
    const uint16_t* const weight = what->weight;
    const float* const bias = what->bias;
    const int64_t outer = what->outer, inner = what->inner;
    uint16_t* const parts = static_cast<uint16_t*>(space);
    // Reading the weights takes as long as multiplying them with four rows.
    num_threads = threads_for(std::max<int64_t>(rows, 4) * inner * outer, num_threads);
    const int64_t steps = (inner + STEP - 1) / STEP, tiles = (outer + OUTPUTS - 1) / OUTPUTS;
    // Tiles of equal numbers of rows, so that none is nearly empty.
    const int64_t blocks = (rows + MOST - 1) / MOST, each = (rows + blocks - 1) / blocks;
    const int64_t apart = each * STEP;
    const Config alone = config_of(int(each), {3, 4, 5}), paired = config_of(int(each), {4, 5});
    const int64_t kept = std::max<int64_t>(1, KEPT_BYTES / (steps * TILE * 2) / 6) * 6;  // tiles, in whole panels

    const auto put_tiles = [&](const float (*sums)[MOST * OUTPUTS], int count, int64_t tile, int64_t block) {
        const int64_t row = block * each;
        const Output to{y + row * outer, residual ? residual + row * outer : nullptr, bias, outer};
        const int present = int(std::min(each, rows - row));
        for (int t = 0; t < count; ++t) put(sums[t], present, (tile + t) * OUTPUTS, to);
    };
    const auto of_block = [&](int64_t tile, int64_t last, int64_t block, bool fetch) {
        alignas(64) float sums[ALONE][MOST * OUTPUTS];
        const int count = int(std::min<int64_t>(ALONE, last - tile));
        const Task task{weight + tile * steps * TILE, parts + block * steps * PARTS * apart, steps, apart, fetch};
        count == 1 ? multiply<1>(task, sums) : count == 2 ? multiply<2>(task, sums) : multiply<3>(task, sums);
        put_tiles(sums, count, tile, block);
    };
    const auto of_pair = [&](int64_t tile, int64_t last, int64_t block, bool fetch) {
        alignas(64) float sums[2 * PAIRED][MOST * OUTPUTS];
        const int count = int(std::min<int64_t>(PAIRED, last - tile));
        const Task task{weight + tile * steps * TILE, parts + block * steps * PARTS * apart, steps, apart, fetch};
        count == 1 ? multiply_pair<1>(task, sums) : multiply_pair<2>(task, sums);
        for (int t = 0; t < count; ++t)
            for (int64_t second = 0; second < 2; ++second) put_tiles(sums + 2 * t + second, 1, tile + t, block + second);
    };

#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t group = 0; group < blocks * each * steps; ++group) {
            const int64_t row = group / steps, from = group % steps * STEP;
            const int64_t count = row < rows ? std::min<int64_t>(STEP, inner - from) : 0;
            uint16_t* const to = parts + (row / each * steps + group % steps) * PARTS * apart + row % each * STEP;
            float found[STEP] = {};
            if (count > 0) std::memcpy(found, x + row * inner + from, count * sizeof *found);
            for (int i = 0; i < STEP; i += WIDTH) split(load_floats(found + i), to + i, apart);
        }
        // The tiles of consecutive threads are adjacent.
#pragma omp for schedule(static, 1)
        for (int32_t share = 0; share < num_threads; ++share) {
            const int64_t end = tiles * (share + 1) / num_threads;
            for (int64_t first = tiles * share / num_threads; first < end; first += kept) {
                const int64_t last = std::min(first + kept, end);
                int64_t block = 0;
                if (blocks > 1) configure(paired);
                for (; block + 2 <= blocks; block += 2)
                    for (int64_t tile = first; tile < last; tile += PAIRED) of_pair(tile, last, block, block == 0);
                if (block == blocks) continue;
                configure(alone);
                for (int64_t tile = first; tile < last; tile += ALONE) of_block(tile, last, block, block == 0);
            }
        }
        _tile_release();
    }
}
}

#endif
