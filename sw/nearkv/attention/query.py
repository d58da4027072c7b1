# SPDX-License-Identifier: Apache-2.0
"""Queries as a card takes them."""

import numpy as np

from nearkv_hw import abi
from nearkv_hw.number import quantize_q

from . import native

_INTEGERS = abi.Q_RECORD.bytes // 4  # of a record


def query_records(q: np.ndarray) -> np.ndarray:
    """The query blocks of jobs.

    Parameters
    ----------
    q : real (..., width, head_dim)
        For each job its rows.

    Returns
    -------
    int32 (n_jobs, head_dim, 16)
        `abi.Q_RECORD`, made as `number.quantize_q` says.

    Raises
    ------
    ValueError
        If an element is not finite, or not below 2^511.
    """
    width, head_dim = q.shape[-2:]
    q = np.ascontiguousarray(q if q.dtype == np.float32 else q.astype(np.float64, copy=False))
    q = q.reshape(-1, width, head_dim)
    library = native.library()
    if library is not None:
        records = np.empty((len(q), head_dim, _INTEGERS), np.int32)
        good = library.native_query_records(
            q.ctypes.data, q.dtype == np.float64, *q.shape, records.ctypes.data
        )
        if good:
            return records
    # Channels of all jobs side by side: each has its own exponent.
    weight, exponent = quantize_q(q.swapaxes(0, 1).reshape(width, -1))
    records = np.zeros((len(q) * head_dim, _INTEGERS), np.int32)
    records[:, :width] = weight.T
    records[:, abi.Q_RECORD["exponent"].offset // 4] = exponent
    return records.reshape(len(q), head_dim, _INTEGERS)
