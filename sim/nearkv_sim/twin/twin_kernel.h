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
// As many integers as there are of twice or four times their size.
typedef int16_t I16Half __attribute__((vector_size(SIMD_BYTES / 2), may_alias));
typedef int16_t I16Quarter __attribute__((vector_size(SIMD_BYTES / 4), may_alias));
typedef int32_t I32Half __attribute__((vector_size(SIMD_BYTES / 2), may_alias));

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
    // Weights p, as `dot` takes them.
    template <class Simd>
    static void store_weights(double* to, I32 p) {
        for (int i = 0; i < F32_LANES; i++) to[i] = p[i];
    }
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
    static I32 shift_right_32(I32 a, I32 n) { return (I32)((U32)a >> (U32)n); }
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
    static int32_t total_32(I32 a) {
        int32_t sum = 0;
        for (int i = 0; i < F32_LANES; i++) sum += a[i];
        return sum;
    }
    // The same integers in fewer or more bits.
    static void store_32(int32_t* to, I64 a) { *(I32Half*)to = __builtin_convertvector(a, I32Half); }
    static void store_16(int16_t* to, I64 a) { *(I16Quarter*)to = __builtin_convertvector(a, I16Quarter); }
    static I32 widen_16(I16Half a) { return __builtin_convertvector(a, I32); }
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
    static I16 smaller_16(I16 a, I16 b) { return smaller(a, b); }
    static int16_t largest_16(I16 a) {
        int16_t most = a[0];
        for (int i = 1; i < I16_LANES; i++) most = a[i] > most ? a[i] : most;
        return most;
    }
    // The larger of both halves of each 128 bits (or 64, or 32): first those of a, then those of b.
    static I16 halve_128(I16 a, I16 b) {
        const I64 first = {((I64)a)[0], ((I64)b)[0]}, second = {((I64)a)[1], ((I64)b)[1]};
        return larger((I16)first, (I16)second);
    }
    static I16 halve_64(I16 a, I16 b) {
        const I32 c = (I32)a, d = (I32)b, first = {c[0], c[2], d[0], d[2]}, second = {c[1], c[3], d[1], d[3]};
        return larger((I16)first, (I16)second);
    }
    template <class Simd>
    static I16 halve_32(I16 a, I16 b) {
        const U32 c = (U32)a, d = (U32)b;
        return Simd::larger_16((I16)((c & 0xFFFF) | d << 16), (I16)(c >> 16 | (d & 0xFFFF0000)));
    }
    // Of so many vectors the largest of each eighth part of a row: of one vector all parts.
    static I16 join(const I16 eighths[I16_LANES / 8]) { return eighths[0]; }
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

// What there is to know of a K block before it is aligned.
struct Extent {
    int exponent;  // the largest, of the channels as well
    int field;     // the largest in an element
};

// The first look at a K block: its CRC, and its largest exponent in its first `lanes` lanes.
template <KvFormat FORMAT, class Simd>
static __attribute__((noinline)) Extent
survey(const uint16_t* block, const Query& query, int lanes, const uint16_t* ahead,
       typename Simd::Checksum& checksum) {
    constexpr int VECTORS = LANES / I16_LANES;
    // Of each lane: magnitudes, and the same less what the channel's exponent lies below the largest.
    I16 magnitude[VECTORS]{}, scaled[VECTORS];
    for (int v = 0; v < VECTORS; v++) scaled[v] = all<I16>(int16_t(INT16_MIN));
    auto crc = checksum;  // in registers
    static_assert(LANES % STRIDE == 0, "head_dim is a multiple of LANES");
    for (ptrdiff_t r = 0; r < query.head_dim; r += STRIDE, ahead += LANES) {
        fetch(ahead);
        I16 rows[STRIDE * VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < STRIDE * VECTORS; i++) {
            const int v = i % VECTORS;
            rows[i] = (I16)(*(const U16Loose*)(block + r * LANES + i * I16_LANES));
            const I16 it = rows[i] & int16_t(0x7FFF);
            magnitude[v] = Simd::larger_16(magnitude[v], it);
            const I16 below = (I16)all<U32>(query.below_largest[r + i / VECTORS]);
            scaled[v] = Simd::larger_16(scaled[v], Simd::add_saturating(it, below));
        }
        crc.rows(rows);
    }
    checksum = crc;

    alignas(64) int16_t totals[LANES], magnitudes[LANES];
    for (int v = 0; v < VECTORS; v++) {
        *(I16*)(totals + v * I16_LANES) = scaled[v];
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
    return {query.largest_exponent + (field > 1 ? field : 1), most >> FORMAT.mantissa_bits};
}

// The first look at a V block: its CRC, and the largest magnitude in each of its `n` rows, as bits; 0 for as
// many rows more as make whole vectors.
template <class Simd>
static __attribute__((noinline)) void
survey_rows(const uint16_t* block, int n, const uint16_t* ahead, typename Simd::Checksum& checksum,
            int16_t* largest) {
    constexpr int VECTORS = LANES / I16_LANES, OCTETS = I16_LANES / 8;
    auto crc = checksum;  // in registers
    auto magnitude = [](const I16* row) {  // of all lanes in as many as a vector has
        I16 most = row[0] & int16_t(0x7FFF);
#pragma GCC unroll 16
        for (int v = 1; v < VECTORS; v++) most = Simd::larger_16(most, row[v] & int16_t(0x7FFF));
        return most;
    };
    auto load = [](const uint16_t* from, I16* rows) __attribute__((always_inline)) {
#pragma GCC unroll 32
        for (int i = 0; i < STRIDE * VECTORS; i++)
            rows[i] = (I16)(*(const U16Loose*)(from + i * I16_LANES));
    };
    ptrdiff_t r = 0;
    for (; r + I16_LANES <= n; r += I16_LANES) {
        I16 eighths[OCTETS];
#pragma GCC unroll 4
        for (int i = 0; i < OCTETS; i++) {
            I16 half[2];
            I16 most[8];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                I16 rows[STRIDE * VECTORS];
                load(block + (r + 8 * i + STRIDE * j) * LANES, rows);
                fetch(ahead);
                ahead += LANES;
                crc.rows(rows);
#pragma GCC unroll 4
                for (int k = 0; k < STRIDE; k++) most[STRIDE * j + k] = magnitude(rows + k * VECTORS);
            }
            for (int j = 0; j < 2; j++)
                half[j] = Simd::halve_64(Simd::halve_128(most[j], most[j + 2]),
                                         Simd::halve_128(most[j + 4], most[j + 6]));
            eighths[i] = Simd::template halve_32<Simd>(half[0], half[1]);
        }
        *(I16*)(largest + r) = Simd::join(eighths);
    }
    for (; r + STRIDE <= n; r += STRIDE) {
        I16 rows[STRIDE * VECTORS];
        load(block + r * LANES, rows);
        crc.rows(rows);
        for (int k = 0; k < STRIDE; k++) largest[r + k] = Simd::largest_16(magnitude(rows + k * VECTORS));
    }
    checksum = crc;
    checksum.rest(block + r * LANES, n - r);
    for (; r < n; r++) {
        I16 row[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            row[v] = (I16)(*(const U16Loose*)(block + r * LANES + v * I16_LANES));
        largest[r] = Simd::largest_16(magnitude(row));
    }
    for (; r % I16_LANES; r++) largest[r] = 0;
}

// Aligns a block by the letter of align.model: any exponents, Inf and NaN.
template <KvFormat FORMAT, class Simd>
static void align_exactly(const uint16_t* block, int n, const int32_t* base, int32_t* x) {
    for (int i = 0; i < n * LANES; i++) {
        int element = block[i], field = element >> FORMAT.mantissa_bits & ((1 << FORMAT.exponent_bits) - 1);
        int significand = (element & ((1 << FORMAT.mantissa_bits) - 1)) | (field > 0) << FORMAT.mantissa_bits;
        int shift = base[i / LANES] - (field > 1 ? field : 1);
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

// out[row][lane] = sum over r of weight[row][r] * x[r][lane], for ROWS rows at once.
template <int ROWS, class Simd, class Block>
static void dot_rows(Block block, int n, const double* weight, const double* weight_sum, int64_t* out,
                     int out_stride, const uint16_t* ahead) {
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
        typename Simd::Sum sum[ROWS][VECTORS];
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
                block.widen(x, r, lane + v * F64_LANES, element + v);
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
        for (int v = 0; v < VECTORS; v += 2)
            for (int i = 0; i < ROWS; i++) {
                int64_t* to = out + i * out_stride + lane + v * F64_LANES;
                Simd::template narrow<Simd>(sum[i] + v, (I64*)to, (I64*)(to + F64_LANES));
            }
    }
}

// The same for any number of rows, up to ROWS of them last.
template <class Simd, int ROWS, class Block>
static void dot(Block block, int n, int rows, const double* weight, const double* weight_sum, int64_t* out,
                int out_stride, const uint16_t* ahead) {
    constexpr int MOST = Simd::ROWS_AT_ONCE;
    if (ROWS == MOST)
        for (; rows > MOST; rows -= MOST) {
            dot_rows<MOST, Simd>(block, n, weight, weight_sum, out, out_stride, ahead);
            weight += MOST * WEIGHT_STRIDE, weight_sum += MOST, out += MOST * out_stride;
        }
    if (rows == ROWS)
        dot_rows<ROWS, Simd>(block, n, weight, weight_sum, out, out_stride, ahead);
    else if constexpr (ROWS > 1)
        dot<Simd, ROWS - 1>(block, n, rows, weight, weight_sum, out, out_stride, ahead);
}

// Whether floating point can align a block: its largest exponent field, and the smallest base of a row of
// which something is left.
template <KvFormat FORMAT, class Simd>
TWIN_INLINE bool aligns(int field, int least_base) {
    constexpr int ONE_FIELD = (1 << (FORMAT.exponent_bits - 1)) - 1;  // of 1.0; of Inf it is more than twice that
    constexpr int BINADE = Simd::LARGEST_BINADE < ONE_FIELD ? Simd::LARGEST_BINADE : ONE_FIELD;
    return field - ONE_FIELD <= BINADE && FORMAT.unit - least_base <= Simd::LARGEST_POWER;
}

// Aligns a block to what `scratch.base` says of its rows, by the letter if not `floats`, and multiplies it
// with `rows` rows of weights.
template <KvFormat FORMAT, bool FEW, class Simd>
static void multiply(const uint16_t* block, int n, bool floats, Scratch& scratch, int rows,
                     const double* weight, const double* weight_sum, int64_t* out, int out_stride,
                     const uint16_t* ahead) {
    constexpr int MOST = FEW ? Simd::FEW_ROWS : Simd::ROWS_SCALED;
    if (!floats) {
        align_exactly<FORMAT, Simd>(block, n, scratch.base, (int32_t*)scratch.x);
    } else {
        for (int r = 0; r < n; r += F32_LANES)  // up to a vector past n, which is never used
            *(I32*)(scratch.scale + r) =
                Simd::template scale<FEW, Simd>(FORMAT.unit - *(const I32*)(scratch.base + r));
        const Scaled<FORMAT, FEW, Simd> scaled{block, scratch.scale};
        if constexpr (MOST > 0)
            if (rows <= MOST) {
                dot<Simd, MOST>(scaled, n, rows, weight, weight_sum, out, out_stride, ahead);
                return;
            }
        for (ptrdiff_t r = 0; r < n; r++)
#pragma GCC unroll 16
            for (int t = 0; t < LANES; t += F32_LANES)
                *(F32*)(scratch.x + r * LANES + t) = scaled.aligned(r, t);
    }
    const Aligned<Simd> aligned{scratch.x};
    dot<Simd, Simd::ROWS_AT_ONCE>(aligned, n, rows, weight, weight_sum, out, out_stride, ahead);
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

constexpr int DROP = EXP2_FRAC_BITS - POWER_FRAC_BITS;
// Halvings of a token that has no weight, and the exponent field of a row of V that has only zeros: so far
// from all others that none of their products is ever the largest.
constexpr int16_t NO_WEIGHT = 4096, NO_FIELD = -4096;
// A base that makes every element 0: the factor is the least there is.
constexpr int16_t NOTHING_LEFT = 1024;

// softmax.model on one row of scores; `blocks` blocks of it are there. The mantissas come doubled.
template <class Simd>
TWIN_INLINE void to_weights(const int64_t* score, int blocks, int32_t* twice_mantissa, int16_t* halvings,
                            int& tile_max, int64_t& tile_sum, int64_t& tile_wide) {
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
        I64 power = (I64)((U64)(value + (1 << (DROP - 1))) >> DROP);
        // By how many binades the score's floor lies below the maximum.
        I64 down = (I64)((U64)(SCORE_UNIT - 1 - below) >> SCORE_FRAC_BITS);
        power = down > HALVINGS_MAX ? I64{} : power;
        I64 mantissa = smaller((I64)((U64)(power + (1 << (P_DROP_BITS - 1))) >> P_DROP_BITS), all<I64>(P_MAX));
        I64 few = smaller(down, all<I64>(HALVINGS_MAX));
        sum += Simd::shift_right(mantissa << (SUM_FRAC_BITS - (P_BITS - 1)), few);
        wide_sum += Simd::shift_right(power << (SUM_FRAC_BITS - POWER_FRAC_BITS), few);
        Simd::store_32(twice_mantissa + t, mantissa << 1);
        Simd::store_16(halvings + t, down > HALVINGS_MAX ? all<I64>(NO_WEIGHT) : down);
    }
    tile_sum = Simd::total(sum), tile_wide = Simd::total(wide_sum);
}

// What is known of the products of a V block.
struct Products {
    int field;  // the largest of the block
    int least_base;
};

// products.model: the base of each of the block's `n` rows, the exponent of each head, and the weights.
// `scratch.largest` is known; weights of another block of the tile are there unless it is the `first`.
template <KvFormat FORMAT, class Simd>
static __attribute__((noinline)) Products weigh(Scratch& scratch, int heads, int n, bool first) {
    I16 most{};
    for (int t = 0; t < n; t += I16_LANES) {
        const I16 it = *(const I16*)(scratch.largest + t);
        most = Simd::larger_16(most, it);
        const I16 field = Simd::larger_16(it >> FORMAT.mantissa_bits, all<I16>(int16_t(1)));
        *(I16*)(scratch.field + t) = it > 0 ? field : all<I16>(NO_FIELD);
    }
    bool same = !first;
    for (int i = 0; i < heads; i++) {
        I16 highest = all<I16>(int16_t(EXPONENT_FLOOR));
        for (int t = 0; t < n; t += I16_LANES)
            highest = Simd::larger_16(
                highest, *(const I16*)(scratch.field + t) - *(const I16*)(scratch.halvings[i] + t));
        scratch.exponent[i] = Simd::largest_16(highest);
        const int above_first = scratch.exponent[i] - scratch.exponent[0];
        same &= above_first == scratch.above_first[i];
        scratch.above_first[i] = above_first;
    }
    if (!same) {
        for (int t = 0; t < n; t += I16_LANES) {
            I16 lowest = all<I16>(int16_t(INT16_MAX));
            for (int i = 0; i < heads; i++)
                lowest = Simd::smaller_16(
                    lowest, *(const I16*)(scratch.halvings[i] + t) + int16_t(scratch.above_first[i]));
            *(I16*)(scratch.lowest + t) = lowest;
        }
        for (int i = 0; i < heads; i++) {
            I32 sum{};
            for (int t = 0; t < n; t += I16_LANES) {
                // What the base does not shift, at most so much that the count is legal.
                const I16 rest = *(const I16*)(scratch.halvings[i] + t) + int16_t(scratch.above_first[i]) -
                                 *(const I16*)(scratch.lowest + t);
                const I16 count = Simd::smaller_16(rest, all<I16>(int16_t(31)));
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const int first = t + j * F32_LANES;
                    const I32 twice = *(const I32*)(scratch.twice_mantissa[i] + first);
                    const I32 weight =
                        (Simd::shift_right_32(twice, Simd::widen_16(((const I16Half*)&count)[j])) + 1) >> 1;
                    sum += weight;
                    Simd::template store_weights<Simd>(scratch.p[i] + first, weight);
                }
            }
            scratch.p_sum[i] = Simd::total_32(sum);
        }
    }
    I16 least = all<I16>(int16_t(INT16_MAX));
    for (int t = 0; t < n; t += I16_LANES) {
        const I16 base = *(const I16*)(scratch.lowest + t) + all<I16>(int16_t(scratch.exponent[0]));
        // Nothing is left of elements so far below what all heads have; any base as far below will do.
        const I16 kept = base - *(const I16*)(scratch.field + t) < all<I16>(int16_t(KV_BITS)) ? base : all<I16>(NOTHING_LEFT);
        least = Simd::smaller_16(least, kept);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            *(I32*)(scratch.base + t + j * F32_LANES) = Simd::widen_16(((const I16Half*)&kept)[j]);
    }
    return {Simd::largest_16(most) >> FORMAT.mantissa_bits, -Simd::largest_16(-least)};
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
    const auto align_and_multiply = multiply_rows<FORMAT, Simd>(query.scored_rows);
    typename Simd::Checksum checksum(tile.crc);
    checksum.part(tile.k, blocks * query.head_dim);
    for (int b = 0; b < blocks; b++) {
        const uint16_t* k = tile.k + b * query.head_dim * LANES;
        const int lanes = tile.tokens - b * LANES < LANES ? tile.tokens - b * LANES : LANES;
        // As many elements of V: whole parts if the head is as long as a tile, else about that.
        const uint16_t* ahead = tile.v + ptrdiff_t(b) * query.head_dim / TILE_TOKENS * query.page_tokens * LANES +
                                b * query.head_dim % TILE_TOKENS * LANES;
        Extent found = survey<FORMAT, Simd>(k, query, lanes, ahead, checksum);
        tile.non_finite |= found.field == NON_FINITE<FORMAT>;
        for (int r = 0; r < query.head_dim; r += F32_LANES)
            *(I32*)(scratch.base + r) = found.exponent - *(const I32*)(query.exponent + r);
        align_and_multiply(
            k, query.head_dim, aligns<FORMAT, Simd>(found.field, found.exponent - query.largest_exponent),
            scratch, query.scored_rows, Simd::query_weights(query), query.weight_sum,
            &scratch.raw[0][b * LANES], TILE_TOKENS, ahead);
        for (int i = 0; i < query.scored_rows; i++) {
            int64_t* raw = &scratch.raw[i][b * LANES];
            for (int t = lanes; t < LANES; t++) raw[t] = 0;
            sums.saturated |= to_scores<Simd>(raw, query.mantissa, query.shift - found.exponent);
            for (int t = lanes; t < LANES; t++) raw[t] = NO_SCORE;
        }
    }
    tile.crc_k = checksum.end();
    for (int i = 0; i < query.heads; i++) {
        int64_t tile_sum = 0, tile_wide = 0;
        int& tile_max = scratch.tile_max[i];
        tile_max = RUN_MAX_EMPTY;
        if (blocks)
            to_weights<Simd>(scratch.raw[i], blocks, scratch.twice_mantissa[i], scratch.halvings[i], tile_max,
                             tile_sum, tile_wide);
        if (tile_max > sums.run_max[i]) sums.run_max[i] = tile_max;
        alignas(64) int64_t pair[F64_LANES > 2 ? F64_LANES : 2] = {tile_sum << SUM_SHIFT,
                                                                   tile_wide << SUM_SHIFT};
        add<Simd>(sums.denominators[i], pair, 2, tile_max);
    }
}

template <KvFormat FORMAT, class Simd>
static void values_of(const Query& query, Tile& tile, Scratch& scratch, Sums& sums) {
    typename Simd::Checksum checksum(tile.crc);
    const auto align_and_multiply = multiply_rows<FORMAT, Simd>(query.heads);
    for (int part = 0; part < query.head_dim / LANES; part++) {
        const uint16_t* v = tile.v + size_t(part) * query.page_tokens * LANES;
        const uint16_t* ahead = (tile.next_k ? tile.next_k : v) + part * TILE_TOKENS * LANES;
        checksum.part(v, tile.tokens);
        survey_rows<Simd>(v, tile.tokens, ahead, checksum, scratch.largest);
        const Products found = weigh<FORMAT, Simd>(scratch, query.heads, tile.tokens, part == 0);
        tile.non_finite |= found.field == NON_FINITE<FORMAT>;
        align_and_multiply(v, tile.tokens, aligns<FORMAT, Simd>(found.field, found.least_base), scratch,
                           query.heads, scratch.p[0], scratch.p_sum, scratch.o[0], LANES, ahead);
        for (int i = 0; i < query.heads; i++)
            add<Simd>(sums.out[i][part], scratch.o[i], LANES, scratch.tile_max[i] + scratch.exponent[i]);
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
