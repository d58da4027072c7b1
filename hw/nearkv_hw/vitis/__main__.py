# SPDX-License-Identifier: Apache-2.0
"""`python -m nearkv_hw.vitis --board smartssd`: see build.py."""

import sys

from .build import main

sys.exit(main())
