// Shared by the CPU kernels: fp32 vectors of this processor's width.

#pragma once

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
constexpr float LOG2_E = 1.442695040888963f;

// Fewer multiplications run in the calling thread. A second thread gains at most 12 us there, but barriers cost 6 ms
// when other processes use the cores, because libgomp spins (a product of 2^17 weights with 1 to 8 rows).
constexpr int64_t SHARED_WORK = 1 << 20;

inline int32_t threads_for(int64_t multiplications, int32_t num_threads) {
    return multiplications >= SHARED_WORK ? num_threads : 1;
}

typedef float Floats __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES), may_alias));

// `count` elements, then zeros.
inline Floats load_floats(const float* from, int64_t count = WIDTH) {
    Floats x{};
    std::memcpy(&x, from, count * sizeof *from);
    return x;
}

// Four by four: element by element takes as long as a hundred products.
inline float sum_of(Floats x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[VECTOR_BYTES / 16], sum{};
    std::memcpy(parts, &x, VECTOR_BYTES);
    for (const Four& part : parts) sum += part;
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline float largest_of(Floats x) {
    float largest = x[0];
    for (int i = 1; i < WIDTH; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// 2^x for x <= 0: Taylor's series on [-1/2, 1/2] (relative error 1e-8), times a power of two; 0 below 2^-126.
inline Floats exp2_of(Floats x) {
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Floats clamped = x < -126.0f ? Floats{} - 126.0f : x;
    const Floats shifted = clamped + magic;
    const Floats f = clamped - (shifted - magic);
    Floats p = Floats{} + 1.525273380405984e-5f;
    p = p * f + 1.540353039338161e-4f;
    p = p * f + 1.333355814642844e-3f;
    p = p * f + 9.618129107628477e-3f;
    p = p * f + 5.550410866482158e-2f;
    p = p * f + 2.402265069591007e-1f;
    p = p * f + 6.931471805599453e-1f;
    p = p * f + 1.0f;
    const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
    return x < -126.0f ? Floats{} : p * (Floats)exponent;
}

}  // namespace
