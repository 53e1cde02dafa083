// Tree decode on a CPU: attention of a step's rows over the pages that they see; every key is read once for all of
// them.
//
//     s[j] = scale log2(e) q . k[j];   m = max_j s[j];   out = sum_j 2^(s[j] - m) v[j] / sum_j 2^(s[j] - m)
//
// A work item is a tile of lanes on some pages, for each key-value head. A lane is one query head of one row; the lanes
// of an item share its keys. Vectors hold lanes: one element of a key times a vector of queries is added to a vector of
// scores, without any sum across the vector. So the bits of a lane depend neither on its place nor on the other lanes,
// and keys need no transposition. In items with few lanes such vectors would be mostly empty: there each lane is
// computed alone, with vectors along D, which gives other bits; invariant plans never do that.
//
// The only item of a row writes its result. Other items write partial results, which are merged in the order of the
// plan: the same plan gives the same bits, with any number of threads.
//
// Keys are addressed one by one, so pages may be anywhere. They are processed in blocks of BLOCK keys, so that scores,
// weights and running results stay in the L1 cache. While a block is multiplied, the next one is prefetched.
//
// Shapes: q, out [rows, heads, D]; k, v [pages, page_size, kv_heads, D]; lse [heads, rows]; all contiguous.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../native.h"

#if defined(__AVX512F__)
#define TILE 8  // keys (or numbers of a value) at a time: TILE x 2 vectors are summed up in registers
#else
#define TILE 4
#endif

namespace {

constexpr int MAX_LANES = 2 * WIDTH;
constexpr int BLOCK = 64;
constexpr int MAX_DIM = 256;
constexpr int LINE = 64;  // bytes of a cache line
constexpr float LN_2 = 0.693147180559945f;
constexpr float INF = std::numeric_limits<float>::infinity(), LOWEST = std::numeric_limits<float>::lowest();

struct Half { uint16_t bits; };      // IEEE 754
struct Brain { uint16_t bits; };     // bfloat16

inline float load(float x) { return x; }
inline float load(Brain x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline float load(Half x) {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return float(y);
}
inline void store(float x, float& y) { y = x; }
inline void store(float x, Brain& y) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float x, Half& y) {
    const _Float16 z = _Float16(x);
    std::memcpy(&y.bits, &z, 2);
}

}  // namespace

extern "C" {

// One task's rows on some of its pages. Lane l is row rows[row_first + l / group], query head l % group of each kv
// head.
struct Item {
    int32_t page_first, num_pages;
    int32_t row_first;
    int32_t lane_first, num_lanes;  // at most MAX_LANES of the task's
    int32_t limit;                  // row i of the task sees keys 0 .. limit + i of the item
    int32_t partial_first;          // the partial result of row i is partial_first + i; -1: the result itself
};

struct Plan {
    const Item* items;
    const int32_t *pages, *counts;             // of all items' lists: page numbers, tokens in each
    const int32_t* rows;                       // of all tasks
    const int32_t *merge_rows, *merge_ends, *merge_ids;  // rows with partials; where each one's ids end; the ids
    float *partials, *partial_lse;             // [partials, heads, D], [partials, heads] (in powers of two)
    int32_t num_items, num_merges;
    int32_t num_rows, heads, kv_heads, dim, page_size;
    int32_t num_threads;
    int32_t invariant;  // whether a lane's bits must not depend on the number of lanes of an item
};

int32_t max_lanes() { return MAX_LANES; }
}

namespace {

template <class T>
struct Call {
    const Plan& plan;
    const T *q, *k, *v;
    T* out;
    float* lse;  // or null
    float scale;
};

// The keys of an item, block by block.
template <class T>
class Keys {
  public:
    Keys(const Call<T>& call, const Item& item, int head)
        : plan_(call.plan), k_(call.k + head * call.plan.dim), v_(call.v + head * call.plan.dim),
          page_(item.page_first), last_(item.page_first + item.num_pages) {}

    // Addresses of the next keys and values; returns how many, 0 at the end.
    int next(const T** k, const T** v) {
        int found = 0;
        const int64_t token = int64_t(plan_.kv_heads) * plan_.dim;
        while (found < BLOCK && page_ < last_) {
            const int taken = std::min(BLOCK - found, plan_.counts[page_] - offset_);
            const int64_t first = (int64_t(plan_.pages[page_]) * plan_.page_size + offset_) * token;
            for (int i = 0; i < taken; ++i, ++found) {
                k[found] = k_ + first + i * token;
                v[found] = v_ + first + i * token;
            }
            offset_ += taken;
            if (offset_ >= plan_.counts[page_]) {
                ++page_;
                offset_ = 0;
            }
        }
        return found;
    }

  private:
    const Plan& plan_;
    const T *k_, *v_;
    int page_, last_, offset_ = 0;
};

inline void prefetch(const void* address, int bytes) {
    for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(static_cast<const char*>(address) + i);
}

alignas(VECTOR_BYTES) const float ZEROS[MAX_DIM] = {};

// Workspace of a thread. Vectors of lanes: [.., NV] of Floats.
struct alignas(VECTOR_BYTES) Space {
    Floats q[MAX_DIM * 2], out[MAX_DIM * 2], scores[BLOCK * 2];
    float k[BLOCK * MAX_DIM], v[BLOCK * MAX_DIM];  // of 16-bit types, converted
};

// fp32 addresses of a block: its own, or those of a converted copy.
inline const float* const* as_floats(const float* const* rows, int, int, float*, const float**) { return rows; }
template <class T>
const float* const* as_floats(const T* const* rows, int count, int dim, float* space, const float** found) {
    for (int j = 0; j < count; ++j) {
        float* row = space + j * dim;
        for (int d = 0; d < dim; ++d) row[d] = load(rows[j][d]);
        found[j] = row;
    }
    return found;
}

// scores[j] = sum_d k[j][d] q[d] for KEYS keys.
template <int NV, int KEYS>
inline void multiply_keys(const float* const* k, const Floats* q, int dim, Floats* scores) {
    Floats sum[KEYS][NV] = {};
    for (int d = 0; d < dim; ++d)
        for (int t = 0; t < KEYS; ++t)
            for (int n = 0; n < NV; ++n) sum[t][n] += k[t][d] * q[d * NV + n];
    for (int t = 0; t < KEYS; ++t)
        for (int n = 0; n < NV; ++n) scores[t * NV + n] = sum[t][n];
}

// out[d] = out[d] correction + sum_j v[j][d] weights[j] for DIMS numbers d of the values.
template <int NV, int DIMS>
inline void add_values(const float* const* v, int d, const Floats* weights, int count, const Floats* correction,
                       Floats* out) {
    Floats sum[DIMS][NV];
    for (int t = 0; t < DIMS; ++t)
        for (int n = 0; n < NV; ++n) sum[t][n] = out[(d + t) * NV + n] * correction[n];
    for (int j = 0; j < count; ++j)
        for (int t = 0; t < DIMS; ++t)
            for (int n = 0; n < NV; ++n) sum[t][n] += v[j][d + t] * weights[j * NV + n];
    for (int t = 0; t < DIMS; ++t)
        for (int n = 0; n < NV; ++n) out[(d + t) * NV + n] = sum[t][n];
}

// Index of a lane's query in [rows, heads].
template <class T>
inline int64_t place_of(const Call<T>& call, const Item& item, int head, int l) {
    const int group = call.plan.heads / call.plan.kv_heads, lane = item.lane_first + l;
    return int64_t(call.plan.rows[item.row_first + lane / group]) * call.plan.heads + head * group + lane % group;
}

// Write the result of a lane, or a partial one, from out[0], out[stride], .., not yet divided by the total.
template <class T>
void finish(const Call<T>& call, const Item& item, int head, int l, float high, float total, const float* out,
            int stride) {
    const Plan& plan = call.plan;
    const int dim = plan.dim, group = plan.heads / plan.kv_heads;
    const int lane = item.lane_first + l, row = lane / group, h = head * group + lane % group;
    const float inverse = total == 0 ? 0 : 1 / total;
    const float lse = total == 0 ? -INF : high + std::log2(total);
    if (item.partial_first < 0) {
        const int64_t target = plan.rows[item.row_first + row];
        T* const result = call.out + (target * plan.heads + h) * dim;
        for (int d = 0; d < dim; ++d) store(out[d * stride] * inverse, result[d]);
        if (call.lse) call.lse[int64_t(h) * plan.num_rows + target] = lse * LN_2;
    } else {
        const int64_t target = int64_t(item.partial_first + row) * plan.heads + h;
        for (int d = 0; d < dim; ++d) plan.partials[target * dim + d] = out[d * stride] * inverse;
        plan.partial_lse[target] = lse;
    }
}

template <class T, int NV>
void attend(const Call<T>& call, const Item& item, int head, Space& space) {
    const Plan& plan = call.plan;
    const int dim = plan.dim, group = plan.heads / plan.kv_heads, bytes = dim * int(sizeof(T));
    constexpr int LANES = NV * WIDTH;

    float* const q = reinterpret_cast<float*>(space.q);
    std::fill(q, q + dim * LANES, 0.0f);
    alignas(VECTOR_BYTES) int32_t last[LANES] = {};  // the last key that a lane sees
    int first_limit = std::numeric_limits<int>::max(), last_limit = std::numeric_limits<int>::min();
    for (int l = 0; l < item.num_lanes; ++l) {
        const T* const query = call.q + place_of(call, item, head, l) * dim;
        for (int d = 0; d < dim; ++d) q[d * LANES + l] = load(query[d]) * (call.scale * LOG2_E);
        last[l] = item.limit + (item.lane_first + l) / group;
        first_limit = std::min(first_limit, last[l]);
        last_limit = std::max(last_limit, last[l]);
    }
    std::fill(space.out, space.out + dim * NV, Floats{});
    Floats high[NV], total[NV], correction[NV];
    for (int n = 0; n < NV; ++n) high[n] = Floats{} + LOWEST, total[n] = Floats{};

    const T *k_rows[2][BLOCK], *v_rows[2][BLOCK];
    const float *k_found[BLOCK + TILE], *v_found[BLOCK];
    Keys<T> keys(call, item, head);
    int which = 0, before = 0, count = keys.next(k_rows[0], v_rows[0]);
    while (count && before <= last_limit) {
        const float* const* k = as_floats(k_rows[which], count, dim, space.k, k_found);
        if (count % TILE) {  // zeros fill up the last tile; no lane sees them
            std::copy(k, k + count, k_found);
            for (int j = count; j % TILE; ++j) k_found[j] = ZEROS;
            k = k_found;
        }
        for (int j = 0; j < count; j += TILE) {
            for (int t = j; t < std::min(j + TILE, count); ++t) prefetch(v_rows[which][t], bytes);
            multiply_keys<NV, TILE>(k + j, space.q, dim, space.scores + j * NV);
        }
        if (before + count - 1 > first_limit)
            for (int j = 0; j < count; ++j)
                for (int n = 0; n < NV; ++n) {
                    const Ints sees = reinterpret_cast<const Ints*>(last)[n] >= before + j;
                    Floats& score = space.scores[j * NV + n];
                    score = sees ? score : Floats{} - INF;
                }
        for (int n = 0; n < NV; ++n) {
            Floats highest = high[n];
            for (int j = 0; j < count; ++j) {
                const Floats score = space.scores[j * NV + n];
                highest = score > highest ? score : highest;
            }
            correction[n] = exp2_of(high[n] - highest);
            high[n] = highest;
            Floats sum = total[n] * correction[n];
            for (int j = 0; j < count; ++j) {
                Floats& score = space.scores[j * NV + n];
                score = exp2_of(score - highest);
                sum += score;
            }
            total[n] = sum;
        }
        const int next = keys.next(k_rows[1 - which], v_rows[1 - which]);
        const float* const* v = as_floats(v_rows[which], count, dim, space.v, v_found);
        const int ahead = (next * TILE + dim - 1) / dim;  // keys to fetch with each tile
        int d = 0, fetched = 0;
        for (; d + TILE <= dim; d += TILE) {
            for (int i = 0; i < ahead && fetched < next; ++i) prefetch(k_rows[1 - which][fetched++], bytes);
            add_values<NV, TILE>(v, d, space.scores, count, correction, space.out);
        }
        for (; d < dim; ++d) add_values<NV, 1>(v, d, space.scores, count, correction, space.out);
        before += count;
        count = next;
        which = 1 - which;
    }

    const float* const out = reinterpret_cast<const float*>(space.out);
    alignas(VECTOR_BYTES) float highs[LANES], totals[LANES];
    std::memcpy(highs, high, sizeof high);
    std::memcpy(totals, total, sizeof total);
    for (int l = 0; l < item.num_lanes; ++l) finish(call, item, head, l, highs[l], totals[l], out + l, LANES);
}

// scores[l][j] = k[j] . q[l]
template <int LANES>
inline void multiply_key(const float* k, const float* q, int dim, int j, float (*scores)[BLOCK]) {
    Floats sum[LANES] = {};
    for (int d = 0; d < dim; d += WIDTH) {
        const Floats key = load_floats(k + d);
        for (int l = 0; l < LANES; ++l) sum[l] += key * load_floats(q + l * dim + d);
    }
    for (int l = 0; l < LANES; ++l) scores[l][j] = sum_of(sum[l]);
}

// out[l] = out[l] correction[l] + sum_j weights[l][j] v[j], for DIMS vectors of numbers from d on.
template <int LANES, int DIMS>
inline void add_value(const float* const* v, int d, const float (*weights)[BLOCK], int count, const float* correction,
                      float* out, int dim) {
    Floats sum[LANES][DIMS];
    for (int l = 0; l < LANES; ++l)
        for (int t = 0; t < DIMS; ++t) sum[l][t] = load_floats(out + l * dim + d + t * WIDTH) * correction[l];
    for (int j = 0; j < count; ++j)
        for (int t = 0; t < DIMS; ++t) {
            const Floats value = load_floats(v[j] + d + t * WIDTH);
            for (int l = 0; l < LANES; ++l) sum[l][t] += value * weights[l][j];
        }
    for (int l = 0; l < LANES; ++l)
        for (int t = 0; t < DIMS; ++t) std::memcpy(out + l * dim + d + t * WIDTH, &sum[l][t], VECTOR_BYTES);
}

// As `attend`, lane by lane; D is a multiple of WIDTH.
template <class T, int LANES>
void attend_apart(const Call<T>& call, const Item& item, int head, Space& space) {
    const Plan& plan = call.plan;
    const int dim = plan.dim, group = plan.heads / plan.kv_heads, bytes = dim * int(sizeof(T));
    float *const q = reinterpret_cast<float*>(space.q), *const out = reinterpret_cast<float*>(space.out);
    auto* const scores = reinterpret_cast<float(*)[BLOCK]>(space.scores);
    int last[LANES], last_limit = std::numeric_limits<int>::min();
    float high[LANES], total[LANES], correction[LANES];
    for (int l = 0; l < LANES; ++l) {
        const T* const query = call.q + place_of(call, item, head, l) * dim;
        for (int d = 0; d < dim; ++d) q[l * dim + d] = load(query[d]) * (call.scale * LOG2_E);
        last[l] = item.limit + (item.lane_first + l) / group;
        last_limit = std::max(last_limit, last[l]);
        high[l] = LOWEST, total[l] = 0;
    }
    std::fill(out, out + LANES * dim, 0.0f);

    const T *k_rows[2][BLOCK], *v_rows[2][BLOCK];
    const float *k_found[BLOCK], *v_found[BLOCK];
    Keys<T> keys(call, item, head);
    int which = 0, before = 0, count = keys.next(k_rows[0], v_rows[0]);
    while (count && before <= last_limit) {
        const float* const* k = as_floats(k_rows[which], count, dim, space.k, k_found);
        for (int j = 0; j < count; ++j) {
            prefetch(v_rows[which][j], bytes);
            multiply_key<LANES>(k[j], q, dim, j, scores);
        }
        for (int l = 0; l < LANES; ++l) {
            // Keys beyond the end are hidden like those that the lane does not see.
            const int seen = std::min(std::max(last[l] - before + 1, 0), count);
            std::fill(scores[l] + seen, scores[l] + BLOCK, -INF);
            Floats highest = Floats{} + high[l], sum{};
            for (int j = 0; j < BLOCK; j += WIDTH) {
                const Floats some = load_floats(scores[l] + j);
                highest = some > highest ? some : highest;
            }
            const float top = largest_of(highest);
            for (int j = 0; j < BLOCK; j += WIDTH) {
                const Floats weights = exp2_of(load_floats(scores[l] + j) - top);
                std::memcpy(scores[l] + j, &weights, VECTOR_BYTES);
                sum += weights;
            }
            correction[l] = exp2_of(Floats{} + (high[l] - top))[0];
            high[l] = top;
            total[l] = total[l] * correction[l] + sum_of(sum);
        }
        const int next = keys.next(k_rows[1 - which], v_rows[1 - which]);
        const float* const* v = as_floats(v_rows[which], count, dim, space.v, v_found);
        for (int j = 0; j < next; ++j) prefetch(k_rows[1 - which][j], bytes);
        int d = 0;
        constexpr int DIMS = LANES <= 4 ? 4 : 2;  // sums that fit into registers
        for (; d + DIMS * WIDTH <= dim; d += DIMS * WIDTH)
            add_value<LANES, DIMS>(v, d, scores, count, correction, out, dim);
        for (; d < dim; d += WIDTH) add_value<LANES, 1>(v, d, scores, count, correction, out, dim);
        before += count;
        count = next;
        which = 1 - which;
    }
    for (int l = 0; l < LANES; ++l) finish(call, item, head, l, high[l], total[l], out + l * dim, 1);
}

// Up to this many lanes are faster one by one than as vectors: measured with AVX-512 at D = 32, 64 and 128, and scaled
// to shorter vectors.
inline int most_apart(int dim) { return dim % WIDTH ? 0 : dim >= 4 * WIDTH ? WIDTH / 2 : WIDTH / 3; }

template <class T, int LANES = WIDTH / 2>
void attend_item(const Call<T>& call, const Item& item, int head, Space& space) {
    if constexpr (LANES > 0) {
        if (item.num_lanes < LANES) return attend_item<T, LANES - 1>(call, item, head, space);
        if (item.num_lanes == LANES && LANES <= most_apart(call.plan.dim) && !call.plan.invariant)
            return attend_apart<T, LANES>(call, item, head, space);
    }
    if (item.num_lanes <= WIDTH)
        attend<T, 1>(call, item, head, space);
    else
        attend<T, 2>(call, item, head, space);
}

// All heads of a row, from its partial results.
template <class T>
void merge(const Call<T>& call, int place) {
    const Plan& plan = call.plan;
    const int dim = plan.dim;
    const int32_t* first = plan.merge_ids + (place ? plan.merge_ends[place - 1] : 0);
    const int32_t* last = plan.merge_ids + plan.merge_ends[place];
    const int64_t row = plan.merge_rows[place];
    for (int h = 0; h < plan.heads; ++h) {
        float high = LOWEST, total = 0, out[MAX_DIM] = {};
        for (const int32_t* id = first; id < last; ++id) high = std::max(high, plan.partial_lse[int64_t(*id) * plan.heads + h]);
        for (const int32_t* id = first; id < last; ++id) {
            const int64_t partial = int64_t(*id) * plan.heads + h;
            const float weight = std::exp2(plan.partial_lse[partial] - high);
            total += weight;
            for (int d = 0; d < dim; ++d) out[d] += weight * plan.partials[partial * dim + d];
        }
        const float inverse = total == 0 ? 0 : 1 / total;
        for (int d = 0; d < dim; ++d) store(out[d] * inverse, call.out[(row * plan.heads + h) * dim + d]);
        if (call.lse) call.lse[int64_t(h) * plan.num_rows + row] = total == 0 ? -INF : (high + std::log2(total)) * LN_2;
    }
}

template <class T>
void run(const Call<T>& call) {
    const Plan& plan = call.plan;
    // A thread takes an item with all its heads, whose keys are adjacent, unless there are few items.
    const bool whole = plan.num_items >= 4 * plan.num_threads;
    const int heads_each = whole ? plan.kv_heads : 1, parts = plan.kv_heads / heads_each;
    int64_t products = 0;  // (lane, key) pairs: each takes about four multiplications per element
    for (int item = 0; item < plan.num_items; ++item) {
        products += int64_t(plan.items[item].num_pages) * plan.page_size * plan.items[item].num_lanes;
    }
    const int32_t num_threads = threads_for(4 * products * plan.kv_heads * plan.dim, plan.num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        Space space;
#pragma omp for schedule(dynamic, 1)
        for (int unit = 0; unit < plan.num_items * parts; ++unit) {
            const Item& item = plan.items[unit / parts];
            for (int head = unit % parts * heads_each, end = head + heads_each; head < end; ++head)
                attend_item(call, item, head, space);
        }
        if (plan.num_merges) {
#pragma omp for schedule(static)
            for (int place = 0; place < plan.num_merges; ++place) merge(call, place);
        }
    }
}

}  // namespace

// Write keys and values of new tokens to their slots, `bytes` for each head; negative slots are skipped. Strides in
// bytes.
extern "C" void append(const int64_t* slots, int64_t rows, int64_t heads, int64_t bytes, const char* k, int64_t k_row,
                       int64_t k_head, const char* v, int64_t v_row, int64_t v_head, char* k_cache, char* v_cache,
                       int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        if (slots[row] < 0) continue;
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t target = (slots[row] * heads + head) * bytes;
            std::memcpy(k_cache + target, k + row * k_row + head * k_head, bytes);
            std::memcpy(v_cache + target, v + row * v_row + head * v_head, bytes);
        }
    }
}

// Count one more token for each entry, in its last used page or the next one. own: where its pages begin in counts.
extern "C" void advance(int32_t* counts, const int32_t* own, int32_t* tokens, int32_t entries, int32_t page_size) {
    for (int32_t i = 0; i < entries; ++i) counts[own[i] + tokens[i]++ / page_size] += 1;
}

// element: 0 float32, 1 bfloat16, 2 float16.
extern "C" void tree_decode(const Plan* plan, int32_t element, const void* q, const void* k, const void* v, void* out,
                            float* lse, float scale) {
    const auto run_as = [&](auto type) {
        using T = decltype(type);
        run(Call<T>{*plan, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                    static_cast<T*>(out), lse, scale});
    };
    if (element == 0)
        run_as(float{});
    else if (element == 1)
        run_as(Brain{});
    else
        run_as(Half{});
}
