"""A GPU that is not there: tensors on the CPU that say they are on `cuda:0`.

What would fail on a GPU because two tensors are on different devices, or because one that is on a
GPU is read as an array, fails here too; so do branches that only a GPU takes. Triton kernels run in
the interpreter. Streams, events and graphs are stand-ins; nothing is said about time.

`pretended(monkeypatch)` installs it in this process. As a pytest plugin (`-p pretended_gpu`, with
this folder on the path) it covers a whole run.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import eapo_fast

GPU = torch.device("cuda", 0)
_FREE = 8 << 30


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Devices.call(func, args, kwargs or {})


class ParameterOnGpu(OnGpu, torch.nn.Parameter):
    """A parameter that was moved to the GPU."""


_Plain = tuple[type, ...]
_MIXES = {"copy_", "set_", "__get__", "__set__", "__delete__", "to", "cpu", "type_as", "equal_"}
"""Functions that take tensors of several devices."""
_INDEXES = {"__getitem__", "__setitem__", "index_put_", "index_put"}
_TAKES_NO_SCALARS = {"stack", "cat", "hstack", "vstack"}
_KEEPS = {"untyped_storage", "storage"}


def mark(tensor: Any) -> Any:
    """Return a tensor as one on the GPU; the same memory."""
    if isinstance(tensor, OnGpu) or not isinstance(tensor, Tensor):
        return tensor
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(OnGpu)


def plain(tensor: Any) -> Any:
    """Return a tensor as one on the CPU; the same memory."""
    if not isinstance(tensor, OnGpu):
        return tensor
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor)


def _in_backward() -> bool:
    """Whether autograd runs, which hands out tensors that nobody marked."""
    return torch._C._current_graph_task_id() != -1


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Devices(TorchFunctionMode):
    """Runs torch's functions on the CPU and keeps account of devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda", "numpy", "__array__", "pin_memory", "is_pinned"):
            return cls._transfer(name, func, args, kwargs)
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnGpu) for x in leaves)
        kwargs = dict(kwargs)
        given = kwargs.get("device")
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if given is not None and not isinstance(given, int):
            kwargs["device"] = torch.device("cpu") if _is_gpu(given) else given
            here = _is_gpu(given)
        elif here:
            cls._check(name, args, leaves)
        if "out_dtype" in kwargs and here:
            return cls._widening(name, args, kwargs)
        before = _used_by_gpu[0]
        if getattr(func, "namespace", "") == "eapo_fast" or name in ("backward", "grad"):
            _used_by_gpu[0] = here
        try:
            with torch._C.DisableTorchFunction():
                found = func(*args, **kwargs)
        finally:
            _used_by_gpu[0] = before
        if not here or name in _KEEPS:
            if not here and given is not None:
                return tree_map_only(Tensor, plain, found)
            return found
        if isinstance(found, Tensor):
            return mark(found)
        return tree_map_only(Tensor, mark, found) if isinstance(found, (tuple, list)) else found

    @staticmethod
    def _widening(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do products of bfloat16 that come out in float32, which torch has on GPUs only."""
        kind, out = kwargs["out_dtype"], kwargs["out"]
        with torch._C.DisableTorchFunction():
            *added, left, right = args
            found = left.to(kind) @ right.to(kind)
            assert name == ("addmm" if added else "mm")
            assert out.dtype == kind
            assert all(x.dtype == kind and x.shape == found.shape for x in added)
            out.copy_(found + added[0] if added else found)
        return out

    @staticmethod
    def _check(name: str, args: Any, leaves: list[Tensor]) -> None:
        if name in _MIXES or _in_backward():
            return
        strangers = [x for x in leaves if not isinstance(x, OnGpu)]
        if name in _INDEXES and isinstance(args[0], OnGpu):
            keys = tree_leaves(args[1])
            advanced = any(isinstance(k, Tensor) for k in keys)
            strangers = [x for x in args[2:] if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
            strangers = strangers if advanced else []
        if name not in _TAKES_NO_SCALARS:
            strangers = [x for x in strangers if x.dim() > 0]
        if strangers:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(
                f"{name}: tensors on cuda:0 and on the CPU {shapes}: expected all on one device"
            )

    @staticmethod
    def _transfer(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        if name in ("numpy", "__array__"):
            if isinstance(tensor, OnGpu):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if name == "is_pinned":
            return True
        if name == "pin_memory":
            return tensor
        with torch._C.DisableTorchFunction():
            if name == "cpu":
                return plain(tensor).clone() if isinstance(tensor, OnGpu) else tensor
            if name == "cuda":
                return mark(tensor if isinstance(tensor, OnGpu) else tensor.clone())
            target, rest = _target(rest, kwargs)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
            moved = plain(tensor).to(*rest, **kwargs) if rest or kwargs else plain(tensor)
            crosses = target is not None and _is_gpu(target) != isinstance(tensor, OnGpu)
            if crosses and moved.data_ptr() == tensor.data_ptr():
                moved = moved.clone()
            if (
                target is None
                and moved.data_ptr() == tensor.data_ptr()
                and moved.dtype == tensor.dtype
            ):
                return tensor
        ends_here = isinstance(tensor, OnGpu) if target is None else _is_gpu(target)
        if ends_here and not crosses and moved.dtype == tensor.dtype and not kwargs.get("copy"):
            return tensor
        return mark(moved) if ends_here else moved


def _target(rest: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the device that arguments of `Tensor.to` name, and the other arguments."""
    target, left = kwargs.get("device"), []
    for value in rest:
        if isinstance(value, (torch.device, str)):
            target = value
        elif isinstance(value, Tensor):
            target = GPU if isinstance(value, OnGpu) else torch.device("cpu")
            left.append(value.dtype)
        elif not isinstance(value, bool):
            left.append(value)
    return target, left


def _moving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Module.to` and `Module.cuda`: parameters and buffers change their class."""

    @functools.wraps(original)
    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        named = [*args, kwargs.get("device")]
        asks = original.__name__ == "cuda" or any(
            isinstance(x, (str, torch.device)) and _is_gpu(x) for x in named
        )
        with torch._C.DisableTorchFunction():
            rest = [x for x in args if not (isinstance(x, (str, torch.device)) and _is_gpu(x))]
            dtypes = {k: v for k, v in kwargs.items() if k != "device" or not _is_gpu(v)}
            if (rest or dtypes) and original.__name__ != "cuda":
                was = [x for x in (*self.parameters(), *self.buffers()) if isinstance(x, OnGpu)]
                _as_cpu(self)
                original(self, *rest, **dtypes)
                asks = asks or bool(was)
        if asks:
            _as_gpu(self)
        return self

    return to


def _as_gpu(module: torch.nn.Module) -> None:
    for part in module.modules():
        for held in part._parameters.values():
            if held is not None and not isinstance(held, OnGpu):
                held.__class__ = ParameterOnGpu
        for name, held in part._buffers.items():
            part._buffers[name] = mark(held)


def _as_cpu(module: torch.nn.Module) -> None:
    for part in module.modules():
        for held in part._parameters.values():
            if isinstance(held, OnGpu):
                held.__class__ = torch.nn.Parameter
        for name, held in part._buffers.items():
            part._buffers[name] = plain(held)


def _plain_type(value: Any) -> type:
    return Tensor if isinstance(value, OnGpu) else type(value)


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * max(end.at - self.at, 1e-6)


def _record(self: Any, run: Callable[[], Tensor]) -> Any:
    """Stand in for a capture: a replay runs the forward again."""
    from eapo_fast.engine.graphs import _Captured

    run()
    logits = run().clone()

    def replay() -> None:
        logits.copy_(run())

    return _Captured(replay, logits)


def _open_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the inside of our operators keep account too; torch calls it without."""
    from eapo_fast.kernels.linear_policy_loss import operator as linear_loss
    from eapo_fast.kernels.linear_token_stats import operator as linear_stats
    from eapo_fast.kernels.policy_loss import operator as loss

    def opened(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not _used_by_gpu[0]:
                return function(*args, **kwargs)
            with torch._C._EnableTorchFunction(), _Devices():
                args, kwargs = tree_map_only(Tensor, mark, (args, kwargs))
                return tree_map_only(Tensor, plain, function(*args, **kwargs))

        return run

    operators = (loss.policy_loss, linear_loss.policy_loss, linear_stats.token_stats,
                 linear_stats.token_stats_backward)  # fmt: skip
    for operator in operators:
        held: Any = operator
        monkeypatch.setitem(held._backend_fns, None, opened(held._backend_fns[None]))
        if held._backward_fn is not None:
            monkeypatch.setattr(held, "_backward_fn", opened(held._backward_fn))


_used_by_gpu = [False]
"""Whether the operator that runs got tensors on the GPU."""


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend within the block that this machine has a GPU."""
    from triton.runtime import interpreter

    from eapo_fast.engine import fused_target, head
    from eapo_fast.engine.graphs import DecodeGraphs

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=_FREE, major=9, minor=0, multi_processor_count=132
    )
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda _: nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (_FREE, _FREE),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "is_bf16_supported": lambda *_: True,
        "utilization": lambda *_: 50,
        "set_sync_debug_mode": lambda _: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": lambda _: None,
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: nullcontext(),
        "Event": _Event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setitem(sys.modules, "eapo_fast._cuda", None)  # it would see what they are
    monkeypatch.delattr(eapo_fast, "_cuda", raising=False)
    for name in ("to", "cuda"):
        monkeypatch.setattr(torch.nn.Module, name, _moving(getattr(torch.nn.Module, name)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(DecodeGraphs, "_record", _record)
    for module in (head, fused_target):  # they take no subclasses of tensors but these
        monkeypatch.setattr(module, "type", _plain_type, raising=False)
    _map_autocast(monkeypatch)
    _open_operators(monkeypatch)
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if any(not isinstance(x, OnGpu) for x in leaves) and not _in_backward():
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        with torch._C.DisableTorchFunction():
            return launch(self, *map(plain, args), **{k: plain(v) for k, v in kwargs.items()})

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    with _Devices():
        yield


def _map_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have autocast of a GPU be autocast of the CPU."""
    init = torch.autocast.__init__

    def made(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu", *args, **kwargs)

    monkeypatch.setattr(torch.autocast, "__init__", made)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *_, original=original: original("cpu"))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As a plugin: before anybody asks whether there is a GPU, and to the end."""
    _kept.append(pretended(pytest.MonkeyPatch()))
    _kept[0].__enter__()


_kept: list[Any] = []
