// SPDX-License-Identifier: Apache-2.0
// The path of the card `twin` for x86-64 processors with AVX2, and CRC-32C with SSE 4.2.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,sse4.2,pclmul")
#include <immintrin.h>
#endif

#include "twin.h"

#if defined(__x86_64__)

#define SIMD_BYTES 32
#include "twin_kernel.h"

namespace twin {
namespace {

// The instruction finds the smallest of unsigned numbers.
TWIN_INLINE int16_t largest_of_8(__m128i a) {
    const __m128i mirror = _mm_set1_epi16(INT16_MAX);
    return static_cast<int16_t>(INT16_MAX - _mm_extract_epi16(_mm_minpos_epu16(_mm_sub_epi16(mirror, a)), 0));
}

struct Avx2 : Generic {
    static constexpr int ACCUMULATORS = 12, ROWS_AT_ONCE = 6;
    // One unit more than 2^k: a tie between two integers then lies beyond the middle and is rounded away
    // from zero. Elements have few enough bits that nothing else changes.
    static constexpr int SCALE_NUDGE = 1;

    template <int MANTISSA_BITS>
    static F32 load(const uint16_t* p) {
        __m128i bits = _mm_loadu_si128((const __m128i*)p);
        if constexpr (MANTISSA_BITS == BF16.mantissa_bits)
            return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
        return _mm256_cvtph_ps(bits);
    }
    template <bool>
    static F32 round(F32 element, F32 scale) { return _mm256_fmadd_ps(element, scale, all<F32>(BIAS)); }
    static void widen(const float* x, F64 to[2]) {
        to[0] = _mm256_cvtps_pd(_mm_load_ps(x));
        to[1] = _mm256_cvtps_pd(_mm_load_ps(x + 4));
    }
    static F64 multiply_add(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
    static I64 multiply_32(I64 a, I64 b) { return (I64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
    static I64 shift_right(I64 a, int n) { return Generic::shift_right(a, n); }
    static I64 shift_right(I64 a, I64 n) { return (I64)_mm256_srlv_epi64((__m256i)a, (__m256i)n); }
    static I32 shift_right_32(I32 a, I32 n) { return (I32)_mm256_srlv_epi32((__m256i)a, (__m256i)n); }
    static I16 larger_16(I16 a, I16 b) { return (I16)_mm256_max_epi16((__m256i)a, (__m256i)b); }
    static I16 smaller_16(I16 a, I16 b) { return (I16)_mm256_min_epi16((__m256i)a, (__m256i)b); }
    static int16_t largest_16(I16 a) {
        return largest_of_8(_mm_max_epi16(_mm256_castsi256_si128((__m256i)a),
                                          _mm256_extracti128_si256((__m256i)a, 1)));
    }
    static I16 halve_128(I16 a, I16 b) {
        return larger_16((I16)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b),
                         (I16)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
    }
    static I16 halve_64(I16 a, I16 b) {
        return larger_16((I16)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88),
                         (I16)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD));
    }
    static I16 join(const I16 eighths[2]) {
        const __m256i a = (__m256i)eighths[0], b = (__m256i)eighths[1];
        return larger_16((I16)_mm256_permute2x128_si256(a, b, 0x20), (I16)_mm256_permute2x128_si256(a, b, 0x31));
    }
    static __m128i narrow_32(I64 a) {
        return _mm256_castsi256_si128(
            _mm256_permutevar8x32_epi32((__m256i)a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
    }
    static void store_32(int32_t* to, I64 a) { _mm_store_si128((__m128i*)to, narrow_32(a)); }
    static void store_16(int16_t* to, I64 a) {
        const __m128i b = narrow_32(a);
        _mm_storel_epi64((__m128i*)to, _mm_packs_epi32(b, b));
    }
    static I32 widen_16(I16Half a) { return (I32)_mm256_cvtepi16_epi32((__m128i)a); }
    template <class>
    static void store_weights(double* to, I32 p) {
        _mm256_store_pd(to, _mm256_cvtepi32_pd(_mm256_castsi256_si128((__m256i)p)));
        _mm256_store_pd(to + 4, _mm256_cvtepi32_pd(_mm256_extracti128_si256((__m256i)p, 1)));
    }
    static I16 add_saturating(I16 a, I16 b) { return (I16)_mm256_adds_epi16((__m256i)a, (__m256i)b); }
    static I64 look_up(const int64_t* table, I64 index) {
        return (I64)_mm256_i64gather_epi64((const long long*)table, (__m256i)(index & 15), 8);
    }
};

// CRCs of three streams of BYTES at once, because the instruction's latency is three cycles.
template <int BYTES>
uint32_t crc_triples(uint32_t crc, const uint8_t*& data, size_t& n) {
    // The product of two 32-bit remainders in 64 bits is one x too high, the instruction adds x^32.
    static const uint32_t skip_one = crc_power(8 * BYTES - 33), skip_two = crc_power(16 * BYTES - 33);
    for (; n >= 3 * BYTES; n -= 3 * BYTES, data += 3 * BYTES) {
        uint64_t a = crc, b = 0, c = 0;
        for (int i = 0; i < BYTES; i += 8) {
            uint64_t word[3];
            for (int j = 0; j < 3; j++) __builtin_memcpy(&word[j], data + j * BYTES + i, 8);
            a = _mm_crc32_u64(a, word[0]);
            b = _mm_crc32_u64(b, word[1]);
            c = _mm_crc32_u64(c, word[2]);
        }
        __m128i first = _mm_clmulepi64_si128(_mm_cvtsi64_si128(a), _mm_cvtsi32_si128(skip_two), 0);
        __m128i second = _mm_clmulepi64_si128(_mm_cvtsi64_si128(b), _mm_cvtsi32_si128(skip_one), 0);
        uint64_t both = _mm_cvtsi128_si64(_mm_xor_si128(first, second));
        crc = static_cast<uint32_t>(_mm_crc32_u64(0, both) ^ c);
    }
    return crc;
}

}  // namespace

const Path AVX2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
    scores<Avx2>, values<Avx2>};

bool crc_sse42_supported() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"); }

uint32_t crc_sse42(uint32_t crc, const uint8_t* data, size_t n) {
    crc = ~crc;
    crc = crc_triples<1024>(crc, data, n);
    crc = crc_triples<128>(crc, data, n);
    for (; n >= 8; n -= 8, data += 8) {
        uint64_t word;
        __builtin_memcpy(&word, data, 8);
        crc = static_cast<uint32_t>(_mm_crc32_u64(crc, word));
    }
    for (; n; n--, data++) crc = _mm_crc32_u8(crc, *data);
    return ~crc;
}

}  // namespace twin

#else

namespace twin {
const Path AVX2 = {"avx2", [] { return false; }, nullptr, nullptr};
bool crc_sse42_supported() { return false; }
uint32_t crc_sse42(uint32_t crc, const uint8_t*, size_t) { return crc; }
}  // namespace twin

#endif
