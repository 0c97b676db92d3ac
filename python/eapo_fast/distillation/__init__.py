"""The distillation baseline: supervised fine-tuning on an expert's solutions.

The paper compares with it ("LoRA distil"): the expert's text is imitated instead of consulted. The
loss runs over solution tokens only.
"""

from __future__ import annotations

from eapo_fast.distillation.collect import collect_solutions
from eapo_fast.distillation.run import DistillSettings, distill
from eapo_fast.distillation.solutions import Solution, load_solutions, prepare

__all__ = [
    "DistillSettings",
    "Solution",
    "collect_solutions",
    "distill",
    "load_solutions",
    "prepare",
]
