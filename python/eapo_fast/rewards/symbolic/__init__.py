"""Tier 4: what only computer algebra decides, in processes that may be killed at any time.

The caller's process never imports sympy. It starts one template process, which imports sympy once
and forks a worker for each check (`template`); the caller talks to the workers over sockets in
JSON lines (`pool`). A worker reads the two answers with our own grammar, builds sympy objects by
explicit constructors (`build`) and compares them (`decide`). A worker serves one check and ends,
so nothing that one check did reaches another, and no verdict depends on those before it.
"""

from __future__ import annotations

from eapo_fast.rewards.symbolic.pool import NoWorkers, Pool, WorkerFailure, shared_pool

__all__ = ["STOPPED", "NoWorkers", "Pool", "WorkerFailure", "shared_pool"]

STOPPED = "computer algebra was stopped at its limits"
"""The reason of an undecided verdict, whichever limit came first."""
