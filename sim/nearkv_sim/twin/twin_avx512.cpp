// SPDX-License-Identifier: Apache-2.0
// The paths of the card `twin` for x86-64 processors with AVX-512 (F, BW, DQ, VL), without and with IFMA
// and its contemporaries, and CRC-32C with carry-less multiplications of 512 bits.

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,sse4.2,vpclmulqdq,avx512ifma,avx512vbmi,prefer-vector-width=512")
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
    template <bool>
    static F32 round(F32 element, F32 scale) { return _mm512_fmadd_ps(element, scale, all<F32>(BIAS)); }
    static void widen(const float* x, F64 to[2]) {
        to[0] = _mm512_cvtps_pd(_mm256_load_ps(x));
        to[1] = _mm512_cvtps_pd(_mm256_load_ps(x + 8));
    }
    static F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
    static I64 to_int(F64 a) { return (I64)_mm512_cvtpd_epi64(a); }
    static I64 shift_right(I64 a, int n) { return (I64)_mm512_sra_epi64((__m512i)a, _mm_cvtsi32_si128(n)); }
    static I64 shift_right(I64 a, I64 n) { return (I64)_mm512_srlv_epi64((__m512i)a, (__m512i)n); }
    static I32 shift_right_32(I32 a, I32 n) { return (I32)_mm512_srlv_epi32((__m512i)a, (__m512i)n); }
    static I64 multiply_32(I64 a, I64 b) { return (I64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
    static I16 larger_16(I16 a, I16 b) { return (I16)_mm512_max_epi16((__m512i)a, (__m512i)b); }
    static I16 smaller_16(I16 a, I16 b) { return (I16)_mm512_min_epi16((__m512i)a, (__m512i)b); }
    static int16_t largest_16(I16 a) {
        const __m256i b = _mm256_max_epi16(_mm512_castsi512_si256((__m512i)a), _mm512_extracti64x4_epi64((__m512i)a, 1));
        // The instruction finds the smallest of unsigned numbers.
        const __m128i c = _mm_max_epi16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
        const __m128i mirrored = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(INT16_MAX), c));
        return static_cast<int16_t>(INT16_MAX - _mm_extract_epi16(mirrored, 0));
    }
    static I16 halve_128(I16 a, I16 b) {
        return larger_16((I16)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b),
                         (I16)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
    }
    static I16 halve_64(I16 a, I16 b) {
        return larger_16((I16)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88),
                         (I16)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD));
    }
    static int32_t total_32(I32 a) { return _mm512_reduce_add_epi32((__m512i)a); }
    static void store_32(int32_t* to, I64 a) { _mm256_store_si256((__m256i*)to, _mm512_cvtepi64_epi32((__m512i)a)); }
    static void store_16(int16_t* to, I64 a) { _mm_store_si128((__m128i*)to, _mm512_cvtepi64_epi16((__m512i)a)); }
    static I32 widen_16(I16Half a) { return (I32)_mm512_cvtepi16_epi32((__m256i)a); }
    template <class>
    static I16 halve_32(I16 a, I16 b) {
        constexpr __mmask32 high = 0xAAAAAAAA;
        const __m512i one = _mm512_mask_blend_epi16(high, (__m512i)a, (__m512i)b);
        const __m512i other = _mm512_mask_blend_epi16(high, (__m512i)b, (__m512i)a);
        return larger_16((I16)one, (I16)_mm512_rol_epi32(other, 16));
    }
    static I16 join(const I16 eighths[4]) {
        auto halve_256 = [](__m512i a, __m512i b) {
            return (__m512i)larger_16((I16)_mm512_shuffle_i64x2(a, b, 0x44), (I16)_mm512_shuffle_i64x2(a, b, 0xEE));
        };
        const __m512i a = halve_256((__m512i)eighths[0], (__m512i)eighths[1]);
        const __m512i b = halve_256((__m512i)eighths[2], (__m512i)eighths[3]);
        return larger_16((I16)_mm512_shuffle_i64x2(a, b, 0x88), (I16)_mm512_shuffle_i64x2(a, b, 0xDD));
    }
    template <class>
    static void store_weights(double* to, I32 p) {
        _mm512_store_pd(to, _mm512_cvtepi32_pd(_mm512_castsi512_si256((__m512i)p)));
        _mm512_store_pd(to + 8, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64((__m512i)p, 1)));
    }
    static I16 add_saturating(I16 a, I16 b) { return (I16)_mm512_adds_epi16((__m512i)a, (__m512i)b); }
    static int64_t total(I64 a) { return _mm512_reduce_add_epi64((__m512i)a); }
    static int64_t largest(I64 a) { return _mm512_reduce_max_epi64((__m512i)a); }
    template <class>
    static bool exceeds(I64 a, int64_t limit) {
        return _mm512_cmpgt_epi64_mask((__m512i)a, _mm512_set1_epi64(limit));
    }
    static I64 look_up(const int64_t* table, I64 index) {
        static_assert(1 << EXP2_SEGMENT_BITS == 16);
        // All sixteen fit two registers.
        return (I64)_mm512_permutex2var_epi64(_mm512_load_si512(table), (__m512i)index,
                                              _mm512_load_si512(table + 8));
    }
};

// CRC-32C with carry-less multiplications of 512 bits: four remainders of four times 128 bits, into which
// 256 more bytes are folded at a time.
class Folded {
  public:
    static constexpr size_t BYTES = 256;

    explicit Folded(uint32_t crc) {
        past_ = _mm512_load_si512(factors().by_2048);
        for (__m512i& sum : sum_) sum = _mm512_setzero_si512();
        // The powers of x repeat after 2^31 - 1; so this is what BYTES more move to the beginning.
        static const uint32_t before = crc_power(INT32_MAX - 8 * BYTES), of_empty = crc_multiply(~0u, before);
        sum_[0] = _mm512_zextsi128_si512(_mm_cvtsi32_si128(crc ? crc_multiply(~crc, before) : of_empty));
    }

    TWIN_INLINE_MEMBER void add(const I16 data[4]) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum_[i] = fold(sum_[i], past_, (__m512i)data[i]);
    }

    uint32_t end() const {
        __m512i sum = sum_[0], past = _mm512_load_si512(factors().by_512);
        for (int i = 1; i < 4; i++) sum = fold(sum, past, sum_[i]);
        alignas(64) uint8_t rest[64];
        _mm512_store_si512(rest, sum);
        return crc_sse42(~0u, rest, sizeof rest);
    }

  private:
    struct Factors {
        alignas(64) uint64_t by_2048[8], by_512[8];
    };

    // Past so many more bits. In the bit order of a CRC the product of two 64-bit numbers comes out one x
    // too high in 128 bits, and the earlier 64 bits are x^64 higher.
    static __m512i past(int bits) {
        uint64_t earlier = uint64_t(crc_power(bits + 64 - 1)) << 32, later = uint64_t(crc_power(bits - 1)) << 32;
        return _mm512_broadcast_i32x4(_mm_set_epi64x(later, earlier));
    }

    static const Factors& factors() {
        static const Factors known = [] {
            Factors f;
            _mm512_store_si512(f.by_2048, past(2048));
            _mm512_store_si512(f.by_512, past(512));
            return f;
        }();
        return known;
    }

    static __m512i fold(__m512i value, __m512i factors, __m512i next) {
        return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, factors, 0x00),
                                         _mm512_clmulepi64_epi128(value, factors, 0x11), next, 0x96);
    }

    __m512i sum_[4], past_;
};

// With sums as integers modulo 2^52: widening an element then is a shift at most. The bits of the float
// x + BIAS, read as an integer, are x + BIAS_BITS.
struct Ifma : Avx512 {
    using Sum = I64;
    static constexpr int ROWS_SCALED = 8, FEW_ROWS = 2;
    template <int MANTISSA_BITS>
    static F32 load(const uint16_t* p) {
        if constexpr (MANTISSA_BITS != BF16.mantissa_bits) return Avx512::load<MANTISSA_BITS>(p);
        // Each element over two bytes of zeros.
        const I32 order = I32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x02020202 + 0x01000000;
        const __m512i row = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
        return (F32)_mm512_maskz_permutexvar_epi8(0xCCCCCCCCCCCCCCCC, (__m512i)order, row);
    }
    // Where the multipliers are busy, two additions align: one of exponents, nudge included, and one of
    // the bias; the bias is larger, so that no exponent falls below 0 before.
    static constexpr int MARGIN = 64;
    static constexpr int32_t BIAS_BITS = Generic::BIAS_BITS + (MARGIN << 23);
    static constexpr int LARGEST_POWER = 126 - MARGIN, LARGEST_BINADE = MARGIN - 4;
    template <bool FEW, class>
    static I32 scale(I32 k) { return (larger(k + MARGIN, I32{}) + (FEW ? 127 : 0)) << 23 | SCALE_NUDGE; }
    template <bool FEW>
    static F32 round(F32 element, F32 scale) {
        const F32 bias = (F32)all<I32>(BIAS_BITS);
        return FEW ? (F32)_mm512_fmadd_ps(element, scale, bias) : (F32)((I32)element + (I32)scale) + bias;
    }
    static const double* query_weights(const Query& query) { return (const double*)query.weight_52[0]; }
    template <class>
    static void store_weights(double* to, I32 p) {
        _mm512_store_si512(to, _mm512_cvtepu32_epi64(_mm512_castsi512_si256((__m512i)p)));
        _mm512_store_si512(to + 8, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64((__m512i)p, 1)));
    }
    static I64 start(double weight_sum) { return all<I64>(-int64_t(BIAS_BITS) * static_cast<int64_t>(weight_sum)); }
    static I64 weight(const double* p) { return all<I64>(*(const int64_t*)p); }
    // Even lanes, under the low 20 bits of their odd neighbours; odd lanes. What the neighbours add is
    // 2^32 times their own sum, modulo 2^52; so `narrow` can take it off again.
    static_assert(BIAS_BITS % (1 << 20) == 0, "the odd sums start at another multiple of 2^20");
    static void widen(F32 x, I64 to[2]) { to[0] = (I64)x, to[1] = (I64)((U64)x >> 32); }
    static void widen(const float* x, I64 to[2]) { widen(*(const F32*)x, to); }
    static I64 multiply_add(I64 a, I64 b, I64 c) {
        return (I64)_mm512_madd52lo_epu64((__m512i)c, (__m512i)a, (__m512i)b);
    }
    template <class>
    static void narrow(const I64 sum[2], I64* low, I64* high) {
        const I64 even = (sum[0] - (sum[1] << 32)) << 12 >> 12, odd = sum[1] << 12 >> 12;
        const I64 first = {0, 8, 1, 9, 2, 10, 3, 11}, last = {4, 12, 5, 13, 6, 14, 7, 15};
        *low = (I64)_mm512_permutex2var_epi64((__m512i)even, (__m512i)first, (__m512i)odd);
        *high = (I64)_mm512_permutex2var_epi64((__m512i)even, (__m512i)last, (__m512i)odd);
    }
    // The high half of a product of 104 bits.
    template <class>
    static I64 interpolate(I64 a, I64 b, I64 u) {
        return (I64)_mm512_madd52hi_epu64((__m512i)a, (__m512i)b, (__m512i)(u << (52 - U_BITS)));
    }

    class Checksum {
      public:
        explicit Checksum(Crc) : sum_(0) {}
        void part(const uint16_t*, int) {}
        TWIN_INLINE_MEMBER void rows(const I16* rows) { sum_.add(rows); }
        void rest(const uint16_t* rows, int n) {
            if (n) sum_ = Folded(crc_sse42(sum_.end(), (const uint8_t*)rows, n * sizeof(I16)));
        }
        uint32_t end() const { return sum_.end(); }

      private:
        static_assert(STRIDE * sizeof(I16) == Folded::BYTES);
        Folded sum_;
    };
};

}  // namespace

const Path AVX512 = {
    "avx512",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    },
    scores<Avx512>, values<Avx512>};

const Path IFMA = {"ifma", [] { 
        return crc_avx512_supported() && __builtin_cpu_supports("avx512ifma") &&
               __builtin_cpu_supports("avx512vbmi");
    },
                   scores<Ifma>, values<Ifma>};

bool crc_avx512_supported() {
    return AVX512.supported() && crc_sse42_supported() && __builtin_cpu_supports("vpclmulqdq");
}

uint32_t crc_avx512(uint32_t crc, const uint8_t* data, size_t n) {
    if (n < 2 * Folded::BYTES) return crc_sse42(crc, data, n);
    Folded sum(crc);
    for (; n >= Folded::BYTES; data += Folded::BYTES, n -= Folded::BYTES) {
        I16 rows[4];
        for (int i = 0; i < 4; i++) rows[i] = (I16)_mm512_loadu_si512(data + 64 * i);
        sum.add(rows);
    }
    return crc_sse42(sum.end(), data, n);
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
