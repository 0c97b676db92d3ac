"""Evaluation as the paper does it: n samples per problem, alone or with an expert's help.

    result = evaluate_model("runs/demo/final", "test.jsonl", "runs/eval/demo", EvalSettings(n=32))

`estimators` and `bootstrap` hold the formulas, `summary` what is reported, `store` the folder that
an interrupted evaluation continues from.
"""

from __future__ import annotations

from eapo_fast.evaluation.rows import Evaluation, evaluate_rows
from eapo_fast.evaluation.run import evaluate_model
from eapo_fast.evaluation.settings import METHODS, EvalSettings

__all__ = ["METHODS", "EvalSettings", "Evaluation", "evaluate_model", "evaluate_rows"]
