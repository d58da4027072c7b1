# SPDX-License-Identifier: Apache-2.0
"""How wide the numbers are that stages of the gateware hand to each other: what the ABI makes them."""

from amaranth import signed
from amaranth.utils import exact_log2

from . import abi

LANES = abi.BLOCK_TOKENS  # elements of a beat
BEAT_BITS = 8 * abi.BEAT_BYTES
ELEMENT_BITS = BEAT_BITS // LANES
BURST_BEATS = abi.BURST_BYTES // abi.BEAT_BYTES
# Powers of two, for slices and shifts.
LANES_LOG2, TILE_LOG2 = exact_log2(LANES), exact_log2(abi.TILE_TOKENS)
CHANNEL_LOG2 = exact_log2(abi.MAX_HEAD_DIM)
BEAT_LOG2, BURST_LOG2 = exact_log2(abi.BEAT_BYTES), exact_log2(abi.BURST_BYTES)

ADDRESS = abi.PAGE_ENTRY["address"].bits
OFFSET = abi.JOB["partial"].bits  # in job memory
TAG = abi.JOB["tag"].bits
N_TOKENS = abi.PARTIAL_HEADER["n_tokens"].bits  # of a job
PAGE_TOKENS = abi.JOB["page_tokens"].bits
CRC = abi.PAGE_ENTRY["crc_k"].bits
COUNTER = abi.SUMMARY["cycles"].bits

KV_TYPE = range(len(abi.KvType))
SHIFT = signed(abi.JOB["score_shift"].bits)
MAX_PARTS = abi.MAX_HEAD_DIM // LANES
PARTS = range(MAX_PARTS + 1)  # blocks of V side by side: head_dim / 32
MAX_PAIRS = abi.MAX_ROWS // abi.ROW_STEP
PAIRS = range(MAX_PAIRS + 1)  # of query heads
PAGE = range(abi.MAX_TILES + 1)  # index in the page table, and one behind the last
CHANNEL = range(abi.MAX_HEAD_DIM)
TOKENS = range(abi.TILE_TOKENS + 1)  # of a tile
MAX_BLOCK_ROWS = max(abi.MAX_HEAD_DIM, abi.TILE_TOKENS)
ROW = range(MAX_BLOCK_ROWS)  # of a block: a channel of K, a token of V
ROWS = range(MAX_BLOCK_ROWS + 1)
MAX_BLOCKS = max(MAX_PARTS, abi.TILE_TOKENS // LANES)
BLOCKS = range(MAX_BLOCKS + 1)  # of a pass
VALID_LANES = range(LANES + 1)
