// SPDX-License-Identifier: Apache-2.0
// What the host computes in each step. native.py is the only caller, through the C functions at the end;
// beside each of them stands a function in numpy that gives the same bits.
//
// The bits are the same because every product, sum and quotient of doubles is rounded once and in the same
// order. Compilers keep to that as long as nothing allows them otherwise: no -ffast-math, and
// -ffp-contract=off. Vectors change nothing then, so loops are compiled for several instruction sets.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <bit>

#include "native_constants.h"

#ifdef __FAST_MATH__
#error "-ffast-math changes the results"
#endif

#ifndef VECTORS  // a test compiles each alone
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
// Chosen by the loader, with the processor it finds.
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

// --- elementary functions -------------------------------------------------------------------

constexpr int FRACTION_BITS = 52, BIAS = 1023;
// Adding it rounds to an integer, half to even, which is then found in the lowest bits.
constexpr double ROUNDER = 0x1.8p52;

// 2^n for -1022 <= n <= 1023.
INLINE double power_of_two(int64_t n) { return std::bit_cast<double>(uint64_t(n + BIAS) << FRACTION_BITS); }

template <int N>
INLINE double polynomial(const double (&terms)[N], double x) {
    double total = terms[N - 1];
    for (int k = N - 2; k >= 0; k--) total = total * x + terms[k];
    return total;
}

// elementary.exp2
INLINE double exp2_of(double x) {
    const bool inside = x >= EXP2_LEAST;
    const double bounded = inside ? x : 0.0;
    const double rounded = bounded + ROUNDER;
    const double power = polynomial(EXP2_TERMS, bounded - (rounded - ROUNDER)) *
                         power_of_two(std::bit_cast<int64_t>(rounded) - std::bit_cast<int64_t>(ROUNDER));
    return inside ? power : x != x ? x : 0.0;
}

// elementary.log2
double log2_of(double x) {
    if (x == 0) return -INFINITY;
    int exponent = 0;
    double fraction = frexp(x, &exponent);
    if (fraction < SQRT_HALF) fraction *= 2, exponent--;
    const double s = (fraction - 1) / (fraction + 1);
    return polynomial(LOG2_TERMS, s * s) * s + exponent;
}

// Whether all of n indices are.
bool among(const int64_t* indices, int64_t n, int64_t limit) {
    return std::all_of(indices, indices + n, [=](int64_t i) { return 0 <= i && i < limit; });
}

// The larger one; NaN if one is.
INLINE double larger(double a, double b) { return a > b || a != a ? a : b; }

// --- queries --------------------------------------------------------------------------------

// number.quantize_q for jobs, of which job i has the queries where[i], into zeros. False if an element is not
// finite or too large.
template <typename T>
bool records_of(const T* queries, const int64_t* where, int64_t n_jobs, int64_t width, int64_t head_dim,
                int32_t* records) {
    constexpr int INTEGERS = Q_RECORD / 4;
    for (int64_t job = 0; job < n_jobs; job++) {
        const T* q = queries + where[job] * width * head_dim;
        for (int64_t c = 0; c < head_dim; c++, q++, records += INTEGERS) {
            double largest = 0;
            for (int64_t row = 0; row < width; row++) largest = larger(fabs(double(q[row * head_dim])), largest);
            // As frexp has it, where it is not below the least anyway.
            int exponent = int(std::bit_cast<uint64_t>(largest) >> FRACTION_BITS) - (BIAS - 1);
            if (exponent > Q_EXPONENT_MAX) return false;
            exponent = std::max(exponent, Q_EXPONENT_MIN);
            const double scale = power_of_two(WEIGHT_BITS - 1 - exponent);
            for (int64_t row = 0; row < width; row++) {
                const double weight = (double(q[row * head_dim]) * scale + ROUNDER) - ROUNDER;
                records[Q_WEIGHT / 4 + row] = int32_t(std::clamp<double>(weight, -WEIGHT_MAX, WEIGHT_MAX));
            }
            records[Q_EXPONENT / 4] = exponent;
        }
    }
    return true;
}

// --- partials -------------------------------------------------------------------------------

struct Wide {
    int64_t limbs[N_LIMBS], top;
};

// number.Wide.unpack
INLINE Wide unpack(const uint8_t* from) {
    static_assert(N_LIMBS == 4 && BITS_OF_LIMB == 28 && WIDE_BYTES == 16);
    uint64_t low, high;
    memcpy(&low, from, 8), memcpy(&high, from + 8, 8);
    auto limb = [](uint64_t bits) { return int64_t(bits << (64 - BITS_OF_LIMB)) >> (64 - BITS_OF_LIMB); };
    return {{limb(low), limb(low >> 28), limb(low >> 56 | high << 8), limb(high >> 20)}, int64_t(high) >> 48};
}

// number.Wide.__add__
INLINE void add(int64_t* limbs, int64_t& top, const Wide& more) {
    if (top == more.top) {
        for (int j = 0; j < N_LIMBS; j++) limbs[j] += more.limbs[j];
        return;
    }
    const int64_t highest = std::max(top, more.top);
    int64_t sum[N_LIMBS];
    for (int j = 0; j < N_LIMBS; j++) {
        const int64_t mine = j + highest - top, its = j + highest - more.top;
        sum[j] = (mine < N_LIMBS ? limbs[mine] : 0) + (its < N_LIMBS ? more.limbs[its] : 0);
    }
    memcpy(limbs, sum, sizeof sum);
    top = highest;
}

// number.Wide.to_float: the value is the result times 2^(LIMB_STEP * (top - (N_LIMBS - 1))).
INLINE double mantissa(const int64_t* limbs) {
    static_assert(LIMB_STEP == 16);
    const int64_t high = limbs[3] * 65536 + limbs[2], low = limbs[1] * 65536 + limbs[0];
    return double(high) * 0x1p32 + double(low);
}

INLINE double scaled(double x, int64_t exponent) {
    if (-(BIAS - 1) <= exponent && exponent <= BIAS) return x * power_of_two(exponent);
    return ldexp(x, int(std::clamp<int64_t>(exponent, -1 << 20, 1 << 20)));
}

// The sums of one query head: run_sum, run_sum_wide and out.
struct Head {
    const int64_t *limbs, *top;
    double total, lse_log2;

    Head(const int64_t* limbs, const int64_t* top) : limbs(limbs), top(top), total(mantissa(limbs)) {
        const double wide = mantissa(limbs + N_LIMBS);
        lse_log2 = -INFINITY;
        if (wide > 0) lse_log2 = log2_of(wide) + double(LIMB_STEP * (top[1] - (N_LIMBS - 1)) - SUM_UNIT);
    }

    // partial.Partial.normalise
    double out(int64_t channel, int64_t unit) const {
        if (!(total > 0)) return 0;
        const double quotient = mantissa(limbs + (2 + channel) * N_LIMBS) / total;
        return scaled(quotient, LIMB_STEP * (top[2 + channel] - top[0]) + unit);
    }
};


// --- tail and new tokens ----------------------------------------------------------------------

// Elements of K or V: the address of the first, and bytes from one to the next.
struct Elements {
    const uint8_t* first;
    int64_t sequence, head, token;

    template <typename T = uint16_t>
    const T* at(int64_t b, int64_t h, int64_t t) const {
        return reinterpret_cast<const T*>(first + b * sequence + h * head + t * token);
    }
};

template <bool BF16>
INLINE double real(uint16_t pattern) {
    const uint32_t bits = pattern, sign = (bits & 0x8000) << 16;
    if constexpr (BF16) return std::bit_cast<float>(bits << 16);
    const uint32_t magnitude = (bits & 0x7FFF) << 13;
    constexpr uint32_t one = 1u << 23;  // of the exponent field
    // Both are computed, so that there is nothing to jump over. Below 2^-14 there is no leading 1; the
    // exponents' biases differ by 112.
    const float small = std::bit_cast<float>(magnitude + 113 * one) - 0x1p-14f;
    const uint32_t normal = magnitude + (magnitude >= 31 * one ? 224 * one : 112 * one);
    return std::bit_cast<float>((magnitude < one ? std::bit_cast<uint32_t>(small) : normal) | sign);
}

// pages.to_patterns: rounded to nearest, ties to even.
INLINE uint16_t pattern(float x, bool bf16) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    constexpr uint32_t one = 1u << 23, infinite = 255 * one;  // of the exponent field
    if (magnitude > infinite) return bf16 ? 0x7FC0 : 0x7E00;
    if (bf16) return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    // Below 2^-14 the places of 0.5f are those of the result.
    if (magnitude < 113 * one)
        return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f));
    const uint32_t rounded = (magnitude - 112 * one + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    return sign | std::min(rounded, 0x7C00u);
}

template <typename T, typename F>
INLINE void widen(const T* from, int64_t n, double* to, F value) {
    for (int64_t c = 0; c < n; c++) to[c] = value(from[c]);
}

typedef double Lanes __attribute__((vector_size(LANES * 8), aligned(8), may_alias));

// tail._products
INLINE double product(const double* q, const double* k, int64_t head_dim) {
    static_assert(LANES == 8);
    Lanes sum = {};
    for (int64_t c = 0; c < head_dim; c += LANES) sum += *(const Lanes*)(q + c) * *(const Lanes*)(k + c);
    const auto four = __builtin_shufflevector(sum, sum, 0, 1, 2, 3) + __builtin_shufflevector(sum, sum, 4, 5, 6, 7);
    const auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
    return two[0] + two[1];
}

struct Tail {
    const float* q;
    Elements tail_k, tail_v, k, v;
    const int64_t* tail_tokens;
    const uint8_t* valid;  // (batch, n_new), or null
    int64_t batch, heads, group, n_new, head_dim, most_tokens;
    double scale;
    double* scratch;  // (group * n_new * (most_tokens + 1 + head_dim) + head_dim)
    double* out;
    double* lse_log2;
};

template <bool BF16>
INLINE void attend(const Tail& it) {
    const int64_t rows = it.group * it.n_new, head_dim = it.head_dim;
    double *p = it.scratch, *x = p + rows * it.most_tokens, *sums = x + head_dim, *queries = sums + rows;
    const float* q = it.q;
    double *out = it.out, *lse_log2 = it.lse_log2;
    for (int64_t b = 0; b < it.batch; b++)
        for (int64_t h = 0; h < it.heads; h++) {
            const int64_t past = it.tail_tokens[b], tokens = past + it.n_new;
            widen(q, rows * head_dim, queries, [](float element) { return element; });
            for (int64_t t = 0; t < tokens; t++) {
                const int64_t own = t - past;  // position among the new tokens
                widen(own < 0 ? it.tail_k.at(b, h, t) : it.k.at(b, h, own), head_dim, x, real<BF16>);
                const bool is_token = own < 0 || !it.valid || it.valid[b * it.n_new + own];
                for (int64_t row = 0; row < rows; row += it.n_new)
                    for (int64_t query = 0; query < it.n_new; query++) {
                        const bool seen = own == query || (own < query && is_token);
                        p[(row + query) * tokens + t] =
                            seen ? product(queries + (row + query) * head_dim, x, head_dim) * it.scale : -INFINITY;
                    }
            }
            for (int64_t row = 0; row < rows; row++) {
                double *scores = p + row * tokens, largest = -INFINITY;
                for (int64_t t = 0; t < tokens; t++) largest = larger(scores[t], largest);
                for (int64_t t = 0; t < tokens; t++) scores[t] = exp2_of(scores[t] - largest);
                sums[row] = 0;
                for (int64_t t = 0; t < tokens; t++) sums[row] += scores[t];
                lse_log2[row] = largest + log2_of(sums[row]);
            }
            std::fill_n(out, rows * head_dim, 0.0);
            for (int64_t t = 0; t < tokens; t++) {
                widen(t < past ? it.tail_v.at(b, h, t) : it.v.at(b, h, t - past), head_dim, x, real<BF16>);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t c = 0; c < head_dim; c++) out[row * head_dim + c] += p[row * tokens + t] * x[c];
            }
            for (int64_t row = 0; row < rows; row++)
                for (int64_t c = 0; c < head_dim; c++) out[row * head_dim + c] /= sums[row];
            q += rows * head_dim, out += rows * head_dim, lse_log2 += rows;
        }
}

VECTORS void attend_fp16(const Tail& it) { attend<false>(it); }
VECTORS void attend_bf16(const Tail& it) { attend<true>(it); }

VECTORS void exp2_all(const double* x, int64_t n, double* to) {
    for (int64_t i = 0; i < n; i++) to[i] = exp2_of(x[i]);
}

}  // namespace

extern "C" {

// What this library was compiled from.
const char* native_identity() { return NATIVE_IDENTITY; }

void native_exp2(const double* x, int64_t n, double* to) { exp2_all(x, n, to); }

void native_log2(const double* x, int64_t n, double* to) {
    for (int64_t i = 0; i < n; i++) to[i] = log2_of(x[i]);
}

// query.job_image. 0 if an element is not finite or too large, or where[i] is not among the n_queries; otherwise 1.
int64_t native_job_image(const void* q, int64_t is_double, const int64_t* where, int64_t n_queries, int64_t n_jobs,
                         int64_t width, int64_t head_dim, const uint8_t* front, int64_t front_bytes, int64_t n_zeros,
                         uint8_t* image) {
    if (!among(where, n_jobs, n_queries)) return 0;
    memcpy(image, front, front_bytes);
    image += front_bytes;
    memset(image, 0, n_jobs * head_dim * Q_RECORD + n_zeros);
    auto* records = reinterpret_cast<int32_t*>(image);
    if (is_double) return records_of(static_cast<const double*>(q), where, n_jobs, width, head_dim, records);
    return records_of(static_cast<const float*>(q), where, n_jobs, width, head_dim, records);
}

// Add partials, `bytes` from one to the next, to the sums of the jobs `where`; begin with the identity if `fresh`.
// 1; or, and nothing is added, 0 if one is not good, -1 if a job is not among the n_jobs.
int64_t native_fold(const uint8_t* partials, int64_t bytes, const int64_t* where, int64_t n_partials, int64_t fresh,
                    int64_t n_jobs, int64_t width, int64_t head_dim, int16_t* run_max, int64_t* limbs, int64_t* top) {
    const int64_t n_elements = 2 + head_dim, rows = (width + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    if (fresh) {
        std::fill_n(run_max, n_jobs * width, int16_t(RUN_MAX_EMPTY));
        std::fill_n(limbs, n_jobs * width * n_elements * N_LIMBS, 0);
        std::fill_n(top, n_jobs * width * n_elements, EMPTY_TOP);
    }
    if (!among(where, n_partials, n_jobs)) return -1;
    for (int64_t i = 0; i < n_partials; i++) {
        uint32_t status, tag;
        memcpy(&status, partials + i * bytes + PARTIAL_STATUS, sizeof status);
        memcpy(&tag, partials + i * bytes + PARTIAL_TAG, sizeof tag);
        if (status != STATUS_DONE || tag != i) return 0;
    }
    for (int64_t i = 0; i < n_partials; i++, partials += bytes)
        for (int64_t row = 0; row < width; row++) {
            const int64_t head = where[i] * width + row;
            int16_t its;
            memcpy(&its, partials + PARTIAL_RUN_MAX + row * sizeof its, sizeof its);
            run_max[head] = std::max(run_max[head], its);
            for (int64_t e = 0; e < n_elements; e++) {
                const int64_t to = head * n_elements + e;
                add(limbs + to * N_LIMBS, top[to], unpack(partials + PARTIAL_ELEMENTS + (e * rows + row) * WIDE_BYTES));
            }
        }
    return 1;
}

// tail.stored_form: patterns of float K, then V, (batch, heads, tokens, channels) each. 1 if all are finite.
int64_t native_patterns(const uint8_t* k, int64_t k0, int64_t k1, int64_t k2, const uint8_t* v, int64_t v0, int64_t v1,
                        int64_t v2, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, int64_t channels,
                        int64_t kv_type, uint16_t* to) {
    const bool bf16 = kv_type == KV_BF16;
    const uint16_t infinite = bf16 ? 0x7F80 : 0x7C00;
    bool finite = true;
    for (const Elements& x : {Elements{k, k0, k1, k2}, Elements{v, v0, v1, v2}})
        for (int64_t b = 0; b < batch; b++)
            for (int64_t h = 0; h < heads; h++)
                for (int64_t t = 0; t < tokens; t++, to += channels) {
                    const float* from = x.at<float>(b, h, t);
                    for (int64_t c = 0; c < head_dim; c++) {
                        to[c] = pattern(from[c], bf16);
                        finite &= (to[c] & infinite) != infinite;
                    }
                    std::fill(to + head_dim, to + channels, 0);
                }
    return finite;
}

void native_normalise(const int64_t* limbs, const int64_t* top, int64_t n_heads, int64_t head_dim, int64_t unit,
                      double* out, double* lse_log2) {
    for (int64_t i = 0; i < n_heads; i++, limbs += (2 + head_dim) * N_LIMBS, top += 2 + head_dim) {
        const Head head(limbs, top);
        for (int64_t c = 0; c < head_dim; c++) *out++ = head.out(c, unit);
        *lse_log2++ = head.lse_log2;
    }
}

// partial.Partial.combine
void native_combine(const int64_t* limbs, const int64_t* top, int64_t n_heads, int64_t head_dim, int64_t unit,
                    const double* other_out, const double* other_lse, float* out) {
    for (int64_t i = 0; i < n_heads; i++, limbs += (2 + head_dim) * N_LIMBS, top += 2 + head_dim) {
        const Head head(limbs, top);
        double largest = larger(other_lse[i], head.lse_log2);
        if (largest == -INFINITY) largest = 0;
        const double mine = exp2_of(head.lse_log2 - largest), its = exp2_of(other_lse[i] - largest);
        const double total = mine + its;
        for (int64_t c = 0; c < head_dim; c++, other_out++) {
            const double sum = head.out(c, unit) * mine + *other_out * its;
            *out++ = float(total == 0 ? 0 : sum / total);
        }
    }
}

// tail.attend: elements as Elements has them.
void native_attend(const float* q, const uint8_t* tail_k, int64_t tk0, int64_t tk1, int64_t tk2, const uint8_t* tail_v,
                   int64_t tv0, int64_t tv1, int64_t tv2, const uint8_t* k, int64_t k0, int64_t k1, int64_t k2,
                   const uint8_t* v, int64_t v0, int64_t v1, int64_t v2, const int64_t* tail_tokens,
                   const uint8_t* valid, int64_t batch, int64_t heads, int64_t group, int64_t n_new, int64_t head_dim,
                   int64_t kv_type, double scale, double* scratch, double* out, double* lse_log2) {
    int64_t most = 0;
    for (int64_t b = 0; b < batch; b++) most = std::max(most, tail_tokens[b] + n_new);
    const Tail tail = {q, {tail_k, tk0, tk1, tk2}, {tail_v, tv0, tv1, tv2}, {k, k0, k1, k2}, {v, v0, v1, v2},
                       tail_tokens, valid, batch, heads, group, n_new, head_dim, most, scale, scratch, out, lse_log2};
    kv_type == KV_BF16 ? attend_bf16(tail) : attend_fp16(tail);
}

}  // extern "C"
