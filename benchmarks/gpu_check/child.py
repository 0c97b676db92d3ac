"""The process of one stage: `python -m gpu_check.child MODULE REQUEST`."""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module

from gpu_check.records import Recorder, Request


def main() -> None:
    """Run the stage of a module on a request."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    module, text = sys.argv[1:]
    request = Request(**json.loads(text))
    import_module(module).run(request, Recorder(request))


if __name__ == "__main__":
    main()
