# SPDX-License-Identifier: Apache-2.0
"""Attention next to storage: the host runtime of the nearkv accelerator."""
