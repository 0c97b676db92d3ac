"""`consults.jsonl` of a run: one sealed line for each consult, tied to the tokens it put in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapo_fast.errors import DataError
from eapo_fast.experts import ConsultScheduler
from eapo_fast.experts.lines import digest, sealed, unsealed
from eapo_fast.rollout.provenance import consult_lines

if TYPE_CHECKING:
    from eapo_fast.training.generation import Generation


class ConsultLog:
    """Appends a generation's consults at once; they are on disk before the update begins.

    Args:
        path: the file; a fresh run keeps an earlier one as `<name>.old`.
        run: name of the run.
        resume_step: go on after this step: later lines (of a run that died) are cut off.
    """

    def __init__(self, path: Path, run: str, resume_step: int | None) -> None:
        self.path = path
        self._run = run
        self._file: Any = None
        self._experts: set[str] = set()
        if not path.exists():
            return
        if resume_step is None:
            path.replace(path.with_name(path.name + ".old"))
        else:
            self._cut(resume_step)

    def write(self, step: int, generation: Generation, scheduler: ConsultScheduler) -> None:
        """Write the lines of a generation; one without consults writes none."""
        lines = [
            line
            for rollout, leaks in zip(generation.rollouts, generation.leaks, strict=True)
            for line in consult_lines(rollout, run=self._run, step=step, leaks=leaks)
        ]
        if not lines:
            return
        identity = str(getattr(scheduler.expert, "identity", type(scheduler.expert).__qualname__))
        name = digest(identity)
        if name not in self._experts:
            self._experts.add(name)
            head = {"kind": "expert", "step": step, "identity": identity, "name": name}
            lines.insert(0, head)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write("".join(sealed(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut(self, step: int) -> None:
        kept = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = unsealed(text)
            except DataError:
                break  # the torn tail of the run that died
            if line["step"] > step:
                break
            kept.append(text + "\n")
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)
