# SPDX-License-Identifier: Apache-2.0
"""2^x and log2 with the same bits on every machine, in numpy and in native code.

Those of numpy and of C libraries differ in the last bit, with the processor and the version. These are made
of sums, products and quotients of float64 in a fixed order, each rounded once.
"""

import numpy as np

from .native import EXP2_LEAST, EXP2_TERMS, LOG2_TERMS, SQRT_HALF


def exp2(x: np.ndarray) -> np.ndarray:
    """2^x: float64, the shape of x.

    Parameters
    ----------
    x : float64
        At most 1000. Below EXP2_LEAST, and for -inf, the result is 0; NaN stays NaN.

    Relative error below 2^-51; exact for integers.
    """
    inside = x >= EXP2_LEAST
    bounded = np.where(inside, x, 0.0)
    whole = np.rint(bounded)
    power = _polynomial(EXP2_TERMS, bounded - whole)
    power = np.ldexp(power, whole.astype(np.int32))
    return np.where(inside, power, np.where(np.isnan(x), x, 0.0))


def log2(x: np.ndarray) -> np.ndarray:
    """The logarithm to base 2: float64, the shape of x.

    Parameters
    ----------
    x : float64
        Not negative, finite. The result is -inf for 0; NaN stays NaN.

    Error below 2^-51, relative to the larger of 1 and the result; exact for powers of two.
    """
    some = x != 0
    fraction, exponent = np.frexp(np.where(some, x, 1.0))
    small = fraction < SQRT_HALF
    fraction = np.where(small, fraction * 2, fraction)
    exponent = exponent - small
    s = (fraction - 1) / (fraction + 1)
    return np.where(some, _polynomial(LOG2_TERMS, s * s) * s + exponent, -np.inf)


def _polynomial(terms: list[float], x: np.ndarray) -> np.ndarray:
    """The sum over k of terms[k] * x^k, from the highest power down."""
    total = np.full_like(x, terms[-1])
    for term in terms[-2::-1]:
        total = total * x + term
    return total
