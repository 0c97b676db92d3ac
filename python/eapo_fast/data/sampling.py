"""Which prompts come next: a seeded order that can be stopped and resumed at any place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eapo_fast.errors import ConfigError, DataError

_WORD = 1 << 64


class PromptSampler:
    """Endless batches of row indices, epoch after epoch.

    Each epoch is one permutation of the rows; what does not fill a batch at its end is dropped.
    The permutation of an epoch is a pure function of (num_rows, seed, epoch): the rows sorted by
    the raw output of a Philox generator keyed by seed and epoch.
    """

    def __init__(self, num_rows: int, batch_prompts: int, seed: int, shuffle: bool = True) -> None:
        """
        Args:
            num_rows: Rows of the data set.
            batch_prompts: Prompts of one batch.
            seed: Seed of the order.
            shuffle: False keeps the order of the data set in every epoch.

        Raises:
            ConfigError: There are fewer rows than one batch needs.
        """
        if batch_prompts < 1:
            raise ConfigError(f"batch_prompts: got {batch_prompts}, allowed is 1 or more")
        if num_rows < batch_prompts:
            raise ConfigError(
                f"the data set has {num_rows} usable prompts, but one batch takes {batch_prompts} "
                "different ones (completions sampled at once / num_generations). Add rows, or "
                "lower per_device_train_batch_size or gradient_accumulation_steps, or raise "
                "num_generations"
            )
        self.num_rows = num_rows
        self.batch_prompts = batch_prompts
        self.seed = seed
        self.shuffle = shuffle
        self.batches_drawn = 0
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Full batches of one epoch."""
        return self.num_rows // self.batch_prompts

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self.batches_drawn // self.batches_per_epoch

    def next(self) -> list[int]:
        """Return the row indices of the next batch."""
        epoch, batch = divmod(self.batches_drawn, self.batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._permutation(epoch)
        self.batches_drawn += 1
        start = batch * self.batch_prompts
        return [int(row) for row in self._order[1][start : start + self.batch_prompts]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in, as JSON-able values."""
        return {
            "num_rows": self.num_rows,
            "batch_prompts": self.batch_prompts,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "batches_drawn": self.batches_drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler was.

        Raises:
            DataError: The state belongs to other data, another batch size or another order.
        """
        mine = self.state_dict()
        differing = [
            f"{name} was {state.get(name)!r}, is {value!r}"
            for name, value in mine.items()
            if name != "batches_drawn" and state.get(name) != value
        ]
        if differing:
            raise DataError(f"the saved prompt order does not fit: {'; '.join(differing)}")
        self.batches_drawn = int(state["batches_drawn"])

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self.shuffle:
            return np.arange(self.num_rows, dtype=np.int64)
        key = np.array([self.seed % _WORD, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(self.num_rows)
        return np.argsort(draws, kind="stable").astype(np.int64)
