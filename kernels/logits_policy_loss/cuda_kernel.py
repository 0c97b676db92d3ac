"""The loss over given logits with rows in CUDA, which are read once; the rest is as in Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eapo_fast.kernels.linear_token_stats import cuda_rows
from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass, Span
from eapo_fast.kernels.logits_policy_loss import triton_kernel
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.recipes import Recipe


class CudaRowPass(RowPass):
    """Rows whose launch is CUDA's."""

    def launch(self, logits: Tensor, out: Tensor, span: Span, **how: Any) -> None:
        """Run the rows of a span; see `cuda_rows.launch`."""
        cuda_rows.launch(self, logits, out, span, **how)


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    temperature: float,
    in_place: bool,
) -> LossOutput:
    """Return the loss of a checked batch, float32."""
    return triton_kernel.logits_policy_loss(
        logits, targets, batch, recipe, temperature, in_place, rows_of=CudaRowPass
    )
