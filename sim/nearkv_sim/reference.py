# SPDX-License-Identifier: Apache-2.0
"""Decode attention from its definition, in float64. Slow and obvious."""

import numpy as np


def attention(q, k, v, scale=None):
    """Attention of each query head over the whole context.

    Parameters
    ----------
    q : (n_q_heads, head_dim)
    k, v : (kv_len, n_kv_heads, head_dim)
        Query head h belongs to KV head h // (n_q_heads // n_kv_heads).
    scale : float, optional
        Default 1/sqrt(head_dim).

    Returns
    -------
    out : float64 (n_q_heads, head_dim)
    lse_ln : float64 (n_q_heads,)
        Natural logarithm of the sum of exponentials of the scaled scores; -inf without tokens.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n_q_heads, head_dim = q.shape
    group = n_q_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros((n_q_heads, head_dim))
    lse_ln = np.full(n_q_heads, -np.inf)
    if len(k) == 0:
        return out, lse_ln
    for head in range(n_q_heads):
        scores = k[:, head // group] @ q[head] * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
        lse_ln[head] = scores.max() + np.log(weights.sum())
    return out, lse_ln
