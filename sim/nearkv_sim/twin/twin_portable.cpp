// SPDX-License-Identifier: Apache-2.0
// The path of the card `twin` for any processor: vectors of 16 bytes, as the compiler can best do them.

#define SIMD_BYTES 16
#include "twin_kernel.h"

namespace twin {
namespace {

struct Portable : Generic {
    static constexpr int ACCUMULATORS = 8, ROWS_AT_ONCE = 4;
    static constexpr int SCALE_NUDGE = 0;
    typedef float Pair __attribute__((vector_size(8), may_alias));
    typedef uint16_t Half __attribute__((vector_size(8), may_alias, aligned(2)));

    template <int MANTISSA_BITS>
    static F32 load(const uint16_t* p) {
        I32 bits = __builtin_convertvector(*(const Half*)p, I32);
        if constexpr (MANTISSA_BITS == BF16.mantissa_bits) return (F32)(bits << 16);
        F32 magnitude = (F32)((bits & 0x7FFF) << 13) * 0x1p112f;  // the exponents' biases differ by 112
        return (F32)((I32)magnitude | (bits & 0x8000) << 16);
    }
    // Half away from zero: half an odd number of the last place is exact in a float up to 2^22.
    template <bool>
    static F32 round(F32 element, F32 scale) {
        F32 x = element * scale;
        F32 half = (F32)(((I32)x & INT32_MIN) | (I32)all<F32>(0.5f));
        return __builtin_convertvector(__builtin_convertvector(x + half, I32), F32) + BIAS;
    }
    static void widen(const float* x, F64 to[2]) {
        for (int i = 0; i < 2; i++) to[i] = __builtin_convertvector(((const Pair*)x)[i], F64);
    }
    static I64 look_up(const int64_t* table, I64 index) {
        return I64{table[index[0] & 15], table[index[1] & 15]};
    }
};

// Eight tables: one for each byte of a word.
struct CrcTables {
    uint32_t entry[8][256];
    CrcTables() {
        for (uint32_t byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++)
                // The byte's bit b stands for x^(7 - b); then 32 + 8 i zeros follow.
                entry[i][byte] = crc_multiply(byte << 24, crc_power(32 + 8 * i));
    }
};

}  // namespace

const Path PORTABLE = {"portable", [] { return true; }, scores<Portable>, values<Portable>};

uint32_t crc_portable(uint32_t crc, const uint8_t* data, size_t n) {
    static const CrcTables tables;
    const auto& entry = tables.entry;
    crc = ~crc;
    for (; n >= 8; n -= 8, data += 8) {
        uint64_t word;
        __builtin_memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int i = 0; i < 8; i++) crc ^= entry[7 - i][word >> 8 * i & 0xFF];
    }
    for (; n; n--, data++) crc = entry[0][(crc ^ *data) & 0xFF] ^ crc >> 8;
    return ~crc;
}

}  // namespace twin
