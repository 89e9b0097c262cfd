# SPDX-License-Identifier: Apache-2.0
"""`python -m headworks` is the console script `headworks`."""

import sys

from .cli import main

sys.exit(main())
