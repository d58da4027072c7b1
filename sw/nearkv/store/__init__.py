# SPDX-License-Identifier: Apache-2.0
"""Where pages live between the step that writes them and the steps that attend to them."""

from .store import DELAYED_BYTES, KvStore

__all__ = ["KvStore", "DELAYED_BYTES"]
