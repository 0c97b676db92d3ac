"""Kernel launches of one decode step of Qwen2.5-0.5B's shape; needs no GPU and no weights.

    python benchmarks/decode_launches.py [--rows 256]

The forward that a GPU would capture runs on torch's "meta" device, where an op that waits for a
number is an error: torch's ops that compute are counted as one launch each, as they are on a GPU
(views and allocations are none), Triton's launches are noted. Counted, not measured.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
BLOCK_SIZE, BLOCKS = 64, 32
KERNELS = ("gated_activation", "kv_write", "paged_attention", "rms_norm", "rotary", "sample")


class Launches(TorchDispatchMode):
    """Counts the ops that compute, by name; raises for one between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        results = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        if not is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        found = [x for x in (*args, *(kwargs or {}).values(), result) if isinstance(x, Tensor)]
        if len({x.device.type for x in found}) > 1:
            raise RuntimeError(f"{name} goes between the host and the device")
        return result


@contextmanager
def on_meta(*, fused: bool) -> Iterator[list[Any]]:
    """Have ops take the meta device for a GPU; yields Triton's launches, which are not run."""
    sys.path[:0] = [str(ROOT / "tests/kernels")]
    import triton_aot

    from eapo_fast.engine import fused as modules
    from eapo_fast.engine import fused_forwards, fused_layers, fused_rotary
    from eapo_fast.engine.fused_target import Target
    from eapo_fast.kernels import native

    target = Target(torch.device("meta"), "triton", native.GPU_STORAGE) if fused else None
    with ExitStack() as stack:
        stack.enter_context(patch.object(modules, "target_of", lambda _: target))
        for tried in (
            fused_forwards,
            fused_layers,
            fused_rotary,
        ):  # trials look at numbers; tests run them
            stack.enter_context(patch.object(tried, "trial", lambda _: True))
        # torch knows no autocast there, and says so
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))
        kernels = []
        for name in KERNELS:
            op = importlib.import_module(f"eapo_fast.kernels.{name}")
            stack.enter_context(patch.object(op, "triton_refusal", lambda *_, **__: None))
            kernels.append(importlib.import_module(f"eapo_fast.kernels.{name}.triton_kernel"))
        yield stack.enter_context(triton_aot.recorded(*kernels))


def count(rows: int, *, layers: int, fused: bool, shared: bool = True) -> Counter[str]:
    """Return the launches of a decode step by name, draws included.

    Args:
        rows: rows of the step.
        layers: decoder layers of the model.
        fused: run recognised modules on fused ops.
        shared: rows share prefixes in groups of 8.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from eapo_fast.engine.attention import PagedStep, paged_logits
    from eapo_fast.engine.cache import PagedCache
    from eapo_fast.engine.fused import fused_modules
    from eapo_fast.kernels.sample import sample

    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, vocab_size=151_936,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
        ints, longs = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
        floats = torch.zeros(rows)
        spans = torch.zeros(rows // 8, 2, dtype=torch.int32), ints[: rows // 8].clone()
        step = PagedStep(
            cache=PagedCache(2 * rows, BLOCK_SIZE),
            slots=longs,
            cu_q=torch.zeros(rows + 1, dtype=torch.int32),
            kv_lens=ints,
            block_tables=torch.zeros(rows, BLOCKS, dtype=torch.int32),
            shared=spans if shared else None,
            longest=(1, BLOCKS * BLOCK_SIZE),
        )
    with on_meta(fused=fused) as kernels, fused_modules(model), torch.no_grad():
        paged_logits(model, step, longs, longs)  # allocates the pool, shows the model's habits
        kernels.clear()
        with Launches() as ops:
            logits = paged_logits(model, step, longs, longs)
            sample(logits, rows=ints, uniforms=floats, temperatures=floats, top_ks=ints,
                   top_ps=floats, min_ps=floats, banned=(ints, ints))  # fmt: skip
    return ops.counts + Counter(f"{launch.name} (Triton)" for launch in kernels)


def main() -> None:
    """Print the launches of a layer and of a step, with and without fused modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    rows = parser.parse_args().rows
    for fused in (False, True):
        one, two = (count(rows, layers=n, fused=fused) for n in (1, 2))
        layer = Counter({name: two[name] - one[name] for name in two if two[name] > one[name]})
        rest = one - layer
        total = 24 * layer.total() + rest.total()
        print(f"{'fused' if fused else 'unfused'}, {rows} rows: {layer.total()} a layer, "
              f"{rest.total()} around them, {total} a step of 24 layers")  # fmt: skip
        for title, counts in (("a layer", layer), ("around", rest)):
            print(f"  {title}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
