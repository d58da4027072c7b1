# SPDX-License-Identifier: Apache-2.0
"""Stores that are broken on purpose: the campaign must notice each."""

from collections.abc import Callable

SABOTAGES: dict[str, Callable[[], None]] = {}
