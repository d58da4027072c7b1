# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: the attention "nearkv" and the cache that goes with it."""
