"""The policy as training sees it: a trunk that gives hidden states, and a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eapo_fast.engine.inspection import base_model
from eapo_fast.engine.support import paged_model
from eapo_fast.errors import ModelError
from eapo_fast.training.attention import PackedRow, layer_windows, varlen_attention

_TRIAL_TOKENS = 5


class Policy:
    """Trunk and head of a causal LM, over the model's own parameters.

    logits = softcap(hidden @ weight.T + bias) * logit_scale, as `ops.linear_token_stats` defines
    them with temperature / logit_scale.

    Raises:
        ModelError: the head is not of that form (found by comparing with the model's own logits).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        head = model.get_output_embeddings()
        if head is None or not hasattr(head, "weight"):
            raise ModelError(f"model: {type(model).__name__} has no linear LM head")
        self.weight: Tensor = head.weight
        self.bias: Tensor | None = getattr(head, "bias", None)
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(config)
        self._windows = layer_windows(paged_model(model).windows)
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.weight.device

    def hidden(self, input_ids: Tensor, position_ids: Tensor, row: PackedRow) -> Tensor:
        """Return hidden states [T, H] of a packed row; call inside `attention(row)`."""
        trunk = _trunk(self.model)
        out = trunk(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def attention(self, row: PackedRow) -> object:
        """Context in which forward and backward of a packed row run."""
        return varlen_attention(self.model, row, self._windows)

    @torch.no_grad()
    def _check_head(self) -> None:
        training = self.model.training
        self.model.eval()
        ids = torch.arange(_TRIAL_TOKENS, device=self.device) % self.weight.shape[0]
        row = PackedRow(
            torch.tensor([0, _TRIAL_TOKENS], dtype=torch.int32, device=self.device), [_TRIAL_TOKENS]
        )
        try:
            with varlen_attention(self.model, row, self._windows):
                hidden = self.hidden(ids, torch.arange(_TRIAL_TOKENS, device=self.device), row)
            expected = self.model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
        finally:
            self.model.train(training)
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        logits = (logits if self.bias is None else logits + self.bias).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        error = (logits * self.logit_scale - expected).abs().max().item()
        tolerance = 1e-3 if self.weight.dtype == torch.float32 else 0.1
        if not error <= tolerance * max(1.0, expected.abs().max().item()):
            raise ModelError(
                f"model: the head of {type(self.model).__name__} is not a plain linear layer with "
                f"optional bias, soft cap and scale (its logits differ by {error:.3g}), so the "
                f"fused loss would train another distribution than the one sampled"
            )


def _trunk(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its head."""
    base: Any = base_model(model)
    trunk: torch.nn.Module = base.get_decoder()
    if trunk is base:
        trunk = getattr(base, "model", base)
    if trunk is base:
        raise ModelError(f"model: {type(base).__name__} has no trunk apart from its LM head")
    return trunk


def _logit_scale(config: object) -> float:
    """Cohere multiplies its logits, Granite divides them; others leave them alone."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(scale or 1.0) / float(divisor or 1.0)
