// SPDX-License-Identifier: Apache-2.0
// What the parts of the card `twin` share: twin.cpp walks jobs and pages, and hands tiles to one of the
// paths, which are twin_kernel.h compiled for different instruction sets.
//
// Header-only parts are kept out of here on purpose: a function compiled for AVX-512 must never be the
// one that the linker picks for everybody.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "twin_constants.h"  // generated from nearkv_hw.abi and nearkv_hw.number

namespace twin {

constexpr int MAX_PARTS = MAX_HEAD_DIM / BLOCK_TOKENS;
constexpr int LANES = BLOCK_TOKENS;
// Doubles from one row of weights to the next: enough for a tile and for a head, and not a multiple of
// 4096 bytes after few rows, which would crowd the rows into few sets of the cache.
constexpr int WEIGHT_STRIDE = (MAX_HEAD_DIM > TILE_TOKENS ? MAX_HEAD_DIM : TILE_TOKENS) + 8;
constexpr int NO_TOP = -(1 << 20);  // of a sum to which nothing was added

// What all tiles of a job share.
struct Query {
    int head_dim, kv_type, page_tokens;
    int heads;        // the rows of the group; the one that pads an odd group attends to nothing
    int scored_rows;  // with the one that pads if that has weights: what it scores may leave the range
    int64_t mantissa;
    int shift;
    int largest_exponent;                           // of all channels
    alignas(64) double weight[MAX_ROWS][WEIGHT_STRIDE];  // [row][channel]
    alignas(64) int64_t weight_52[MAX_ROWS][WEIGHT_STRIDE];  // the same modulo 2^52
    double weight_sum[MAX_ROWS];
    alignas(64) int32_t exponent[MAX_HEAD_DIM];
    // How far below the largest they lie, in units of an element's exponent, as 16 bits twice.
    alignas(64) uint32_t below_largest[MAX_HEAD_DIM];
};

// Exact sums of 32 lanes in the format of number.Wide, all under one top. Limbs 0 and 2 are the low and
// the high half of `even`, limbs 1 and 3 of `odd`: what a 64-bit product falls into with two masks.
struct BlockSum {
    alignas(64) uint64_t even[LANES];
    uint64_t odd[LANES];
    int top;
};

// The running sums of one job, or of a part of its tiles.
struct Sums {
    BlockSum out[MAX_ROWS][MAX_PARTS];
    BlockSum denominators[MAX_ROWS];  // lane 0: run_sum, lane 1: run_sum_wide
    int run_max[MAX_ROWS];
    bool saturated;
};

// CRC-32C of more bytes, given that of those before.
using Crc = uint32_t (*)(uint32_t crc, const uint8_t* data, size_t n);

struct Tile {
    const uint16_t* k;  // [block][channel][32]
    const uint16_t* v;  // of the first part; the next is page_tokens * 32 elements further
    const uint16_t* next_k;  // of the tile that will follow, to fetch it from memory in time; or null
    int tokens;
    Crc crc;  // for paths that have none of their own
    // Found by the path.
    bool non_finite;
    uint32_t crc_k, crc_v;
};

// What a thread needs while it computes a tile.
struct Scratch {
    static constexpr int MAX_BLOCK_ROWS = MAX_HEAD_DIM > TILE_TOKENS ? MAX_HEAD_DIM : TILE_TOKENS;
    // Of a block's rows: what an element of exponent field 0 is shifted right by, and the same as a factor.
    alignas(64) int32_t base[MAX_BLOCK_ROWS];
    alignas(64) float scale[MAX_BLOCK_ROWS];
    alignas(64) float x[MAX_BLOCK_ROWS * LANES];
    alignas(64) int64_t raw[MAX_ROWS][TILE_TOKENS];  // S, then the scores
    alignas(64) int64_t o[MAX_ROWS][LANES];
    int tile_max[MAX_ROWS];
    // p of a tile is mantissa * 2^(-16 - halvings).
    alignas(64) int32_t twice_mantissa[MAX_ROWS][TILE_TOKENS];
    alignas(64) int16_t halvings[MAX_ROWS][TILE_TOKENS];
    // Of V's rows: the largest magnitude of the 32 elements, as bits, and its exponent field.
    alignas(64) int16_t largest[TILE_TOKENS], field[TILE_TOKENS];
    // Of the V block at hand: the largest exponent of a product, for each row; and the weights, which fit
    // every block in which these lie as far above the first row's.
    int exponent[MAX_ROWS], above_first[MAX_ROWS];
    alignas(64) double p[MAX_ROWS][WEIGHT_STRIDE];  // [row][token]; as int64 on some paths
    double p_sum[MAX_ROWS];
    alignas(64) int16_t lowest[TILE_TOKENS];  // of all rows, halvings plus above_first
};

struct Path {
    const char* name;
    bool (*supported)();
    // K of a tile: from elements to the weights p and their sums. V of a tile: p V, added to the sums.
    void (*scores)(const Query&, Tile&, Scratch&, Sums&);
    void (*values)(const Query&, Tile&, Scratch&, Sums&);
};

extern const Path IFMA, AVX512, AVX2, PORTABLE;
uint32_t crc_portable(uint32_t crc, const uint8_t* data, size_t n);
uint32_t crc_sse42(uint32_t crc, const uint8_t* data, size_t n);
uint32_t crc_avx512(uint32_t crc, const uint8_t* data, size_t n);
bool crc_sse42_supported();
bool crc_avx512_supported();
// x^n modulo the polynomial, in the bit order of a CRC (bit 31 is x^0).
uint32_t crc_power(uint64_t n);
uint32_t crc_multiply(uint32_t a, uint32_t b);

}  // namespace twin
