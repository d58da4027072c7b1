// SPDX-License-Identifier: Apache-2.0
// One tile of attention, exactly: the arithmetic of align.py, softmax.py and merge.py on vectors.
//
// Included once by each twin_<path>.cpp, which says beforehand how wide its vectors are (SIMD_BYTES) and
// afterwards how the few operations go that differ between instruction sets (`struct Simd`).
//
// Every sum is an integer below 2^53, usually held in doubles; so the order of additions does not matter, and
// neither does fusing them. An aligned element x travels as the float x + BIAS, because adding BIAS is
// also what rounds it; the dot products start at -BIAS * sum of weights. A block is read twice: `survey`
// finds what `multiply` must know.

#include "twin.h"

namespace twin {
namespace {

constexpr int F32_LANES = SIMD_BYTES / 4, F64_LANES = SIMD_BYTES / 8, I16_LANES = SIMD_BYTES / 2;
typedef float F32 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef double F64 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef int16_t I16 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef int32_t I32 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef int64_t I64 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef uint16_t U16 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef uint32_t U32 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef uint64_t U64 __attribute__((vector_size(SIMD_BYTES), may_alias));
typedef U16 U16Loose __attribute__((aligned(2)));  // pages need not be aligned to vectors

#define TWIN_INLINE static inline __attribute__((always_inline))
#define TWIN_INLINE_MEMBER inline __attribute__((always_inline))

template <class V>
TWIN_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
TWIN_INLINE V smaller(V a, V b) {
    return a < b ? a : b;
}

// A vector with one value in all lanes. (x - 0 is x for every x; x + 0 is not for -0.)
template <class V, class T>
TWIN_INLINE V all(T value) {
    return value - V{};
}

// Integers of magnitude below 2^51 lie in the low mantissa bits of x + MAGIC.
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52
constexpr int64_t MAGIC_BITS = 0x4338000000000000;
// The same of floats: integers of magnitude up to 2^22, which is what an element aligns to.
constexpr float BIAS = 12582912.0f;  // 1.5 * 2^23
static_assert(KV_BITS == 23, "an aligned element must fit the mantissa of BIAS");

constexpr int U_BITS = SCORE_FRAC_BITS - EXP2_SEGMENT_BITS;

// Defaults of the operations that an instruction set may do better.
struct Generic {
    // With so many rows at most it is worth to align a block while multiplying. With few rows the
    // multipliers have time to spare for that.
    static constexpr int ROWS_SCALED = 0, FEW_ROWS = 0;
    // An aligned element x travels as the float with these bits plus x.
    static constexpr int32_t BIAS_BITS = 0x4B400000;
    static_assert(BIAS_BITS == __builtin_bit_cast(int32_t, BIAS));
    // What floating point can align: factors up to 2^LARGEST_POWER, elements below 2^(LARGEST_BINADE + 1).
    // A factor below 2^-126 is taken for 0. That is right for elements below 2^126: less than half
    // a unit is left of them. Larger elements would be rounded to 1 by 2^-127 and 2^-128.
    static constexpr int LARGEST_POWER = 127, LARGEST_BINADE = 125;
    // What `round` takes for 2^k.
    template <bool FEW, class Simd>
    static I32 scale(I32 k) {
        const I32 power = k + 127;
        return power > 0 ? (power << 23) | Simd::SCALE_NUDGE : I32{};
    }
    // Sums of products of a weight and an aligned element, from minus what BIAS adds to them.
    using Sum = F64;
    static const double* query_weights(const Query& query) { return query.weight[0]; }
    static F64 p_weight(I64 p) { return (F64)(p + MAGIC_BITS) - MAGIC; }
    static F64 start(double weight_sum) { return all<F64>(-double(BIAS) * weight_sum); }
    static F64 weight(const double* p) { return all<F64>(*p); }
    // The sums of the lanes that `widen` split, in order.
    template <class Simd>
    static void narrow(const F64 sum[2], I64* low, I64* high) {
        *low = Simd::to_int(sum[0]), *high = Simd::to_int(sum[1]);
    }
    // a * b + c, exact by the caller's promise
    static F64 multiply_add(F64 a, F64 b, F64 c) { return a * b + c; }
    static I64 to_int(F64 a) { return (I64)(a + MAGIC) - MAGIC_BITS; }
    // floor(a / 2^n) for |a| < 2^62 and n <= 62
    static I64 shift_right(I64 a, int n) {
        return (I64)((U64)(a + (int64_t(1) << 62)) >> n) - (int64_t(1) << (62 - n));
    }
    static I64 shift_right(I64 a, I64 n) { return (I64)((U64)a >> (U64)n); }  // a not negative
    static int64_t total(I64 a) {
        int64_t sum = 0;
        for (int i = 0; i < F64_LANES; i++) sum += a[i];
        return sum;
    }
    static int64_t largest(I64 a) {
        int64_t most = a[0];
        for (int i = 1; i < F64_LANES; i++) most = a[i] > most ? a[i] : most;
        return most;
    }
    template <class Simd>
    static bool exceeds(I64 a, int64_t limit) { return Simd::largest(a) > limit; }
    static I64 multiply(I64 a, int64_t b) { return a * b; }
    static I64 multiply_32(I64 a, I64 b) { return a * b; }  // both in 0 .. 2^32 - 1
    // a + floor(b * u / 2^U_BITS), all not negative, for the low U_BITS bits of u
    template <class Simd>
    static I64 interpolate(I64 a, I64 b, I64 u) {
        return a + (I64)((U64)Simd::multiply_32(b, u & ((1 << U_BITS) - 1)) >> U_BITS);
    }
    static I16 larger_16(I16 a, I16 b) { return larger(a, b); }
    static I16 add_saturating(I16 a, I16 b) {  // b not positive
        I16 sum = a + b;
        return (sum > a) ? all<I16>(int16_t(INT16_MIN)) : sum;
    }

    // CRC-32C of a tile's K or V. A path may read parts of it on its own account, or row by row while
    // `survey` has them in registers.
    class Checksum {
      public:
        explicit Checksum(Crc crc) : crc_(crc) {}
        void part(const uint16_t* rows, int n) {  // all that is contiguous
            sum_ = crc_(sum_, (const uint8_t*)rows, size_t(n) * LANES * KV_ELEMENT_BYTES);
        }
        void rows(const I16*) {}            // the next STRIDE rows
        void rest(const uint16_t*, int) {}  // rows that remain, fewer than STRIDE
        uint32_t end() const { return sum_; }

      private:
        Crc crc_;
        uint32_t sum_ = 0;
    };
};

// Rows that `survey` takes at once.
constexpr int STRIDE = 4;

// Ask for one row of 32 elements of the block that is needed half a tile later. The processor can wait
// for few rows at once, so the requests are spread over all that is done with a block, about in
// proportion to time: a quarter of the rows in `survey`, the rest in `dot`.
TWIN_INLINE void fetch(const uint16_t* ahead) { __builtin_prefetch(ahead, 0, 2); }

// What there is to know of a block before it is aligned.
struct Extent {
    int exponent;  // the largest, of the rows as well
    int field;     // the largest in an element
};

// The first look at a block: its CRC, and its largest exponent, of `n` rows whose own exponents are added,
// in its first `lanes` lanes.
template <KvFormat FORMAT, class Simd>
static __attribute__((noinline)) Extent
survey(const uint16_t* block, int n, const uint32_t* below_largest, int largest_row_exponent, int lanes,
       const uint16_t* ahead, typename Simd::Checksum& checksum) {
    constexpr int VECTORS = LANES / I16_LANES;
    // Of each lane: magnitudes, and the same less what the row's exponent lies below the largest.
    I16 magnitude[VECTORS]{}, scaled[VECTORS];
    for (int v = 0; v < VECTORS; v++) scaled[v] = all<I16>(int16_t(INT16_MIN));
    auto crc = checksum;  // in registers
    ptrdiff_t r = 0;
    for (; r + STRIDE <= n; r += STRIDE, ahead += LANES) {
        fetch(ahead);
        I16 rows[STRIDE * VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < STRIDE * VECTORS; i++) {
            const int v = i % VECTORS;
            rows[i] = (I16)(*(const U16Loose*)(block + r * LANES + i * I16_LANES));
            const I16 it = rows[i] & int16_t(0x7FFF);
            magnitude[v] = Simd::larger_16(magnitude[v], it);
            if (!below_largest) continue;
            const I16 below = (I16)all<U32>(below_largest[r + i / VECTORS]);
            scaled[v] = Simd::larger_16(scaled[v], Simd::add_saturating(it, below));
        }
        crc.rows(rows);
    }
    checksum = crc;
    // Only V can have more rows. Their CRC is the caller's: a call from here would keep the sums of the
    // loop above out of registers.
    for (; r < n; r++)
        for (int v = 0; v < VECTORS; v++) {
            const I16 row = (I16)(*(const U16Loose*)(block + r * LANES + v * I16_LANES));
            magnitude[v] = Simd::larger_16(magnitude[v], row & int16_t(0x7FFF));
        }

    alignas(64) int16_t totals[LANES], magnitudes[LANES];
    for (int v = 0; v < VECTORS; v++) {
        *(I16*)(totals + v * I16_LANES) = below_largest ? scaled[v] : magnitude[v];
        *(I16*)(magnitudes + v * I16_LANES) = magnitude[v];
    }
    for (int t = lanes; t < LANES; t++) totals[t] = INT16_MIN, magnitudes[t] = 0;
    int16_t total = INT16_MIN, most = 0;
    for (int t = 0; t < LANES; t++) {
        total = totals[t] > total ? totals[t] : total;
        most = magnitudes[t] > most ? magnitudes[t] : most;
    }
    // Exponent field 0 counts as 1, so no row is below its own exponent plus 1.
    const int field = total >> FORMAT.mantissa_bits;
    return {largest_row_exponent + (field > 1 ? field : 1), most >> FORMAT.mantissa_bits};
}

// Aligns a block by the letter of align.model: any exponents, Inf and NaN.
template <KvFormat FORMAT, class Simd>
static void align_exactly(const uint16_t* block, int n, const int32_t* row_exponent, int exponent,
                          int32_t* x) {
    for (int i = 0; i < n * LANES; i++) {
        int element = block[i], field = element >> FORMAT.mantissa_bits & ((1 << FORMAT.exponent_bits) - 1);
        int significand = (element & ((1 << FORMAT.mantissa_bits) - 1)) | (field > 0) << FORMAT.mantissa_bits;
        int shift = exponent - (field > 1 ? field : 1) - (row_exponent ? row_exponent[i / LANES] : 0);
        shift = shift < 0 ? 0 : shift > KV_BITS ? KV_BITS : shift;
        int rounded = ((significand << FORMAT.align_bits << 1 >> shift) + 1) >> 1;
        x[i] = Simd::BIAS_BITS + (element >> 15 ? -rounded : rounded);
    }
}

// A block as the dot products read it: aligned while it is read, with floating point operations, which scale
// by 2^k and round like `align_exactly` as long as 2^k and the elements are finite floats ...
template <KvFormat FORMAT, bool FEW, class Simd>
struct Scaled {
    const uint16_t* block;
    const float* scale;  // of each row
    TWIN_INLINE_MEMBER F32 aligned(ptrdiff_t r, int lane) const {
        return Simd::template round<FEW>(Simd::template load<FORMAT.mantissa_bits>(block + r * LANES + lane),
                                         all<F32>(scale[r]));
    }
    TWIN_INLINE_MEMBER void widen(F32 x, ptrdiff_t, int, typename Simd::Sum to[2]) const {
        Simd::widen(x, to);
    }
};

// ... or already aligned.
template <class Simd>
struct Aligned {
    const float* x;
    TWIN_INLINE_MEMBER F32 aligned(ptrdiff_t r, int lane) const { return *(const F32*)(x + r * LANES + lane); }
    TWIN_INLINE_MEMBER void widen(F32, ptrdiff_t r, int lane, typename Simd::Sum to[2]) const {
        Simd::widen(x + r * LANES + lane, to);
    }
};

// out[row][lane] = sum over r of weight[row][r] * x[r][lane], for ROWS rows at once; and with TOTAL the
// plain sum over r as well.
template <int ROWS, bool TOTAL, class Simd, class Block>
static void dot_rows(Block block, int n, const double* weight, const double* weight_sum, int64_t* out,
                     int out_stride, int32_t* total, const uint16_t* ahead) {
    // As many lanes as the registers hold accumulators for, but always a vector of floats.
    constexpr int MOST = LANES / F64_LANES;
    constexpr int VECTORS = ROWS * MOST <= Simd::ACCUMULATORS       ? MOST
                            : ROWS * MOST / 2 <= Simd::ACCUMULATORS ? MOST / 2
                                                                    : 2;
    static_assert(VECTORS >= 2 && MOST % VECTORS == 0);
    constexpr int PASSES = MOST / VECTORS;
    const uint16_t* next = ahead + n / 4 * LANES;
    for (int pass = 0; pass < PASSES; pass++) {
        const int lane = pass * VECTORS * F64_LANES;
        typename Simd::Sum sum[ROWS + 1][VECTORS];
        I32 plain[VECTORS / 2]{};
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) sum[i][v] = Simd::start(weight_sum[i]);
        for (ptrdiff_t r = 0; r < n; r++) {
            fetch(next);
            next += 3 * LANES / 4 / PASSES;
            typename Simd::Sum element[VECTORS];
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v += 2) {
                F32 x = block.aligned(r, lane + v * F64_LANES);
                if (TOTAL) plain[v / 2] += (I32)x;
                if (ROWS) block.widen(x, r, lane + v * F64_LANES, element + v);
            }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                auto w = Simd::weight(weight + i * WEIGHT_STRIDE + r);
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++)
                    sum[i][v] = Simd::multiply_add(w, element[v], sum[i][v]);
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v += 2) {
            for (int i = 0; i < ROWS; i++) {
                int64_t* to = out + i * out_stride + lane + v * F64_LANES;
                Simd::template narrow<Simd>(sum[i] + v, (I64*)to, (I64*)(to + F64_LANES));
            }
            if (TOTAL)
                *(I32*)(total + lane + v * F64_LANES) =
                    plain[v / 2] - int32_t(uint32_t(Simd::BIAS_BITS) * uint32_t(n));
        }
    }
}

// The same for any number of rows, up to ROWS of them last; without a total if that is null.
template <class Simd, int ROWS, class Block>
static void dot(Block block, int n, int rows, const double* weight, const double* weight_sum, int64_t* out,
                int out_stride, int32_t* total, const uint16_t* ahead) {
    constexpr int MOST = Simd::ROWS_AT_ONCE;
    if (ROWS == MOST)
        for (; rows > MOST; rows -= MOST) {
            dot_rows<MOST, false, Simd>(block, n, weight, weight_sum, out, out_stride, total, ahead);
            weight += MOST * WEIGHT_STRIDE, weight_sum += MOST, out += MOST * out_stride;
        }
    if (rows == ROWS && total)
        dot_rows<ROWS, true, Simd>(block, n, weight, weight_sum, out, out_stride, total, ahead);
    else if (rows == ROWS)
        dot_rows<ROWS, false, Simd>(block, n, weight, weight_sum, out, out_stride, total, ahead);
    else if constexpr (ROWS > 0)
        dot<Simd, ROWS - 1>(block, n, rows, weight, weight_sum, out, out_stride, total, ahead);
}

// Aligns a block to the exponent that `survey` found, and multiplies it with `rows` rows of weights.
template <KvFormat FORMAT, bool FEW, class Simd>
static void multiply(const uint16_t* block, int n, const int32_t* row_exponent, int largest_row_exponent,
                     Extent extent, Scratch& scratch, int rows, const double* weight,
                     const double* weight_sum, int64_t* out, int out_stride, int32_t* total,
                     const uint16_t* ahead) {
    constexpr int ONE_FIELD = (1 << (FORMAT.exponent_bits - 1)) - 1;  // of 1.0; of Inf it is more than twice that
    constexpr int BINADE = Simd::LARGEST_BINADE < ONE_FIELD ? Simd::LARGEST_BINADE : ONE_FIELD;
    constexpr int MOST = FEW ? Simd::FEW_ROWS : Simd::ROWS_SCALED;
    const int base = FORMAT.unit - extent.exponent;
    if (extent.field - ONE_FIELD > BINADE || base + largest_row_exponent > Simd::LARGEST_POWER) {
        align_exactly<FORMAT, Simd>(block, n, row_exponent, extent.exponent, (int32_t*)scratch.x);
    } else {
        for (int r = 0; r < n; r += F32_LANES) {  // up to a vector past n, which is never used
            I32 k = all<I32>(base);
            if (row_exponent) k += *(const I32*)(row_exponent + r);
            *(I32*)(scratch.scale + r) = Simd::template scale<FEW, Simd>(k);
        }
        const Scaled<FORMAT, FEW, Simd> scaled{block, scratch.scale};
        if constexpr (MOST > 0)
            if (rows <= MOST) {
                dot<Simd, MOST>(scaled, n, rows, weight, weight_sum, out, out_stride, total, ahead);
                return;
            }
        for (ptrdiff_t r = 0; r < n; r++)
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t += F32_LANES)
                *(F32*)(scratch.x + r * LANES + t) = scaled.aligned(r, t);
    }
    const Aligned<Simd> aligned{scratch.x};
    dot<Simd, Simd::ROWS_AT_ONCE>(aligned, n, rows, weight, weight_sum, out, out_stride, total, ahead);
}

template <KvFormat FORMAT, class Simd>
TWIN_INLINE auto multiply_rows(int rows) {
    return rows > Simd::FEW_ROWS ? multiply<FORMAT, false, Simd> : multiply<FORMAT, true, Simd>;
}

constexpr int64_t SCORE_UNIT = int64_t(1) << SCORE_FRAC_BITS;
constexpr int64_t NO_SCORE = -(int64_t(1) << 44);  // of a token that is not there: its weight becomes 0

// softmax.score_model on the sums of one block, in place. True if a score left the range.
template <class Simd>
TWIN_INLINE bool to_scores(int64_t* raw, int64_t mantissa, int shift) {
    I64 most{}, least{};
    if (shift > SCORE_SHIFT_MAX) shift = SCORE_SHIFT_MAX;
    for (int t = 0; t < LANES; t += F64_LANES) {
        I64 product = Simd::multiply(Simd::shift_right(*(const I64*)(raw + t), RAW_SHIFT), mantissa), score;
        if (shift >= 1)
            score = Simd::shift_right(Simd::shift_right(product, shift - 1) + 1, 1);
        else
            score = product < 0 ? all<I64>(-SCORE_LIMIT - 1) : product > 0 ? all<I64>(SCORE_LIMIT + 1) : I64{};
        most = larger(most, score);
        least = smaller(least, score);
        *(I64*)(raw + t) = smaller(larger(score, all<I64>(-SCORE_LIMIT)), all<I64>(SCORE_LIMIT));
    }
    return Simd::template exceeds<Simd>(larger(most, -least), SCORE_LIMIT);
}

constexpr int DROP = EXP2_FRAC_BITS - P_WIDE_FRAC_BITS;
constexpr int NARROW = P_WIDE_FRAC_BITS - P_BITS;
// What softmax.model makes of a score that is the tile's maximum, and an integer.
constexpr int64_t ONE_WIDE = (EXP2_A0[0] + (1 << (DROP - 1))) >> DROP;
constexpr int64_t ONE_ROUNDED = (ONE_WIDE + (1 << (NARROW - 1))) >> NARROW;
constexpr int64_t ONE = ONE_ROUNDED < P_MAX ? ONE_ROUNDED : P_MAX;

// softmax.model on one row of scores; `blocks` blocks of it are there.
template <class Simd>
TWIN_INLINE void to_weights(const int64_t* score, int blocks, double* p, int& tile_max, int64_t& tile_sum,
                            int64_t& tile_wide) {
    I64 most = all<I64>(NO_SCORE);
    for (int t = 0; t < blocks * LANES; t += F64_LANES) most = larger(most, *(const I64*)(score + t));
    tile_max = static_cast<int>((Simd::largest(most) + SCORE_UNIT - 1) >> SCORE_FRAC_BITS);

    const int64_t ceiling = tile_max * SCORE_UNIT;
    I64 sum{}, wide_sum{};
    for (int t = 0; t < blocks * LANES; t += F64_LANES) {
        I64 below = *(const I64*)(score + t) - ceiling;
        I64 segment = (I64)((U64)below >> U_BITS);
        I64 a0 = Simd::look_up(EXP2_A0, segment), a1 = Simd::look_up(EXP2_A1, segment);
        I64 slope = Simd::template interpolate<Simd>(a1, Simd::look_up(EXP2_A2, segment), below);
        I64 value = Simd::template interpolate<Simd>(a0, slope, below);
        // DROP, and by how many binades the score's floor lies below the maximum.
        I64 down = (I64)((U64)(DROP * SCORE_UNIT + SCORE_UNIT - 1 - below) >> SCORE_FRAC_BITS);
        I64 wide = Simd::shift_right(value + (1 << (DROP - 1)),
                                     smaller(down, all<I64>(DROP + P_WIDE_FRAC_BITS + 1)));
        I64 weight = smaller((I64)((U64)(wide + (1 << (NARROW - 1))) >> NARROW), all<I64>(P_MAX));
        sum += weight;
        wide_sum += wide;
        *(F64*)(p + t) = Simd::p_weight(weight);
    }
    tile_sum = Simd::total(sum), tile_wide = Simd::total(wide_sum);
}

// Drop limbs that fall out below when the top rises.
static void raise_top(BlockSum& sum, int top) {
    for (int down = top - sum.top < N_LIMBS ? top - sum.top : N_LIMBS; down > 0; down--)
        for (int i = 0; i < LANES; i += F64_LANES) {
            U64 even = *(U64*)(sum.even + i);
            *(U64*)(sum.even + i) = *(U64*)(sum.odd + i);
            *(U64*)(sum.odd + i) = even >> 32;
        }
    sum.top = top;
}

// sum += mantissa * 2^exponent, for `lanes` lanes of integers of magnitude up to 2^46.
template <class Simd>
TWIN_INLINE void add(BlockSum& sum, const int64_t* mantissa, int lanes, int exponent) {
    const int place = exponent + WINDOW_TOP, top = place >> LIMB_STEP_LOG2;
    if (top > sum.top) raise_top(sum, top);
    const int down = sum.top - top;
    if (down >= N_LIMBS) return;
    static_assert(LIMB_STEP == 16, "the masks below");
    for (int i = 0; i < lanes; i += F64_LANES) {
        I64 z = *(const I64*)(mantissa + i) << ((place & (LIMB_STEP - 1)) + 1);
        I64 even = z & 0x0000FFFF0000FFFF;
        I64 odd = (I64)((I32)z >> 16) & int64_t(0xFFFFFFFF0000FFFF);
        for (int j = 0; j < down; j++) {
            U64 low = (U64)even;
            even = odd;
            odd = (I64)(low >> 32);
        }
        *(I32*)(sum.even + i) += (I32)even;
        *(I32*)(sum.odd + i) += (I32)odd;
    }
}

template <KvFormat FORMAT>
constexpr int NON_FINITE = (1 << FORMAT.exponent_bits) - 1;

template <KvFormat FORMAT, class Simd>
static void scores_of(const Query& query, Tile& tile, Scratch& scratch, Sums& sums) {
    const int blocks = (tile.tokens + LANES - 1) / LANES;
    const auto align_and_multiply = multiply_rows<FORMAT, Simd>(query.weighted_rows);
    typename Simd::Checksum checksum(tile.crc);
    checksum.part(tile.k, blocks * query.head_dim);
    for (int b = 0; b < blocks; b++) {
        const uint16_t* k = tile.k + b * query.head_dim * LANES;
        const int lanes = tile.tokens - b * LANES < LANES ? tile.tokens - b * LANES : LANES;
        // As many elements of V: whole parts if the head is as long as a tile, else about that.
        const uint16_t* ahead = tile.v + ptrdiff_t(b) * query.head_dim / TILE_TOKENS * query.page_tokens * LANES +
                                b * query.head_dim % TILE_TOKENS * LANES;
        Extent found = survey<FORMAT, Simd>(k, query.head_dim, query.below_largest, query.largest_exponent,
                                            lanes, ahead, checksum);
        tile.non_finite |= found.field == NON_FINITE<FORMAT>;
        align_and_multiply(
            k, query.head_dim, query.exponent, query.largest_exponent, found, scratch, query.weighted_rows,
            Simd::query_weights(query), query.weight_sum, &scratch.raw[0][b * LANES], TILE_TOKENS, nullptr,
            ahead);
        for (int i = 0; i < query.weighted_rows; i++) {
            int64_t* raw = &scratch.raw[i][b * LANES];
            for (int t = lanes; t < LANES; t++) raw[t] = 0;
            sums.saturated |= to_scores<Simd>(raw, query.mantissa, query.shift - found.exponent);
            for (int t = lanes; t < LANES; t++) raw[t] = NO_SCORE;
        }
    }
    tile.crc_k = checksum.end();
    for (int i = 0; i < query.rows; i++) {
        int64_t tile_sum = 0, tile_wide = 0;
        int& tile_max = scratch.tile_max[i];
        tile_max = RUN_MAX_EMPTY;
        if (blocks && i >= query.weighted_rows)  // all scores are 0
            tile_max = 0, tile_sum = ONE * tile.tokens, tile_wide = ONE_WIDE * tile.tokens;
        else if (blocks)
            to_weights<Simd>(scratch.raw[i], blocks, scratch.p[i], tile_max, tile_sum, tile_wide);
        scratch.p_sum[i] = static_cast<double>(tile_sum);
        if (tile_max > sums.run_max[i]) sums.run_max[i] = tile_max;
        alignas(64) int64_t pair[F64_LANES > 2 ? F64_LANES : 2] = {tile_sum << SUM_SHIFT,
                                                                   tile_wide << SUM_WIDE_SHIFT};
        add<Simd>(sums.denominators[i], pair, 2, tile_max);
    }
}

template <KvFormat FORMAT, class Simd>
static void values_of(const Query& query, Tile& tile, Scratch& scratch, Sums& sums) {
    typename Simd::Checksum checksum(tile.crc);
    const bool unweighted = query.weighted_rows < query.rows;
    const auto align_and_multiply = multiply_rows<FORMAT, Simd>(query.weighted_rows);
    for (int part = 0; part < query.head_dim / LANES; part++) {
        const uint16_t* v = tile.v + size_t(part) * query.page_tokens * LANES;
        const uint16_t* ahead = (tile.next_k ? tile.next_k : v) + part * TILE_TOKENS * LANES;
        Extent found = {EXPONENT_FLOOR, 0};
        alignas(64) int32_t total[LANES]{};
        checksum.part(v, tile.tokens);
        if (tile.tokens)
            found = survey<FORMAT, Simd>(v, tile.tokens, nullptr, 0, LANES, ahead, checksum);
        const int rest = tile.tokens % STRIDE;
        checksum.rest(v + (tile.tokens - rest) * LANES, rest);
        tile.non_finite |= found.field == NON_FINITE<FORMAT>;
        align_and_multiply(
            v, tile.tokens, nullptr, 0, found, scratch, query.weighted_rows, scratch.p[0], scratch.p_sum,
            scratch.o[0], LANES, unweighted ? total : nullptr, ahead);
        // Rows without weight have the same p for every token.
        for (int i = query.weighted_rows; i < query.rows; i++)
            for (int t = 0; t < LANES; t++) scratch.o[i][t] = ONE * total[t];
        for (int i = 0; i < query.rows; i++)
            add<Simd>(sums.out[i][part], scratch.o[i], LANES, scratch.tile_max[i] + found.exponent);
    }
    tile.crc_v = checksum.end();
}

template <class Simd>
static void scores(const Query& query, Tile& tile, Scratch& scratch, Sums& sums) {
    if (query.kv_type == KV_FP16)
        scores_of<FP16, Simd>(query, tile, scratch, sums);
    else
        scores_of<BF16, Simd>(query, tile, scratch, sums);
}

template <class Simd>
static void values(const Query& query, Tile& tile, Scratch& scratch, Sums& sums) {
    if (query.kv_type == KV_FP16)
        values_of<FP16, Simd>(query, tile, scratch, sums);
    else
        values_of<BF16, Simd>(query, tile, scratch, sums);
}

}  // namespace
}  // namespace twin
