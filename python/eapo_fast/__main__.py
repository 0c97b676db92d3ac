"""`python -m eapo_fast` is `eapo-fast`."""

from __future__ import annotations

import sys

from eapo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
