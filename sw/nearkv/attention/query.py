# SPDX-License-Identifier: Apache-2.0
"""Queries as a card takes them."""

import numpy as np

from nearkv_hw import abi
from nearkv_hw.number import quantize_q

from . import native
from .native import address

_INTEGERS = abi.Q_RECORD.bytes // 4  # of a record


def job_image(front: np.ndarray, q: np.ndarray, where: np.ndarray, n_zeros: int) -> np.ndarray:
    """What is written into job memory for some jobs.

    Parameters
    ----------
    front : uint8 (n_bytes,)
        What comes before the query blocks; whole beats.
    q : real (n_queries, width, head_dim)
        For each query the rows of a job.
    where : int64 (n_jobs,)
        Which of them each job has.
    n_zeros : int
        Bytes behind the query blocks.

    Returns
    -------
    uint8 (n_bytes + n_jobs * head_dim * abi.Q_RECORD.bytes + n_zeros,)
        The query blocks are made as `number.quantize_q` says.

    Raises
    ------
    ValueError
        If an element of q is not finite, or not below 2^511.
    IndexError
        If there is no query of an index in `where`.
    """
    (n_queries, width, head_dim), n_jobs, n_bytes = q.shape, len(where), len(front)
    is_double = q.dtype != np.float32
    q = np.ascontiguousarray(q, np.float64 if is_double else np.float32)
    end = n_bytes + n_jobs * head_dim * abi.Q_RECORD.bytes
    image = np.empty(end + n_zeros, np.uint8)
    library = native.library()
    if library is not None:
        where = np.ascontiguousarray(where, np.int64)
        good = library.native_job_image(
            address(q), is_double, address(where), n_queries, n_jobs, width, head_dim,
            address(front), n_bytes, n_zeros, address(image),
        )  # fmt: skip
        if good:
            return image
    # Channels of all queries side by side: each has its own exponent.
    weight, exponent = quantize_q(q.swapaxes(0, 1).reshape(width, -1))
    if n_jobs and not 0 <= where.min() <= where.max() < n_queries:
        raise IndexError(f"queries must be among {n_queries}, not {where.min()} .. {where.max()}")
    records = np.zeros((n_jobs, head_dim, _INTEGERS), np.int32)
    records[..., :width] = weight.reshape(width, n_queries, -1)[:, where].transpose(1, 2, 0)
    records[..., abi.Q_RECORD["exponent"].offset // 4] = exponent.reshape(n_queries, -1)[where]
    image[:n_bytes], image[n_bytes:end] = front, records.reshape(-1).view(np.uint8)
    image[end:] = 0
    return image
