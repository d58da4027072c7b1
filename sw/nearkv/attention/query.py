# SPDX-License-Identifier: Apache-2.0
"""Queries as a card takes them."""

import numpy as np

from nearkv_hw import abi
from nearkv_hw.number import quantize_q

from . import native

_INTEGERS = abi.Q_RECORD.bytes // 4  # of a record


def query_records(
    q: np.ndarray, where: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """The query blocks of jobs, as `abi.Q_RECORD` says, made by `number.quantize_q`.

    Parameters
    ----------
    q : real (..., width, head_dim)
        Queries: for each the rows of a job.
    where : int64 (n_jobs,), optional
        Which of them each job has. Default: all, in order.
    out : int32 (n_jobs, head_dim, 16), contiguous, overwritten, optional

    Returns
    -------
    int32 (n_jobs, head_dim, 16)
        out, if it was given.

    Raises
    ------
    ValueError
        If an element is not finite, or not below 2^511.
    IndexError
        If there is no query of an index in `where`.
    """
    width, head_dim = q.shape[-2:]
    is_double = q.dtype != np.float32
    q = np.ascontiguousarray(q, np.float64 if is_double else np.float32).reshape(
        -1, width, head_dim
    )
    n_jobs = len(q) if where is None else len(where)
    if out is None:
        out = np.empty((n_jobs, head_dim, _INTEGERS), np.int32)
    elif out.shape != (n_jobs, head_dim, _INTEGERS) or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be a contiguous ({n_jobs}, {head_dim}, {_INTEGERS}), not {out.shape}"
        )
    library = native.library()
    if library is not None:
        if where is not None:
            where = np.ascontiguousarray(where, np.int64)
        good = library.native_query_records(
            native.address(q), is_double, None if where is None else native.address(where),
            len(q), n_jobs, width, head_dim, native.address(out),
        )  # fmt: skip
        if good:
            return out
    # Channels of all queries side by side: each has its own exponent.
    weight, exponent = quantize_q(q.swapaxes(0, 1).reshape(width, -1))
    if where is not None:
        if len(where) and not 0 <= where.min() <= where.max() < len(q):
            raise IndexError(f"queries must be among {len(q)}, not {where.min()} .. {where.max()}")
        weight, exponent = (
            weight.reshape(width, len(q), -1)[:, where],
            exponent.reshape(len(q), -1)[where],
        )
    out[...] = 0
    out[..., :width] = weight.reshape(width, n_jobs, head_dim).transpose(1, 2, 0)
    out[..., abi.Q_RECORD["exponent"].offset // 4] = exponent.reshape(n_jobs, head_dim)
    return out
