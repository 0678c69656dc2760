// Attention of one tile on CPUs, forward and backward: in bfloat16 with AMX or AVX512-BF16, or, with SINGLE, in fp32 with AVX-512; sums in fp32.
//
// Everything is made of one product, of blocks of 32 x 32. A block lies in one of three ways:
//   plain   [32 rows][32 columns]: a left factor.
//   paired  [2 halves][16 pairs of rows][16 columns][2] in bf16: a right factor. Row 2i and 2i + 1 of a column lie side by side in a lane.
//           In fp32, [2 halves][32 rows][16 columns].
//   sums    [2 halves][32 rows][16 columns] fp32: what products add up to.
// Forward keeps, of each row of scores, a unit (in base 2) and the sum of 2^(y - unit), online (Milakov & Gimelshein 2018,
// Dao et al. 2022). Any unit does: it is the largest y of the first keys that a row sees, until weights in that unit add up to TOO_MUCH.
// Backward works on transposed scores, keys down and queries across, so that lse and delta are vectors along a row:
//   P' = 2^(y' - lse)   dV += P' dO   dS' = P' (V dO' - delta)   dK += dS' Q   (dQ)' += K' dS'
// Letters: b batch, s queries, n keys, h query heads, g key heads, d key width, e value width; widths are multiples of 32.

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

constexpr int EDGE = 32, BLOCK = EDGE * EDGE;   // of a block, in numbers
constexpr int WIDEST = 256 / EDGE;              // blocks across the widest head
constexpr int KEYS = 8, QUERIES = 4;            // blocks of keys that forward takes at once, at most; of queries that share them
constexpr int SQUARE = 4;                       // blocks along the edge of what backward takes at once
constexpr float LOG2E = 1.4426950408889634f, UNSEEN = -1e30f, TOO_MUCH = 1e12f;
#define INLINE __attribute__((always_inline)) inline

// -- numbers -------------------------------------------------------------------------------------------------------------------
// times: to the sums of lanes, the products of all numbers in them. pair: two rows of 32 as one of a paired block; in fp32 the first.
// put_lanes: of each lane its low number. put: 32 sums, rounded.
static const __m512i LANES = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#ifdef SINGLE
using Number = float;
constexpr float EXP2[] = {2.1702255e-4f, 1.2439687e-3f, 9.678841e-3f, 5.548334e-2f, 2.4022983e-1f, 6.93147e-1f, 1.0f};
static INLINE __m512 times(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
static INLINE void pair(Number *to, const Number *a, const Number *) {
    _mm512_store_ps(to, _mm512_loadu_ps(a)), _mm512_store_ps(to + 512, _mm512_loadu_ps(a + 16));
}
static INLINE void put_lanes(Number *to, __m512i x) { _mm512_storeu_si512(to, x); }
static INLINE void put(Number *to, __m512 low, __m512 high) { _mm512_store_ps(to, low), _mm512_store_ps(to + 16, high); }
#else
using Number = uint16_t;
constexpr float EXP2[] = {1.353417e-2f, 5.201146e-2f, 2.4144276e-1f, 6.9300383e-1f, 1.00000259f};
static INLINE __m512 times(__m512 a, __m512 b, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
static INLINE void pair(Number *to, const Number *a, const Number *b) {  // lane i: number i of a and of b
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b), i = _mm512_mullo_epi32(LANES, _mm512_set1_epi32(0x10001));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(x, _mm512_add_epi32(i, _mm512_set1_epi32(0x200000)), y));
    _mm512_store_si512(to + 512, _mm512_permutex2var_epi16(x, _mm512_add_epi32(i, _mm512_set1_epi32(0x300010)), y));
}
static INLINE void put_lanes(Number *to, __m512i x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x)); }
static INLINE void put(Number *to, __m512 low, __m512 high) { _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
#endif
constexpr int IN_LANE = 4 / sizeof(Number), IN_VECTOR = 16 * IN_LANE;

// Numbers, of no value at first, that begin at a multiple of 64 bytes.
template <typename T> struct Numbers {
    size_t size; T *at;
    explicit Numbers(int64_t count) : size(count), at((T *)std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)) {}
    Numbers(const Numbers &) = delete;
    ~Numbers() { std::free(at); }
    void zero() { std::memset(at, 0, size * sizeof(T)); }
};

// A tensor (b s h d) as it lies in memory, in numbers, or nowhere; its last dim is contiguous.
template <typename T> struct View {
    const T *at; int64_t b, s, h;
    View(const T *at, const int64_t *strides) : at(at), b(strides[0]), s(strides[1]), h(strides[2]) {}
    const T *row(int64_t i, int64_t j, int64_t k) const { return at ? at + i * b + j * s + k * h : nullptr; }
};
using Tensor = View<Number>;

// What a block of queries sees of one of keys. UP_TO + n, FROM + n: row r the keys up to r + n, or those from r + n on.
enum : uint8_t { NONE, ALL, UP_TO = 64, FROM = 192 };
static INLINE uint32_t lanes_of(uint8_t seen, int r) {  // of the keys that its row r sees
    const int n = std::clamp(seen == ALL ? EDGE : seen < 128 ? seen - UP_TO + r + 1 : seen - FROM + r, 0, EDGE);
    return (uint32_t)((1ull << n) - 1) ^ (seen < 128 ? 0u : ~0u);
}
static int64_t blocks_of(int64_t rows) { return (rows + EDGE - 1) / EDGE; }

struct Shape {
    int64_t b, s, n, h, g, d, e;
    bool causal;
    const uint8_t *grid;  // of each block of queries, what it sees of each block of keys; nowhere if that is all, or causal
    float scale;
    View<float> bias;  // what is added to logits, (b s h n); -inf hides a key
    int keys_at_once() const { return d + e > 128 ? KEYS : KEYS / 2; }  // measured: wider heads want longer sums, narrow ones the first cache
    int64_t band() const { return 1024 * IN_LANE / (d + e) * SQUARE; }  // blocks of queries that stay in the second cache while all keys pass
    uint8_t seen(int64_t query, int64_t key) const {
        return grid ? grid[query * blocks_of(n) + key] : !causal || key < query ? ALL : key == query ? UP_TO : NONE;
    }
    // Whether the grid shows nothing of some keys to a square of queries. Behind it lies, of each square, whether anything is seen.
    bool blank(int64_t query, int64_t key, int keys) const {
        const int64_t across = blocks_of(n), squares = (across + SQUARE - 1) / SQUARE, end = std::min((key + keys) / SQUARE, squares);
        const uint8_t *row = grid + blocks_of(s) * across + query / SQUARE * squares;
        return grid && std::all_of(row + key / SQUARE, row + end, [](uint8_t seen) { return seen == NONE; });
    }
};

// -- tiles ------------------------------------------------------------------------------------------------------------------
#ifdef __AMX_BF16__
// Ask the kernel for AMX's registers; false where it has none. 0x1023, 18: ARCH_REQ_XCOMP_PERM, XTILEDATA.
extern "C" int ringctx_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Eight registers of 16 rows of 64 bytes, for as long as this lives; each thread has its own.
struct Registers {
    Registers() {
        struct alignas(64) { uint8_t palette = 1, start = 0, none[14] = {0}; uint16_t bytes[16] = {0}; uint8_t rows[16] = {0}; } wanted;
        for (int n = 0; n < 8; n++) wanted.bytes[n] = 64, wanted.rows[n] = 16;
        _tile_loadconfig(&wanted);
    }
    ~Registers() { _tile_release(); }
};

// sums (+)= the n products of plain blocks a, a + step_a, ... with paired blocks b, b + step_b, ...
// meanwhile: what AVX-512 does after each product of registers, four times n. In turns as close as these both units work at once.
static INLINE void multiply(float *sums, const Number *a, int step_a, const Number *b, int step_b, int n, bool add, auto &&meanwhile) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (add) { _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 512, 64); _tile_loadd(2, sums + 256, 64); _tile_loadd(3, sums + 768, 64); }
    for (int i = 0; i < n; i++, a += step_a, b += step_b) {
        _tile_loadd(4, a, 64); _tile_loadd(6, b, 64); _tile_dpbf16ps(0, 4, 6); meanwhile();
        _tile_loadd(7, b + 512, 64); _tile_dpbf16ps(1, 4, 7); meanwhile();
        _tile_loadd(5, a + 512, 64); _tile_dpbf16ps(2, 5, 6); meanwhile();
        _tile_dpbf16ps(3, 5, 7); meanwhile();
    }
    _tile_stored(0, sums, 64); _tile_stored(1, sums + 512, 64); _tile_stored(2, sums + 256, 64); _tile_stored(3, sums + 768, 64);
}
#else
extern "C" int ringctx_permitted() { return true; }
struct Registers { Registers() {} };

// The same in AVX-512's registers, which hold the sums of 8 rows at a time: each half of a row in one.
static INLINE void multiply(float *sums, const Number *a, int step_a, const Number *b, int step_b, int n, bool add, auto &&meanwhile) {
    for (float *at = sums; at < sums + 512; at += 8 * 16, a += 8 * EDGE) {
        __m512 x[2][8] = {};
        for (int i = 0; i < n; i++)
            for (int c = 0; c < EDGE; c += IN_LANE) {
                const Number *left = a + i * step_a + c, *right = b + i * step_b + c * 16;
                const __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 512);
                for (int r = 0; r < 8; r++) {
                    const __m512 lane = _mm512_set1_ps(*(const float *)(left + r * EDGE));
                    x[0][r] = times(lane, low, x[0][r]), x[1][r] = times(lane, high, x[1][r]);
                }
            }
        for (int r = 0; add && r < 16; r++) x[r / 8][r % 8] += _mm512_load_ps(at + r / 8 * 512 + r % 8 * 16);  // last: short sums err less
        for (int r = 0; r < 16; r++) _mm512_store_ps(at + r / 8 * 512 + r % 8 * 16, x[r / 8][r % 8]);
    }
    for (int i = 0; i < 4 * n; i++) meanwhile();
}
#endif
static const auto nothing = [] {};

// -- blocks from rows -----------------------------------------------------------------------------------------------------------
// Up to 32 rows of 32 columns, `stride` apart, as a plain block; missing rows are 0.
static void plain(Number *block, const Number *from, int64_t stride, int rows) {
    for (int i = 0; i < BLOCK; i += IN_VECTOR)
        _mm512_storeu_si512(block + i, i / EDGE < rows ? _mm512_loadu_si512(from + i / EDGE * stride + i % EDGE) : _mm512_setzero_si512());
}

// The same as a paired block.
static void paired(Number *block, const Number *from, int64_t stride, int rows) {
    alignas(64) static const Number none[EDGE] = {0};
    const auto row = [&](int r) { return r < rows ? from + r * stride : none; };
    for (int r = 0; r < EDGE; r += IN_LANE) pair(block + r * 16, row(r), row(r + 1));
}

// 16 vectors of 16 numbers as the rows of a square -> its columns: the squares beside the diagonal change places, of edge 1, 2, 4 and 8.
static INLINE void transpose(__m512 *x) {
#pragma GCC unroll 4
    for (int edge = 1; edge < 16; edge *= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(LANES, _mm512_set1_epi32(edge));
        const __m512i upper = _mm512_mask_add_epi32(LANES, odd, LANES, _mm512_set1_epi32(16 - edge));
        const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(edge));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m512 a = x[i], b = x[i ^ edge];
            if (!(i & edge)) x[i] = _mm512_permutex2var_ps(a, upper, b), x[i + edge] = _mm512_permutex2var_ps(a, lower, b);
        }
    }
}

// Up to 32 rows of 32 columns, transposed. take: what becomes of a half of rows, given the first column in a vector's lanes and the vector.
static INLINE void transposed(const Number *from, int64_t stride, int rows, auto take) {
    for (int half = 0; half < 2; half++)
        for (int c = 0; c < EDGE; c += IN_VECTOR) {
            __m512 x[16];
            for (int r = 0; r < 16; r++) x[r] = half * 16 + r < rows ? _mm512_loadu_ps(from + (half * 16 + r) * stride + c) : _mm512_setzero_ps();
            transpose(x);
            for (int i = 0; i < 16; i++) take(half, c + i * IN_LANE, x[i]);
        }
}

// The same as a paired block: columns become rows, two of which lie in a lane already in bf16.
static void paired_transpose(Number *block, const Number *from, int64_t stride, int rows) {
    transposed(from, stride, rows, [&](int half, int c, __m512 x) { _mm512_storeu_ps(block + half * 512 + c * 16, x); });
}

// The same as a plain block.
static void plain_transpose(Number *block, const Number *from, int64_t stride, int rows) {
    transposed(from, stride, rows, [&](int half, int c, __m512 x) {
        for (int i = 0; i < IN_LANE; i++) put_lanes(block + (c + i) * EDGE + half * 16, _mm512_srli_epi32((__m512i)x, 16 * i));
    });
}

// Rows of one head (s d), blocks `first` to `last` of them, as blocks [block of rows][block of columns], by one of the above.
static void pack(auto as, Number *blocks, const Tensor &x, int64_t b, int64_t h, int64_t s, int64_t d, int64_t first, int64_t last) {
    for (int64_t r = first * EDGE; r < std::min(last * EDGE, s); r += EDGE)
        for (int64_t c = 0; c < d; c += EDGE, blocks += BLOCK) as(blocks, x.row(b, r, h) + c, x.s, (int)std::min<int64_t>(EDGE, s - r));
}

// -- vectors of 16 ----------------------------------------------------------------------------------------------------------------
// 2^y to 3e-6 in bf16 and 1e-8 in fp32, by the polynomial whose largest relative error between two whole numbers is least; 0 far below.
static INLINE __m512 exp2_of(__m512 y) {
    const __m512 x = _mm512_reduce_ps(y, 9);
    __m512 p = _mm512_set1_ps(EXP2[0]);
    for (size_t i = 1; i < std::size(EXP2); i++) p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(EXP2[i]));
    return _mm512_scalef_ps(p, y);
}

// Sum of the products of two rows, of a multiple of 32 numbers.
static float dot(const Number *a, const Number *b, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += IN_VECTOR) sum = times(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// Logits in base 2 with what is added to them; what is hidden is far below all others, but finite.
static INLINE __m512 biased(__m512 y, __m512 bias) { return _mm512_max_ps(bias * LOG2E + y, _mm512_set1_ps(UNSEEN)); }

// Runs of 0 to count - 1: a place goes with the one before it where it `joins`. body: what to do with a run's first place and length.
static INLINE void runs(int count, auto joins, auto body) {
    for (int first = 0, next = 1; first < count; next++)
        if (next == count || !joins(next)) body(first, next - first), first = next;
}

// -- forward ------------------------------------------------------------------------------------------------------------------------
// 32 rows of queries under way.
struct Rows {
    alignas(64) Number q[WIDEST * BLOCK];
    alignas(64) float out[WIDEST * BLOCK];
    alignas(64) float sum[EDGE * 16];  // of each row, lane by lane
    float unit[EDGE], shrink[EDGE];
    bool shrinks;
    void begin(const Tensor &x, int64_t b, int64_t first, int64_t h, const Shape &of) {
        for (int64_t c = 0; c < of.d; c += EDGE) plain(q + c * EDGE, x.row(b, first, h) + c, x.s, (int)std::min<int64_t>(EDGE, of.s - first));
        std::memset(out, 0, of.e * EDGE * sizeof(float)), std::memset(sum, 0, sizeof sum);
        std::fill(unit, unit + EDGE, UNSEEN), std::fill(shrink, shrink + EDGE, 1.0f), shrinks = false;
    }
};

// Blocks of keys that one block of queries sees, out of some neighbours. lanes: of each, the keys there are.
struct Met {
    int count = 0;
    bool whole = true;  // no key of them is hidden
    int64_t block[KEYS];
    uint32_t lanes[KEYS], seen[KEYS];
    Met() {}
    Met(const Shape &of, int64_t query, int64_t first) {
        for (int64_t key = first; key < std::min(first + of.keys_at_once(), blocks_of(of.n)); key++) {
            const int64_t rest = of.n - key * EDGE;
            if (!(seen[count] = of.seen(query, key))) continue;
            whole = whole && seen[count] == ALL && rest >= EDGE;
            block[count] = key, lanes[count++] = rest < EDGE ? (1u << rest) - 1 : ~0u;
        }
    }
};

// Row r of scores [block][half][row][16], in base 2: logits, with their bias, from a vector on. What is hidden is far below all others.
// first: of the rows' bias, `step` apart and `last` the last, or nowhere. PLAIN: there is none, and the scale is positive. WHOLE: no key is hidden.
template <bool PLAIN, bool WHOLE> struct Row {
    const float *scores, *first;
    int64_t step, last;
    const Met &met;
    __m512 scale;
    int r = 0;
    __m512 score(int i) const {
        const __m512 found = _mm512_load_ps(scores + i * 512 + r * 16);
        if (PLAIN && WHOLE) return found;
        const __mmask16 here = (__mmask16)((met.lanes[i / 2] & lanes_of(met.seen[i / 2], r)) >> i % 2 * 16);
        if (PLAIN) return _mm512_mask_mov_ps(_mm512_set1_ps(UNSEEN) / scale, here, found);
        const __m512 y = _mm512_mask_mul_ps(_mm512_set1_ps(UNSEEN), here, found, scale);
        return first ? biased(y, _mm512_maskz_loadu_ps(here, first + std::min<int64_t>(r, last) * step + met.block[i / 2] * EDGE + i % 2 * 16)) : y;
    }
    __m512 above(int i, __m512 unit) const { return PLAIN ? _mm512_fmsub_ps(score(i), scale, unit) : _mm512_sub_ps(score(i), unit); }
};

// Take a row's largest logit as the unit of its sums, if it is above the one so far.
static __attribute__((noinline)) void grow(Rows &rows, const auto &row) {
    float now = UNSEEN;
    for (int i = 0; i < 2 * row.met.count; i++) now = std::max(now, _mm512_reduce_max_ps(row.above(i, _mm512_setzero_ps())));
    if (!(now > rows.unit[row.r])) return;
    const float shrink = std::exp2(rows.unit[row.r] - now);
    rows.unit[row.r] = now, rows.shrink[row.r] *= shrink, rows.shrinks = true;
    for (int lane = 0; lane < 16; lane++) rows.sum[row.r * 16 + lane] *= shrink;
}

// The weights of a meeting's rows, as plain blocks, 32 numbers at a time; their sums are added to the rows'. Before a row has seen a key, they
// are any, and the first one takes them to 0. A turn is as much as has to be done by then, if all is to be done after so many turns.
template <typename Row> struct Weighing {
    Rows &rows;
    Row row;
    Number *weights;
    int turns, due = 0, block = 0;
    __m512 unit = _mm512_setzero_ps(), sum = unit;
    INLINE void operator()() { for (due += EDGE * row.met.count; due >= turns; due -= turns) one(); }
    void rest() { while (row.r < EDGE) one(); }
    INLINE void one() {
        if (row.r == EDGE) return;
        if (!block) begin(rows.unit[row.r] < UNSEEN / 2);
        weigh();
        if (block < row.met.count) return;
        if (__builtin_expect(_mm512_cmp_ps_mask(sum, _mm512_set1_ps(TOO_MUCH), _CMP_GT_OQ), 0))
            for (begin(true); block < row.met.count;) weigh();
        float *whole = rows.sum + row.r++ * 16;
        _mm512_store_ps(whole, _mm512_add_ps(_mm512_load_ps(whole), sum)), block = 0;
    }
    INLINE void begin(bool anew) {
        if (__builtin_expect(anew, 0)) grow(rows, row);
        unit = _mm512_set1_ps(rows.unit[row.r]), sum = _mm512_setzero_ps(), block = 0;
    }
    INLINE void weigh() {
        const __m512 low = exp2_of(row.above(2 * block, unit)), high = exp2_of(row.above(2 * block + 1, unit));
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        put(weights + block++ * BLOCK + row.r * EDGE, low, high);
    }
};

// What was added up so far, in the new unit of its row.
static void shrink(Rows &rows, int64_t e) {
    for (int r = 0; r < EDGE; r++) {
        for (float *part = rows.out + r * 16; rows.shrink[r] != 1.0f && part < rows.out + e * EDGE; part += 512)
            _mm512_store_ps(part, _mm512_mul_ps(_mm512_load_ps(part), _mm512_set1_ps(rows.shrink[r])));
        rows.shrink[r] = 1.0f;
    }
    rows.shrinks = false;
}

// One block of queries and neighbouring keys that it meets. at: which of two places its scores and weights have.
struct Meeting { int64_t query; Met met; int at; };

// The meetings of query blocks `first` to `last`, some keys for all of them before the next keys.
struct Meetings {
    const Shape &of;
    const int64_t first, last, end;
    int64_t query = first, key = 0;
    int at = 0;
    bool next(Meeting &found) {
        for (; key < end; key += of.keys_at_once(), query = first)
            for (; query < last && !of.blank(first, key, of.keys_at_once()); query++) {
                found = {query, Met(of, query, key), at};
                if (!found.met.count) continue;
                query++, at = 1 - at;
                return true;
            }
        return false;
    }
};

struct Forward { alignas(64) float scores[2][KEYS * BLOCK]; alignas(64) Number weights[2][KEYS * BLOCK]; Rows rows[QUERIES]; };

// Query blocks `first` to `last` of one head: k paired by columns, v paired by rows, as `pack` leaves them.
// While one meeting is weighed, the one before is multiplied with its values and the next one with its keys.
static void attend(Forward &at, const Shape &of, const Tensor &q, const Number *k, const Number *v, int64_t b, int64_t h, int64_t first,
                   int64_t last) {
    const int wide = of.d / EDGE, tall = of.e / EDGE;
    for (int64_t u = first; u < last; u++) at.rows[u - first].begin(q, b, u * EDGE, h, of);
    Meetings meetings{of, first, last, of.causal && !of.grid ? std::min(blocks_of(of.n), last) : blocks_of(of.n)};
    const auto score = [&](const Meeting &x, int i, auto &meanwhile) {
        multiply(at.scores[x.at] + i * BLOCK, at.rows[x.query - first].q, BLOCK, k + x.met.block[i] * wide * BLOCK, BLOCK, wide, false, meanwhile);
    };
    const auto collect = [&](const Meeting &x, int c, auto &meanwhile) {
        runs(x.met.count, [&](int i) { return x.met.block[i] == x.met.block[i - 1] + 1; }, [&](int i, int count) {
            multiply(at.rows[x.query - first].out + c * BLOCK, at.weights[x.at] + i * BLOCK, BLOCK, v + (x.met.block[i] * tall + c) * BLOCK,
                     tall * BLOCK, count, true, meanwhile);
        });
    };
    const __m512 scale = _mm512_set1_ps(of.scale * LOG2E);
    Meeting before, now, next;
    bool is_next = meetings.next(now);
    for (int i = 0; is_next && i < now.met.count; i++) score(now, i, nothing);
    while (now.met.count) {
        if (!(is_next = meetings.next(next))) next.met.count = 0;
        Rows &rows = at.rows[now.query - first];
        const auto weigh = [&](auto row) {
            Weighing<decltype(row)> weighing{rows, row, at.weights[now.at], std::max(4 * (tall * before.met.count + wide * next.met.count), 1)};
            for (int c = 0; before.met.count && c < tall; c++) collect(before, c, weighing);
            for (int i = 0; i < next.met.count; i++) score(next, i, weighing);
            weighing.rest();
        };
        const float *bias = of.bias.row(b, now.query * EDGE, h);
        if (bias || of.scale <= 0) weigh(Row<false, false>{at.scores[now.at], bias, of.bias.s, of.s - 1 - now.query * EDGE, now.met, scale});
        else if (now.met.whole) weigh(Row<true, true>{at.scores[now.at], bias, 0, 0, now.met, scale});
        else weigh(Row<true, false>{at.scores[now.at], bias, 0, 0, now.met, scale});
        if (rows.shrinks) shrink(rows, of.e);
        before = now, now = next;
    }
    for (int c = 0; before.met.count && c < tall; c++) collect(before, c, nothing);
}

// out (b s h e) and lse (b s h) of these rows, both contiguous.
static void finish(const Rows &rows, const Shape &of, int64_t b, int64_t h, int64_t u, float *out, float *lse) {
    for (int64_t r = 0; r < std::min<int64_t>(EDGE, of.s - u * EDGE); r++) {
        const int64_t row = (b * of.s + u * EDGE + r) * of.h + h;
        const bool blind = rows.unit[r] < UNSEEN / 2;
        const float sum = _mm512_reduce_add_ps(_mm512_load_ps(rows.sum + r * 16)), share = blind ? 0.0f : 1.0f / sum;
        for (int64_t c = 0; c < of.e; c += 16) _mm512_storeu_ps(out + row * of.e + c, _mm512_load_ps(rows.out + c / 16 * 512 + r * 16) * share);
        lse[row] = blind ? -INFINITY : (rows.unit[r] + std::log2(sum)) / LOG2E;
    }
}

// -- backward -----------------------------------------------------------------------------------------------------------------------
// A band of queries of one head, packed: q and dout as right factors both ways, lse in base 2 and delta along the columns of transposed
// scores; and one head of keys, a square's when it is first seen. dq: sums, transposed, [block of queries][block of columns].
struct Packed {
    Numbers<Number> q_by_columns, q_by_rows, dout_by_columns, dout_by_rows, k, k_transposed, v;
    Numbers<float> lse, delta, dq, dk, dv;
    Numbers<uint8_t> begun;  // of each square of keys
    Packed(int64_t rows, int64_t keys, int64_t d, int64_t e)
        : q_by_columns(rows * d), q_by_rows(rows * d), dout_by_columns(rows * e), dout_by_rows(rows * e), k(keys * d), k_transposed(keys * d),
          v(keys * e), lse(rows), delta(rows), dq(rows * d), dk(keys * d), dv(keys * e), begun(keys / EDGE) {}
};

struct Backward {
    alignas(64) float scores[BLOCK], slopes[BLOCK], bias[BLOCK];
    alignas(64) Number weights[SQUARE * SQUARE * BLOCK], plain_ds[SQUARE * SQUARE * BLOCK], paired_ds[SQUARE * SQUARE * BLOCK];
};

// Transposed scores and slopes of 32 keys by 32 queries -> P' and dS' / scale as left factors, the latter as a right one too.
// seen: by the queries. u, to: their block in x, and where the results go. bias: its transpose, [32 keys][32 queries], or nowhere.
static void differentiate(Backward &at, const Packed &x, uint8_t seen, int64_t u, int to, float scale, const float *bias) {
    const __m512 scales = _mm512_set1_ps(scale * LOG2E);
    for (int r = 0; r < EDGE; r++) {
        const uint32_t lanes = seen == ALL ? ~0u : lanes_of(256 - seen, r);  // queries that see key r
        __m512 p[2], ds[2];
        for (int half = 0; half < 2; half++) {
            const int from = half * 512 + r * 16, row = u * EDGE + half * 16;
            const __m512 y = _mm512_load_ps(at.scores + from) * scales, unit = _mm512_load_ps(x.lse.at + row);
            p[half] = exp2_of(bias ? biased(y, _mm512_load_ps(bias + r * EDGE + half * 16)) - unit : y - unit);
            p[half] = _mm512_maskz_mov_ps((__mmask16)(lanes >> half * 16), p[half]);
            ds[half] = p[half] * (_mm512_load_ps(at.slopes + from) - _mm512_load_ps(x.delta.at + row));
        }
        put(at.weights + to + r * EDGE, p[0], p[1]), put(at.plain_ds + to + r * EDGE, ds[0], ds[1]);
    }
    paired(at.paired_ds + to, at.plain_ds + to, EDGE, EDGE);
}

// What is added to the logits of a block, keys down; where there is no key or query, 0.
static const float *transposed_bias(Backward &at, const Shape &of, int64_t b, int64_t h, int64_t key, int64_t query) {
    if (!of.bias.at) return nullptr;
    std::memset(at.bias, 0, sizeof at.bias);
    for (int64_t c = 0; c < std::min<int64_t>(EDGE, of.s - query * EDGE); c++) {
        const float *row = of.bias.row(b, query * EDGE + c, h) + key * EDGE;
        for (int64_t r = 0; r < std::min<int64_t>(EDGE, of.n - key * EDGE); r++) at.bias[r * EDGE + c] = row[r];
    }
    return at.bias;
}

// Blocks of keys from `key`, of queries from `query`, SQUARE of each: their part of dq and of dk, dv. band: where the packed queries begin.
static void square(Backward &at, const Shape &of, Packed &x, int64_t b, int64_t h, int64_t key, int64_t query, int64_t band) {
    const int wide = of.d / EDGE, tall = of.e / EDGE;
    const int keys = (int)std::min<int64_t>(SQUARE, blocks_of(of.n) - key);
    const int queries = (int)std::min<int64_t>(SQUARE, blocks_of(of.s) - query);
    uint8_t seen[SQUARE][SQUARE];
    for (int i = 0; i < keys; i++)
        for (int j = 0; j < queries; j++) {
            const int64_t u = query - band + j;
            const int to = (i * SQUARE + j) * BLOCK;
            seen[i][j] = of.seen(query + j, key + i);
            if (!seen[i][j]) continue;
            multiply(at.scores, x.k.at + (key + i) * wide * BLOCK, BLOCK, x.q_by_columns.at + u * wide * BLOCK, BLOCK, wide, false, nothing);
            multiply(at.slopes, x.v.at + (key + i) * tall * BLOCK, BLOCK, x.dout_by_columns.at + u * tall * BLOCK, BLOCK, tall, false, nothing);
            differentiate(at, x, seen[i][j], u, to, of.scale, transposed_bias(at, of, b, h, key + i, query + j));
        }
    for (int i = 0; i < keys; i++)
        runs(queries, [&](int j) { return !seen[i][j] == !seen[i][j - 1]; }, [&](int j, int count) {
            if (!seen[i][j]) return;
            const int from = (i * SQUARE + j) * BLOCK;
            for (int c = 0; c < tall; c++)
                multiply(x.dv.at + ((key + i) * tall + c) * BLOCK, at.weights + from, BLOCK, x.dout_by_rows.at + ((query - band + j) * tall + c) * BLOCK,
                         tall * BLOCK, count, true, nothing);
            for (int c = 0; c < wide; c++)
                multiply(x.dk.at + ((key + i) * wide + c) * BLOCK, at.plain_ds + from, BLOCK, x.q_by_rows.at + ((query - band + j) * wide + c) * BLOCK,
                         wide * BLOCK, count, true, nothing);
        });
    for (int j = 0; j < queries; j++)
        runs(keys, [&](int i) { return !seen[i][j] == !seen[i - 1][j]; }, [&](int i, int count) {
            if (!seen[i][j]) return;
            for (int c = 0; c < wide; c++)
                multiply(x.dq.at + ((query - band + j) * wide + c) * BLOCK, x.k_transposed.at + ((key + i) * wide + c) * BLOCK, wide * BLOCK,
                         at.paired_ds + (i * SQUARE + j) * BLOCK, SQUARE * BLOCK, count, true, nothing);
        });
}

// Sums [block of rows][block of columns][half][row][16], times `scale` -> rows of a contiguous (b s h d).
static void unpack(float *to, int64_t stride, const float *sums, int64_t rows, int64_t width, float scale) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c += 16) {
            const float *block = sums + (r / EDGE * (width / EDGE) + c / EDGE) * BLOCK;
            _mm512_storeu_ps(to + r * stride + c, _mm512_load_ps(block + c % EDGE / 16 * 512 + r % EDGE * 16) * scale);
        }
}

// Transposed sums, likewise.
static void unpack_transposed(float *to, int64_t stride, const float *sums, int64_t rows, int64_t width, float scale) {
    for (int64_t part = 0; part < blocks_of(rows) * 2; part++)
        for (int64_t c = 0; c < width; c += 16) {
            const float *from = sums + (part / 2 * (width / EDGE) + c / EDGE) * BLOCK + part % 2 * 512 + c % EDGE * 16;
            __m512 x[16];
            for (int i = 0; i < 16; i++) x[i] = _mm512_load_ps(from + i * 16) * scale;
            transpose(x);
            for (int i = 0; i < 16 && part * 16 + i < rows; i++) _mm512_storeu_ps(to + (part * 16 + i) * stride + c, x[i]);
        }
}

// One key head of one sequence, which a thread takes at a time, and all query heads that share it.
static void differentiate_head(Backward &at, Packed &x, const Shape &of, const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &dout,
                               const Tensor &out, const float *lse, const float *dlse, float *dq, float *dk, float *dv, int64_t b, int64_t g) {
    const auto begin = [&](int64_t key) {
        const int64_t last = std::min(key + SQUARE, blocks_of(of.n)), at = key * EDGE, rows = (last - key) * EDGE;
        if (x.begun.at[key / SQUARE]) return;
        pack(plain, x.k.at + at * of.d, k, b, g, of.n, of.d, key, last);
        pack(plain_transpose, x.k_transposed.at + at * of.d, k, b, g, of.n, of.d, key, last);
        pack(plain, x.v.at + at * of.e, v, b, g, of.n, of.e, key, last);
        std::fill_n(x.dk.at + at * of.d, rows * of.d, 0.0f), std::fill_n(x.dv.at + at * of.e, rows * of.e, 0.0f), x.begun.at[key / SQUARE] = 1;
    };
    x.begun.zero();
    for (int64_t h = g * (of.h / of.g); h < (g + 1) * (of.h / of.g); h++)
        for (int64_t first = 0; first < blocks_of(of.s); first += of.band()) {
            const int64_t last = std::min(first + of.band(), blocks_of(of.s)), rows = std::min((last - first) * EDGE, of.s - first * EDGE);
            pack(paired_transpose, x.q_by_columns.at, q, b, h, of.s, of.d, first, last), x.dq.zero();
            pack(paired, x.q_by_rows.at, q, b, h, of.s, of.d, first, last), pack(paired, x.dout_by_rows.at, dout, b, h, of.s, of.e, first, last);
            pack(paired_transpose, x.dout_by_columns.at, dout, b, h, of.s, of.e, first, last);
            for (int64_t i = 0; i < (last - first) * EDGE; i++) {
                const int64_t s = first * EDGE + i, row = (b * of.s + s) * of.h + h;
                x.lse.at[i] = i < rows ? lse[row] * LOG2E : -UNSEEN;  // rows that are not there weigh 0
                x.delta.at[i] = i < rows ? dot(dout.row(b, s, h), out.row(b, s, h), of.e) - (dlse ? dlse[row] : 0.0f) : 0.0f;
            }
            for (int64_t key = 0; key < blocks_of(of.n); key += SQUARE)
                for (int64_t query = of.causal && !of.grid ? std::max(first, key) : first; query < last; query += SQUARE)
                    if (!of.blank(query, key, SQUARE)) begin(key), square(at, of, x, b, h, key, query, first);
            unpack_transposed(dq + ((b * of.s + first * EDGE) * of.h + h) * of.d, of.h * of.d, x.dq.at, rows, of.d, of.scale);
        }
    for (int64_t key = 0; key < blocks_of(of.n); key += SQUARE) begin(key);  // what nobody saw
    unpack(dk + (b * of.n * of.g + g) * of.d, of.g * of.d, x.dk.at, of.n, of.d, of.scale);
    unpack(dv + (b * of.n * of.g + g) * of.e, of.g * of.e, x.dv.at, of.n, of.e, 1.0f);
}

// -- what Python calls --------------------------------------------------------------------------------------------------------------
static Shape shape(const int64_t *n, float scale, const uint8_t *grid, View<float> bias) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0, grid, scale, bias};
}

// sizes: b s n h g d e causal. strides: of q, k, v, bias (b h s), three each; bias and grid (see Shape) may be null.
// out (b s h e) and lse (b s h), contiguous fp32.
extern "C" void ringctx_forward(const Number *q, const Number *k, const Number *v, const float *bias, const uint8_t *grid,
                                const int64_t *strides, const int64_t *sizes, float scale, int threads, float *out, float *lse) {
    const Shape of = shape(sizes, scale, grid, {bias, strides + 9});
    const Tensor q_(q, strides), k_(k, strides + 3), v_(v, strides + 6);
    const int64_t rows = blocks_of(of.n) * EDGE, runs = (blocks_of(of.s) + QUERIES - 1) / QUERIES;
    const int64_t share = of.h / of.g, some = std::min<int64_t>(threads, of.b * of.g);  // key heads at once, whose keys stay in the cache
    Numbers<Number> keys(some * rows * of.d), values(some * rows * of.e);
#pragma omp parallel num_threads(threads)
    {
        const Registers registers;
        const std::unique_ptr<Forward> at(new Forward);
        for (int64_t begin = 0, end = some; begin < of.b * of.g; begin = end, end = std::min(end + some, of.b * of.g)) {
#pragma omp for
            for (int64_t i = begin; i < end; i++) {
                pack(paired_transpose, keys.at + (i - begin) * rows * of.d, k_, i / of.g, i % of.g, of.n, of.d, 0, blocks_of(of.n));
                pack(paired, values.at + (i - begin) * rows * of.e, v_, i / of.g, i % of.g, of.n, of.e, 0, blocks_of(of.n));
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = begin * share * runs; i < end * share * runs; i++) {
                const int64_t b = i / runs / of.h, h = i / runs % of.h, head = i / runs / share - begin;
                const int64_t first = (runs - 1 - i % runs) * QUERIES, last = std::min(first + QUERIES, blocks_of(of.s));  // long rows first
                attend(*at, of, q_, keys.at + head * rows * of.d, values.at + head * rows * of.e, b, h, first, last);
                for (int64_t u = first; u < last; u++) finish(at->rows[u - first], of, b, h, u, out, lse);
            }
        }
    }
}

// strides: of q, k, v, bias, dout, out. lse, dlse (b s h) or null, dq (b s h d), dk (b n g d), dv (b n g e): contiguous fp32.
extern "C" void ringctx_backward(const Number *q, const Number *k, const Number *v, const float *bias, const uint8_t *grid, const Number *dout,
                                 const Number *out, const int64_t *strides, const float *lse, const float *dlse, const int64_t *sizes,
                                 float scale, int threads, float *dq, float *dk, float *dv) {
    const Shape of = shape(sizes, scale, grid, {bias, strides + 9});
    const Tensor q_(q, strides), k_(k, strides + 3), v_(v, strides + 6), dout_(dout, strides + 12), out_(out, strides + 15);
#pragma omp parallel num_threads(threads)
    {
        const Registers registers;
        const std::unique_ptr<Backward> at(new Backward);
        Packed packed(std::min(of.band(), blocks_of(of.s)) * EDGE, blocks_of(of.n) * EDGE, of.d, of.e);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < of.b * of.g; i++)
            differentiate_head(*at, packed, of, q_, k_, v_, dout_, out_, lse, dlse, dq, dk, dv, i / of.g, i % of.g);
    }
}
