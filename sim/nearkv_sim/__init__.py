# SPDX-License-Identifier: Apache-2.0
"""Reference, bit-exact models and simulation of the nearkv accelerator."""
