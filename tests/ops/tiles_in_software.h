// The instructions of AMX that `linear_amx.cpp` uses, in plain C++, for machines that have none: g++ includes this
// first. Whatever the processor would refuse ends the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define HAVE_TILES 1

namespace tiles {

struct State {
    struct alignas(64) {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    float numbers[8][16][16];
};
inline thread_local State state;

inline float wide(uint16_t narrow) {
    const uint32_t bits = uint32_t(narrow) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void require(bool holds) {
    if (!holds) std::abort();
}
inline void require_tile(int t) { require(state.config.palette == 1 && state.config.rows[t] && state.config.bytes[t]); }

inline bool allowed() { return true; }
inline void configure(const void* config) {
    std::memcpy(&state.config, config, sizeof state.config);
    require(state.config.palette == 1 && state.config.start == 0);
    for (const uint8_t zero : state.config.unused) require(zero == 0);
    for (int t = 0; t < 16; ++t) require(state.config.rows[t] <= (t < 8 ? 16 : 0) && state.config.bytes[t] <= (t < 8 ? 64 : 0));
    std::memset(state.numbers, 0xFF, sizeof state.numbers);  // NaN: nothing may be taken for loaded
}
inline void release() { state.config.palette = 0; }
inline void clear(int t) {
    require_tile(t);
    std::memset(state.numbers[t], 0, sizeof state.numbers[t]);
}
inline void load(int t, const void* from, int64_t stride) {
    clear(t);
    for (int r = 0; r < state.config.rows[t]; ++r)
        std::memcpy(state.numbers[t][r], static_cast<const char*>(from) + r * stride, state.config.bytes[t]);
}
inline void store(int t, void* to, int64_t stride) {
    require_tile(t);
    for (int r = 0; r < state.config.rows[t]; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, state.numbers[t][r], state.config.bytes[t]);
}
inline void multiply(int sum, int left, int right) {
    for (const int t : {sum, left, right}) require_tile(t);
    const auto& rows = state.config.rows;
    const auto& bytes = state.config.bytes;
    require(rows[sum] == rows[left] && bytes[sum] == bytes[right] && bytes[left] == 4 * rows[right]);
    for (int r = 0; r < state.config.rows[sum]; ++r)
        for (int pair = 0; pair < state.config.bytes[left] / 4; ++pair)
            for (int c = 0; c < state.config.bytes[sum] / 4; ++c) {
                uint16_t a[2], b[2];
                std::memcpy(a, &state.numbers[left][r][pair], 4);
                std::memcpy(b, &state.numbers[right][pair][c], 4);
                state.numbers[sum][r][c] += wide(a[0]) * wide(b[0]) + wide(a[1]) * wide(b[1]);
            }
}

}  // namespace tiles

#define _tile_loadconfig tiles::configure
#define _tile_release tiles::release
#define _tile_zero tiles::clear
#define _tile_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_dpbf16ps tiles::multiply
