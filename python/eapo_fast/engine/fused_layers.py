"""Decoder layers whose residual sums run together with the norms that follow them.

A layer's own code adds and then calls the next norm, in this layer or the next one. The forward
here does the same calls with the same arguments, but lets the norm's fused forward compute the sum
(`FusedNorm.add`); the norm, called as a module on that sum, then returns what it has. Whoever puts
another tensor in between, or changes it, gets the norm of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from eapo_fast.engine.fused_forwards import Forward, FusedNorm, Unit
from eapo_fast.engine.fused_target import Target
from eapo_fast.engine.fused_trials import sample, trial


@dataclass(frozen=True, slots=True)
class _Form:
    """Names of the norms of a layer: before the MLP, and behind attention and MLP if any."""

    before_mlp: str
    after_attention: str | None = None
    after_mlp: str | None = None

    def parts(self) -> frozenset[str]:
        names = (self.before_mlp, self.after_attention, self.after_mlp)
        return frozenset(("input_layernorm", "self_attn", "mlp", *filter(None, names)))


_FORMS = (
    _Form("post_attention_layernorm"),
    _Form("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
)


def layer_unit(module: nn.Module, following: nn.Module | None, target: Target) -> Unit | None:
    """Return a decoder layer's unit, or None when it is made of other parts or adds otherwise.

    Args:
        module: a decoder layer.
        following: the norm that takes the layer's result, if it is known.
        target: where the layer runs.
    """
    cls: Any = type(module)
    form = next((form for form in _FORMS if form.parts() == frozenset(module._modules)), None)
    if form is None or module._parameters or module._buffers:
        return None
    if not _layer_agrees(cls, cls.forward, form, target):
        return None
    return Unit(module, _layer_forward(module, form, following, target), cls.forward)


def following_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, for every layer of a stack with a last norm, the norm that takes its result."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        layers, last = module._modules.get("layers"), module._modules.get("norm")
        if isinstance(layers, nn.ModuleList) and last is not None:
            norms = [layer._modules.get("input_layernorm") for layer in layers][1:]
            pairs = zip(layers, [*norms, last], strict=True)
            found |= {layer: norm for layer, norm in pairs if norm is not None}
    return found


def _layer_forward(
    module: nn.Module, form: _Form, following: nn.Module | None, target: Target
) -> Forward:
    own, parts = type(module).forward, module._modules
    optional = _optional(own)

    def call(name: str | None, x: Tensor) -> Tensor:
        return x if name is None else parts[name](x)  # type: ignore[misc]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not target.takes(hidden_states) or len(args) > len(optional):
            return own(module, hidden_states, *args, **kwargs)
        arguments = {**optional, **dict(zip(optional, args, strict=False)), **kwargs}
        attention: Any = parts["self_attn"]
        x, _ = attention(hidden_states=call("input_layernorm", hidden_states), **arguments)
        x = call(form.after_attention, x)
        total = _add(parts[form.before_mlp], x, hidden_states)
        x = call(form.after_mlp, call("mlp", call(form.before_mlp, total)))
        return _add(following, x, total)

    return forward


def _add(norm: nn.Module | None, x: Tensor, residual: Tensor) -> Tensor:
    """Return the sum; where `norm`, which comes next, is fused, it computes its own from it."""
    fused = None if norm is None else vars(norm).get("forward")
    return fused.add(x, residual) if isinstance(fused, FusedNorm) else residual + x


def _optional(own: Forward) -> dict[str, Any]:
    """The arguments behind `hidden_states` that a layer's forward names, with their defaults."""
    parameters = list(signature(own).parameters.values())[2:]
    return {p.name: p.default for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD}


class _Attention(nn.Module):
    """Stands in for attention, and notes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        self.got.append(kwargs)
        return hidden_states.sin(), None


@cache
def _layer_agrees(cls: Any, own: Forward, form: _Form, target: Target) -> bool:
    """Whether the class makes the same calls with the same arguments, to the same bits."""

    def run() -> bool:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.self_attn, layer.mlp = _Attention(), nn.Tanh()
        layer.input_layernorm, layer.post_attention_layernorm = nn.Softsign(), nn.Softplus()
        layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm = nn.ELU(), nn.Sigmoid()
        token, names = object(), list(_optional(own))
        fused = _layer_forward(layer, form, None, target)
        calls: tuple[dict[str, Any], ...] = (
            {},
            {names[0]: token, "of_its_own": token},
            dict.fromkeys(names, token),
        )
        for dtype, arguments in product(target.dtypes, calls):  # others run its own forward
            x = sample(target, dtype, 3, 8)
            want, found = own(layer, x, **arguments), fused(x, **arguments)
            if type(found) is not type(want) or not torch.equal(found, want):
                return False
        got: list[dict[str, Any]] = layer.self_attn.got
        return bool(got) and got[::2] == got[1::2]

    return trial(run)
