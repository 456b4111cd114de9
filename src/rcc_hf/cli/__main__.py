# SPDX-License-Identifier: Apache-2.0
"""`python -m rcc_hf.cli`: the `rcc` command for launchers of several processes."""

import sys

from rcc_hf.cli import main

sys.exit(main())
