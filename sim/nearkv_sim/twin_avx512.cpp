// SPDX-License-Identifier: Apache-2.0
// The paths of the card `twin` for x86-64 processors with AVX-512 (F, BW, DQ, VL), without and with IFMA,
// and CRC-32C with carry-less multiplications of 512 bits.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,sse4.2,vpclmulqdq,avx512ifma,prefer-vector-width=512")
#include <immintrin.h>
#endif

#include "twin.h"

#if defined(__x86_64__)

#define SIMD_BYTES 64
#include "twin_kernel.h"

namespace twin {
namespace {

struct Avx512 : Generic {
    static constexpr int ACCUMULATORS = 24, ROWS_AT_ONCE = 8;
    static constexpr int SCALE_NUDGE = 1;  // see twin_avx2.cpp

    template <int MANTISSA_BITS>
    static F32 load(const uint16_t* p) {
        __m256i bits = _mm256_loadu_si256((const __m256i*)p);
        if constexpr (MANTISSA_BITS == BF16.mantissa_bits)
            return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        return _mm512_cvtph_ps(bits);
    }
    static F32 round(F32 element, F32 scale) { return _mm512_fmadd_ps(element, scale, all<F32>(BIAS)); }
    static F64 widen(const float* p) { return _mm512_cvtps_pd(_mm256_load_ps(p)); }
    static F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
    static I64 to_int(F64 a) { return (I64)_mm512_cvtpd_epi64(a); }
    static F64 p_weight(I64 p) { return _mm512_cvtepi64_pd((__m512i)p); }
    static I64 shift_right(I64 a, int n) { return (I64)_mm512_sra_epi64((__m512i)a, _mm_cvtsi32_si128(n)); }
    static I64 shift_right(I64 a, I64 n) { return (I64)_mm512_srlv_epi64((__m512i)a, (__m512i)n); }
    static I64 multiply_32(I64 a, I64 b) { return (I64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
    static I16 larger_16(I16 a, I16 b) { return (I16)_mm512_max_epi16((__m512i)a, (__m512i)b); }
    static I64 look_up(const int64_t* table, I64 index) {
        static_assert(1 << EXP2_SEGMENT_BITS == 16);
        // All sixteen fit two registers.
        return (I64)_mm512_permutex2var_epi64(_mm512_load_si512(table), (__m512i)index,
                                              _mm512_load_si512(table + 8));
    }
};

// Sums as integers modulo 2^52: widening an element then takes one operation instead of two. The bits of
// the float x + BIAS, read as an integer, are x + BIAS_BITS.
struct Ifma : Avx512 {
    using Sum = I64;
    static constexpr int64_t BIAS_BITS = 0x4B400000;
    static const double* query_weights(const Query& query) { return (const double*)query.weight_52[0]; }
    static F64 p_weight(I64 p) { return (F64)p; }
    static I64 start(double weight_sum) { return all<I64>(-BIAS_BITS * static_cast<int64_t>(weight_sum)); }
    static I64 weight(const double* p) { return all<I64>(*(const int64_t*)p); }
    static I64 widen(const float* p) {
        return (I64)_mm512_cvtepu32_epi64(_mm256_load_si256((const __m256i*)p));
    }
    static I64 multiply_add(I64 a, I64 b, I64 c) {
        return (I64)_mm512_madd52lo_epu64((__m512i)c, (__m512i)a, (__m512i)b);
    }
    static F64 end(I64 sum) { return _mm512_cvtepi64_pd((__m512i)(sum << 12 >> 12)); }
};

// value * x^bits, for four remainders of 128 bits; the factors are those of `Fold`.
__m512i fold(__m512i value, __m512i factors, __m512i next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, factors, 0x00),
                                     _mm512_clmulepi64_epi128(value, factors, 0x11), next, 0x96);
}

// Factors that move 128 bits past `bits` more bits. In the bit order of a CRC the product of two 64-bit
// numbers comes out one x too high in 128 bits, and the earlier 64 bits are x^64 higher.
__m512i fold_factors(int bits) {
    uint64_t earlier = uint64_t(crc_power(bits + 64 - 1)) << 32, later = uint64_t(crc_power(bits - 1)) << 32;
    return _mm512_broadcast_i32x4(_mm_set_epi64x(later, earlier));
}

struct FoldFactors {
    alignas(64) uint64_t by_2048[8], by_512[8];
};

}  // namespace

const Path AVX512 = {
    "avx512",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    },
    scores<Avx512>, values<Avx512>};

const Path IFMA = {"ifma", [] { return AVX512.supported() && __builtin_cpu_supports("avx512ifma"); },
                   scores<Ifma>, values<Ifma>};

bool crc_avx512_supported() {
    return AVX512.supported() && crc_sse42_supported() && __builtin_cpu_supports("vpclmulqdq");
}

uint32_t crc_avx512(uint32_t crc, const uint8_t* data, size_t n) {
    if (n < 512) return crc_sse42(crc, data, n);
    static const FoldFactors factors = [] {
        FoldFactors f;
        _mm512_store_si512(f.by_2048, fold_factors(2048));
        _mm512_store_si512(f.by_512, fold_factors(512));
        return f;
    }();
    __m512i sum[4], by_2048 = _mm512_load_si512(factors.by_2048);
    for (int i = 0; i < 4; i++) sum[i] = _mm512_loadu_si512(data + 64 * i);
    sum[0] = _mm512_xor_si512(sum[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(~crc)));
    for (data += 256, n -= 256; n >= 256; data += 256, n -= 256)
        for (int i = 0; i < 4; i++) sum[i] = fold(sum[i], by_2048, _mm512_loadu_si512(data + 64 * i));
    __m512i by_512 = _mm512_load_si512(factors.by_512);
    for (int i = 1; i < 4; i++) sum[i] = fold(sum[i - 1], by_512, sum[i]);
    alignas(64) uint8_t rest[64];
    _mm512_store_si512(rest, sum[3]);
    crc = ~crc_sse42(~0u, rest, sizeof rest);
    return crc_sse42(~crc, data, n);
}

}  // namespace twin

#else

namespace twin {
const Path AVX512 = {"avx512", [] { return false; }, nullptr, nullptr};
const Path IFMA = {"ifma", [] { return false; }, nullptr, nullptr};
bool crc_avx512_supported() { return false; }
uint32_t crc_avx512(uint32_t crc, const uint8_t*, size_t) { return crc; }
}  // namespace twin

#endif
