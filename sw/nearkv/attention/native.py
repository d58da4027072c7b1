# SPDX-License-Identifier: Apache-2.0
"""What the host computes in each step, in native code: the same bits as numpy, many times faster.

`native.cpp` is compiled by setup.py into `nearkv.attention._native` where there is a compiler. Each of its
functions has a counterpart in numpy (in `elementary`, `fold`, `partial`, `query` and `tail`), which is
called where `library` is None. The constants that both share are here; those of the C++ source are
generated from them. This file imports nothing of nearkv, because setup.py loads it alone.
"""

import ctypes
from decimal import Decimal, localcontext
from functools import cache
import hashlib
import importlib.util
import logging
import math
from pathlib import Path

from nearkv_hw import abi, number
from nearkv_hw.abi import KvType, Status

log = logging.getLogger("nearkv")

_SOURCE = Path(__file__).parent / "native.cpp"
# Without the last, a compiler may round a product and a sum once instead of twice.
COMPILE_ARGS = ["-std=c++20", "-O3", "-ffp-contract=off"]

EMPTY_TOP = -(1 << 15)  # of sums without tokens: below every top a card can send
LANES = 8  # partial sums of a scalar product, see `tail.scores`
EXP2_LEAST = -1000  # 2^x is 0 below


def _series(n_terms: int, term) -> list[float]:
    with localcontext() as context:
        context.prec = 40
        return [float(term(Decimal(2).ln(), k)) for k in range(n_terms)]


# 2^x by powers of x, for |x| <= 1/2. The terms left out are below 2^-57.
EXP2_TERMS = _series(14, lambda ln2, k: ln2**k / math.factorial(k))
SQRT_HALF = math.sqrt(0.5)
# log2((1 + s) / (1 - s)) / s by powers of s^2, for |s| <= 3 - sqrt(8). The same.
LOG2_TERMS = _series(11, lambda ln2, k: 2 / (ln2 * (2 * k + 1)))


@cache
def library() -> ctypes.CDLL | None:
    """The native part with the types of its functions, or None if numpy has to do."""
    remedy = "numpy takes its place, which is slower; to compile it: pip install --editable ."
    spec = importlib.util.find_spec("nearkv.attention._native")
    if spec is None or spec.origin is None:
        log.info("the native part of nearkv.attention is not compiled; %s", remedy)
        return None
    native = ctypes.CDLL(spec.origin)
    native.native_identity.restype = ctypes.c_char_p
    if native.native_identity().decode() != identity():
        log.warning("the native part of nearkv.attention is of other sources; %s", remedy)
        return None
    declare(native)
    return native


def declare(native: ctypes.CDLL) -> None:
    """Give its functions their types."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    elements = [pointer, *[integer] * 3]  # address, and bytes from one to the next on three axes
    types = {
        "exp2": (None, [pointer, integer, pointer]),
        "log2": (None, [pointer, integer, pointer]),
        "job_image": (
            integer,
            [pointer, integer, pointer, *[integer] * 4, pointer, integer, integer, pointer],
        ),
        "patterns": (integer, [*elements * 2, *[integer] * 6, pointer]),
        "fold": (integer, [pointer, integer, pointer, *[integer] * 5, *[pointer] * 3]),
        "normalise": (None, [pointer, pointer, *[integer] * 3, *[pointer] * 2]),
        "combine": (None, [pointer, pointer, *[integer] * 3, *[pointer] * 3]),
        "attend": (
            None,
            [pointer, *elements * 4, pointer, pointer, *[integer] * 6, real, *[pointer] * 3],
        ),
    }
    for name, (result, arguments) in types.items():
        function = getattr(native, "native_" + name)
        function.restype, function.argtypes = result, arguments


_Any = ctypes.c_char * 0


def address(array) -> int:
    """Where a numpy array begins. What `array.ctypes.data` says, in a third of the time."""
    try:
        return ctypes.addressof(_Any.from_buffer(array))
    except (TypeError, ValueError):  # of arrays that are read-only, or not contiguous
        return array.ctypes.data


def identity() -> str:
    """Digest of all that the native part is compiled from."""
    return hashlib.sha256(_constants().encode() + b"\0" + _SOURCE.read_bytes()).hexdigest()


def header() -> str:
    """The C++ header `native_constants.h`: what `abi` and `number` say, and the identity."""
    return f'{_constants()}\n#define NATIVE_IDENTITY "{identity()}"\n'


def _constants() -> str:
    integers = {
        "BITS_OF_LIMB": number.LIMB_BITS,
        "EMPTY_TOP": EMPTY_TOP,
        "EXP2_LEAST": EXP2_LEAST,
        "KV_BF16": int(KvType.BF16),
        "LANES": LANES,
        "LIMB_STEP": number.LIMB_STEP,
        "N_LIMBS": number.N_LIMBS,
        "PARTIAL_ELEMENTS": abi.PARTIAL_HEADER.bytes,
        "PARTIAL_STATUS": abi.PARTIAL_HEADER["status"].offset,
        "PARTIAL_TAG": abi.PARTIAL_HEADER["tag"].offset,
        "PARTIAL_RUN_MAX": abi.PARTIAL_HEADER["run_max"].offset,
        "Q_EXPONENT": abi.Q_RECORD["exponent"].offset,
        "Q_EXPONENT_MAX": number.Q_EXPONENT_MAX,
        "Q_EXPONENT_MIN": number.Q_EXPONENT_MIN,
        "Q_RECORD": abi.Q_RECORD.bytes,
        "Q_WEIGHT": abi.Q_RECORD["weight"].offset,
        "ROW_STEP": abi.ROW_STEP,
        "RUN_MAX_EMPTY": number.RUN_MAX_EMPTY,
        "STATUS_DONE": int(Status.DONE),
        "SUM_UNIT": number.SUM_UNIT,
        "WEIGHT_BITS": number.WEIGHT_BITS,
        "WEIGHT_MAX": number.WEIGHT_MAX,
        "WIDE_BYTES": abi.WIDE_BYTES,
    }
    lines = [
        "// Generated by nearkv.attention.native from nearkv_hw.abi and nearkv_hw.number.",
        "#pragma once",
        *(f"constexpr int {name} = {value};" for name, value in integers.items()),
    ]
    lines.append(f"constexpr double SQRT_HALF = {SQRT_HALF.hex()};")
    for name, terms in {"EXP2_TERMS": EXP2_TERMS, "LOG2_TERMS": LOG2_TERMS}.items():
        values = ", ".join(term.hex() for term in terms)
        lines.append(f"constexpr double {name}[{len(terms)}] = {{{values}}};")
    return "\n".join(lines)
