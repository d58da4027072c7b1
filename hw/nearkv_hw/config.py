# SPDX-License-Identifier: Apache-2.0
"""What can be chosen when the accelerator is built, and the named choices."""

from dataclasses import asdict, dataclass
import json
import zlib

from . import abi

# Bursts under way on a read or a write channel, at most: the masters hold it, and the packaging
# announces it (NUM_READ_OUTSTANDING). AMD's RTL kernel wizard has 32 too.
OUTSTANDING_BURSTS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """One build of the accelerator. What a job asks for at run time stays below these limits.

    Parameters
    ----------
    name : str
        Name of the preset, part of file names.
    rows : int
        Query heads the array serves at once (the largest group_size). Even, 2 .. 14.
    max_head_dim : int
        Largest head_dim. A multiple of 32, up to `abi.MAX_HEAD_DIM`.
    beat_fifo_beats : int
        Beats between the read master and the datapath, those on their way included. A power of two.
        It holds a whole block while its largest exponent is found, so it needs at least twice
        `max_head_dim`; what is left of it beyond a block and a burst is the latency in cycles that
        it covers without a pause: 1024 cover 600 at any head_dim.
    lookahead_tiles : int
        K tiles that stream ahead of the V tile they precede, 1 to 3: the tile times that the softmax
        has to finish. At rows = 8 and head_dim 64 it is as busy as the array, and short tiles of
        short jobs even out only over three.
    """

    name: str
    rows: int
    max_head_dim: int = abi.MAX_HEAD_DIM
    beat_fifo_beats: int = 1024
    lookahead_tiles: int = 3

    def __post_init__(self):
        if self.rows % abi.ROW_STEP or not 0 < self.rows <= abi.MAX_ROWS:
            raise ValueError(f"rows must be even and 2 .. {abi.MAX_ROWS}, not {self.rows}")
        abi.check_head_dim(self.max_head_dim)
        beats = self.beat_fifo_beats
        if beats & (beats - 1) or beats < 2 * max(abi.TILE_TOKENS, self.max_head_dim):
            raise ValueError(
                f"beat_fifo_beats must be a power of two of at least {2 * abi.TILE_TOKENS} and twice "
                f"max_head_dim ({2 * self.max_head_dim}), not {beats}"
            )
        if self.lookahead_tiles not in (1, 2, 3):
            raise ValueError(f"lookahead_tiles must be 1 to 3, not {self.lookahead_tiles}")

    @property
    def hash32(self) -> int:
        """Identity of the build: CRC-32 of its canonical JSON. Readable on the card."""
        text = json.dumps({"abi": abi.ABI_VERSION, **asdict(self)}, sort_keys=True)
        return zlib.crc32(text.encode())


PRESETS = {
    preset.name: preset
    for preset in (
        # Small enough for Amaranth's own simulator.
        Config(name="tiny", rows=2, max_head_dim=64, beat_fifo_beats=256),
        # SmartSSD (Kintex UltraScale+ KU15P): GQA groups up to 8 at one beat a cycle.
        Config(name="smartssd", rows=8),
    )
}


def preset(name: str) -> Config:
    """The named configuration.

    Raises
    ------
    ValueError
        If there is none of that name; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(PRESETS)
        raise ValueError(f"no configuration {name!r}; choose one of {known}") from None
