# SPDX-License-Identifier: Apache-2.0
"""Card `twin`: the accelerator on the processor, bit for bit, as fast as a SmartSSD's flash.

The work is done by `twin.cpp` and its neighbours, which setup.py compiles into `nearkv_sim.twin._native` when
the package is installed. Their constants are generated here from `nearkv_hw.abi` and
`nearkv_hw.number`; nothing is written down twice. Which instructions are used is decided at run time.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
import time

import numpy as np

from nearkv_hw import abi, number
from nearkv_hw.abi import KvType, Status
from nearkv_hw.config import Config

from ..lifetime import Lifetime

PATHS = ("ifma", "avx512", "avx2", "portable")
_FOLDER = Path(__file__).parent
SOURCES = ("twin.cpp", "twin_avx512.cpp", "twin_avx2.cpp", "twin_portable.cpp")
HEADERS = ("twin.h", "twin_kernel.h")

# Python sees Ctrl-C and the clock between slices.
_SLICE_S = 0.1
# Of K and V: when another thread has woken up, one has done it.
ALONE_BYTES = 256 << 10

_OUTSIDE = "queue and summary must lie in job memory"


class TwinError(RuntimeError):
    """The twin cannot be used on this machine or in this installation."""


class TwinCard:
    """Executes job queues natively.

    Parameters
    ----------
    config : Config
        The build to imitate: it limits rows and head_dim and identifies itself in the summary.
    threads : int, optional
        At most this many at once; default all processors that this process may use.
    path : str
        "ifma" (AVX-512 with IFMA, VBMI and VPCLMULQDQ: Ice Lake, Zen 4 and later), "avx512", "avx2",
        "portable", or "auto": the first of them that this processor has.
    alone_bytes : int
        Queues over fewer bytes of K and V are computed by the calling thread alone.

    Raises
    ------
    TwinError
        If the native part is not there, is of other sources, or the processor lacks the path.
    """

    def __init__(
        self,
        config: Config,
        *,
        threads: int | None = None,
        path: str = "auto",
        alone_bytes: int = ALONE_BYTES,
    ):
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if path not in ("auto", *PATHS):
            raise ValueError(f"path must be auto, {', '.join(PATHS)}, not {path!r}")
        self.config, self.threads = config, threads
        self._config_hash = config.hash32  # takes longer than a small run
        self._library = load()
        found = self._library.twin_path(path.encode())
        if found is None:
            raise TwinError(f"this processor does not have the instructions of the path {path}")
        self.path = found.decode()
        self._handle = self._library.twin_open(
            config.rows, config.max_head_dim, threads, alone_bytes, self.path.encode()
        )
        if not self._handle:
            raise TwinError(f"no memory, or {threads} threads cannot be started")
        self._memories: tuple = (None, None)  # of the last run, and where they are
        self._begun: tuple | None = None  # the run that `execute` finds under way
        self._lifetime = Lifetime(
            free=functools.partial(self._library.twin_close, self._handle),
            stop=functools.partial(self._library.twin_stop, self._handle),
        )

    def close(self) -> None:
        """Free the card. From any thread: a run under way is stopped first, see `Lifetime`."""
        self._lifetime.close()
        self._memories = (None, None)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if hasattr(self, "_lifetime"):
            self._lifetime.abandon()

    def begin(self, kv, job, queue, n_jobs) -> None:
        """Let the other threads begin with what `execute` of the same arguments will finish.

        What is wrong with them is raised then. Until then nothing may write to the memories.
        """
        with contextlib.suppress(ValueError, RuntimeError), self._lifetime:
            self._begun = None
            self._start(kv, job, queue, n_jobs)
            self._library.twin_begin(self._handle)
            self._begun = (id(kv), id(job), queue, n_jobs)

    def execute(self, kv, job, queue, n_jobs, summary, timeout_s=None) -> None:
        """Run `n_jobs` jobs from offset `queue`; write partials and the summary into `job`.

        Other Python threads run meanwhile. One run at a time.

        Parameters
        ----------
        kv, job : uint8 (n,), contiguous
            The card's two memories. `job` is written in place.
        queue, summary : int
            Offsets in job memory.
        timeout_s : float, optional
            Wall-clock limit. What was written until then stays; the card can be used again.

        Raises
        ------
        TimeoutError
        ValueError
            If a record of the queue leaves job memory, or the card is closed; nothing was computed
            then.
        ClosedError
            If the card was closed meanwhile; no thread uses the memories any more.
        RuntimeError
            If the card runs in another thread, or belongs to the parent process.
        """
        with self._lifetime:
            self._execute(kv, job, queue, n_jobs, summary, timeout_s)

    def _start(self, kv, job, queue, n_jobs) -> None:
        memories = self._memories
        if kv is not memories[0] or job is not memories[1]:
            memories = kv, job, *_checked(kv, job)
        if min(queue, n_jobs) < 0 or queue + n_jobs * abi.JOB.bytes > len(job):
            raise ValueError(_OUTSIDE)
        # A queue that is not aligned to beats: as the hardware takes it.
        n_jobs = 0 if queue % abi.BEAT_BYTES else n_jobs
        failed = self._library.twin_start(self._handle, *memories[2:], queue, n_jobs)
        self._memories = memories  # not before: threads were at work on the others
        if failed:
            raise ValueError(self._library.twin_error(self._handle).decode())

    def _execute(self, kv, job, queue, n_jobs, summary, timeout_s) -> None:
        begin = time.monotonic()
        if summary < 0 or summary + abi.SUMMARY.bytes > len(job):
            raise ValueError(_OUTSIDE)
        begun, self._begun = self._begun, None
        if begun != (id(kv), id(job), queue, n_jobs):
            self._start(kv, job, queue, n_jobs)
        left = _SLICE_S if timeout_s is None else timeout_s
        while not self._library.twin_run(self._handle, max(0.0, min(left, _SLICE_S))):
            self._lifetime.check()
            if timeout_s is not None:
                left = timeout_s - (time.monotonic() - begin)
                if left <= 0:
                    raise TimeoutError(f"the path {self.path} on {self.threads} threads")
        error = Status.BUS_ERROR if queue % abi.BEAT_BYTES else Status(0)
        summary -= summary % abi.BEAT_BYTES
        self._library.twin_summary(self._handle, summary, self._config_hash, error)


def _checked(kv, job) -> tuple[int, int, int, int]:
    """Address and size of both memories."""
    for name, memory in (("kv", kv), ("job", job)):
        if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous uint8 vector")
    if not job.flags.writeable:
        raise ValueError("job must be writeable")
    return kv.ctypes.data, kv.nbytes, job.ctypes.data, job.nbytes


def supported_paths() -> list[str]:
    """The paths that this processor has, fastest first."""
    return [path for path in PATHS if load().twin_path(path.encode())]


def crc32c(path: str, data: np.ndarray, crc: int = 0) -> int:
    """CRC-32C of contiguous bytes as a path computes it; `crc` is that of the bytes before."""
    return load().twin_crc32c(path.encode(), crc, data.ctypes.data, data.nbytes)


@functools.cache
def load() -> ctypes.CDLL:
    """The native part, with the types of its functions.

    Raises
    ------
    TwinError
        If it is missing or stale; the message has the command that mends it.
    """
    remedy = "to compile it (g++ is needed): make setup, or pip install --editable ."
    spec = importlib.util.find_spec("nearkv_sim.twin._native")
    if spec is None or spec.origin is None:
        raise TwinError(f"the native part of the card twin is not compiled; {remedy}")
    library = ctypes.CDLL(spec.origin)
    library.twin_identity.restype = ctypes.c_char_p
    if library.twin_identity().decode() != identity():
        raise TwinError(f"the native part of the card twin is of other sources; {remedy}")
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    types = {
        "path": (ctypes.c_char_p, [ctypes.c_char_p]),
        "crc32c": (ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_uint32, pointer, u64]),
        "open": (pointer, [ctypes.c_int, ctypes.c_int, ctypes.c_int, u64, ctypes.c_char_p]),
        "close": (None, [pointer]),
        "error": (ctypes.c_char_p, [pointer]),
        "start": (ctypes.c_int, [pointer, pointer, u64, pointer, u64, u64, u64]),
        "begin": (None, [pointer]),
        "run": (ctypes.c_int, [pointer, ctypes.c_double]),
        "stop": (None, [pointer]),
        "summary": (None, [pointer, u64, ctypes.c_uint32, ctypes.c_uint32]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, "twin_" + name)
        function.restype, function.argtypes = result, arguments
    return library


def identity() -> str:
    """Digest of all that the native part is compiled from."""
    digest = hashlib.sha256(_constants().encode())
    for name in (*SOURCES, *HEADERS):
        digest.update(name.encode() + b"\0" + (_FOLDER / name).read_bytes())
    return digest.hexdigest()


def header() -> str:
    """The C++ header `twin_constants.h`: what `abi` and `number` say, and the identity."""
    return f'{_constants()}\n#define TWIN_IDENTITY "{identity()}"\n'


def _constants() -> str:
    lines = [
        "// Generated from nearkv_hw.abi and nearkv_hw.number by nearkv_sim.twin.",
        "#pragma once",
        "#include <stdint.h>",
        "namespace twin {",
    ]
    values = {
        "KV_ELEMENT_BYTES": {kv_type.element_bytes for kv_type in KvType},
        "LIMB_STEP_LOG2": (number.LIMB_STEP - 1).bit_length(),
        "EXP2_SEGMENT_BITS": (number.EXP2_SEGMENTS - 1).bit_length(),
        **{f"STATUS_{flag.name}": int(flag) for flag in Status},
        **{f"KV_{kv_type.name}": int(kv_type) for kv_type in KvType},
        **{
            name: getattr(abi, name)
            for name in (
                "ABI_VERSION", "BEAT_BYTES", "BURST_BYTES", "BLOCK_TOKENS", "TILE_TOKENS", "MAX_HEAD_DIM",
                "ROW_STEP", "MAX_ROWS", "WIDE_BYTES",
            )
        },
        **{
            name: getattr(number, name)
            for name in (
                "KV_BITS", "WEIGHT_BITS", "Q_EXPONENT_BITS", "RAW_SHIFT",
                "SCORE_FRAC_BITS", "SCORE_SHIFT_MAX", "EXPONENT_FLOOR",
                "RUN_MAX_EMPTY", "P_BITS", "P_MAX", "POWER_FRAC_BITS", "P_DROP_BITS", "HALVINGS_MAX",
                "SUM_FRAC_BITS", "SUM_SHIFT", "EXP2_FRAC_BITS", "LIMB_STEP", "LIMB_BITS", "N_LIMBS",
                "WINDOW_TOP",
            )
        },
    }  # fmt: skip
    (values["KV_ELEMENT_BYTES"],) = values["KV_ELEMENT_BYTES"]
    lines += [f"constexpr int {name} = {value};" for name, value in values.items()]
    lines += [
        f"constexpr uint32_t NO_PAGE = {abi.NO_PAGE}u, CRC_POLYNOMIAL = {abi.CRC_POLYNOMIAL:#x};",
        f"constexpr int64_t SCORE_LIMIT = {number.SCORE_LIMIT};",
        "struct KvFormat { int exponent_bits, mantissa_bits, align_bits, unit; };",
    ]
    for kv_type, form in number.KV_FORMATS.items():
        fields = (form.exponent_bits, form.mantissa_bits, form.align_bits, form.unit)
        lines.append(f"constexpr KvFormat {kv_type.name} = {{{', '.join(map(str, fields))}}};")
    for i, column in enumerate(number.exp2_table().T):
        text = ", ".join(map(str, column))
        lines.append(f"alignas(64) constexpr int64_t EXP2_A{i}[{len(column)}] = {{{text}}};")
    lines += ["namespace abi {"]
    for record in (abi.JOB, abi.PAGE_ENTRY, abi.Q_RECORD, abi.PARTIAL_HEADER, abi.SUMMARY):
        lines += _struct(record)
    lines += _legality(abi.JOB, abi.JOB_LIMITS, "n_tiles", "rows", "max_head_dim")
    lines += _legality(abi.PAGE_ENTRY, abi.PAGE_ENTRY_LIMITS, "page_tokens")
    return "\n".join([*lines, "}  // namespace abi", "}  // namespace twin"])


def _legality(record: abi.Record, limits: tuple[abi.Limit, ...], *given: str) -> list[str]:
    """A C++ function that tells whether a record keeps its limits; `given` are its other arguments."""
    conditions = []
    for limit in limits:
        value = limit.name if limit.name in given else f"it.{limit.name}"
        if limit.least:
            conditions.append(f"{value} >= {limit.least}u")
        if limit.most is not None:
            most = limit.most if isinstance(limit.most, str) else f"{limit.most}u"
            conditions.append(f"{value} <= {most}")
        if limit.step > 1:
            conditions.append(f"{value} % {limit.step}u == 0")
        if limit.coarse:
            conditions.append(f"({value} < {limit.coarse}u || {value} % {limit.coarse}u == 0)")
    arguments = ", ".join([f"const {_struct_name(record)}& it", *(f"uint64_t {x}" for x in given)])
    return [
        f"static inline bool legal({arguments}) {{",
        f"    return {' && '.join(conditions)};",
        "}",
    ]


def _struct(record: abi.Record) -> list[str]:
    """A record as a C++ struct, bytes that belong to no field included."""
    names = {"B": "uint8_t", "H": "uint16_t", "I": "uint32_t", "Q": "uint64_t",
             "b": "int8_t", "h": "int16_t", "i": "int32_t", "q": "int64_t"}  # fmt: skip
    struct = _struct_name(record)
    lines, end = [f"struct {struct} {{"], 0
    for field in record.fields:
        if field.offset > end:
            lines.append(f"    uint8_t reserved_{end}[{field.offset - end}];")
        count = f"[{field.count}]" if field.count > 1 else ""
        lines.append(f"    {names[field.code]} {field.name}{count};")
        end = field.offset + field.count * field.bits // 8
    if record.bytes > end:
        lines.append(f"    uint8_t reserved_{end}[{record.bytes - end}];")
    return [*lines, "};", f'static_assert(sizeof({struct}) == {record.bytes}, "{record.name}");']


def _struct_name(record: abi.Record) -> str:
    return "".join(word.capitalize() for word in record.name.split("_"))
