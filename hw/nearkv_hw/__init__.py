# SPDX-License-Identifier: Apache-2.0
"""The nearkv accelerator: what crosses its boundary (`abi`), its numbers (`number`), its gateware.

`abi` needs nothing but Python and `number` only numpy; the gateware modules need Amaranth. Importing
this package imports none of them.
"""
