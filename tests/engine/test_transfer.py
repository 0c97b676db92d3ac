"""Small arrays on their way to a device and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eapo_fast.engine import transfer


def arrays() -> list[np.ndarray]:
    return [
        np.arange(5, dtype=np.int32) - 2,
        np.linspace(-1, 1, 7, dtype=np.float32),
        np.zeros(0, dtype=np.int32),
        np.array([np.nan, np.inf, 1e-40], dtype=np.float32),
        np.arange(8, dtype=np.int32),
    ]


def test_packed_arrays_keep_their_bits_and_begin_aligned() -> None:
    given = arrays()
    packed = torch.from_numpy(transfer._packed(given))
    found = transfer._unpacked(packed, given)
    for tensor, array in zip(found, given, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.numpy().tobytes() == array.tobytes()
        assert (tensor.data_ptr() - packed.data_ptr()) % 16 == 0


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "meta",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
            ],
        ),
    ],
)
def test_there_and_back(device: str) -> None:
    given = arrays()
    sent = transfer.upload(given, torch.device(device))
    assert [tuple(x.shape) for x in sent] == [x.shape for x in given]
    assert [x.dtype for x in sent] == [torch.int32, torch.float32] * 2 + [torch.int32]
    assert all(x.device.type == device for x in sent)
    if device != "meta":
        for back, array in zip(transfer.download(sent), given, strict=True):
            assert back.tobytes() == array.tobytes()
