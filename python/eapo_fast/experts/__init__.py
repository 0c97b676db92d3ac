"""Experts, and the desk at which a policy consults them (EAPO, arXiv 2509.23730).

    with ConsultScheduler(Calculator(), ConsultPolicy(schedule="inverse")) as desk:
        handle = desk.submit(ConsultRequest("48/2", step=1))
        desk.flush()
        print(handle.result().text)

A consult passes the gate (a keyed draw, made before anything is sent), the cache, the flights
that equal requests share, and the budget; then it is batched and sent. It always ends, as data:
one `ConsultResult` with a status of a closed list.
"""

from __future__ import annotations

from eapo_fast.experts.arithmetic import Limits
from eapo_fast.experts.base import (
    STATUSES,
    Attempt,
    ConsultHandle,
    ConsultRequest,
    ConsultResult,
    ConsultStatus,
    Expert,
    ExpertFailure,
    ExpertReply,
    ReplayMismatch,
    Trace,
    Usage,
)
from eapo_fast.experts.budget import Budget, Ledger
from eapo_fast.experts.calculator import Calculator
from eapo_fast.experts.function import Function
from eapo_fast.experts.gate import acceptance
from eapo_fast.experts.local import LocalModel
from eapo_fast.experts.openai import OpenAICompatible
from eapo_fast.experts.policy import ConsultPolicy
from eapo_fast.experts.pool import Pool
from eapo_fast.experts.recording import Recorded
from eapo_fast.experts.sanitize import clean_text, escape_tags
from eapo_fast.experts.scheduler import ConsultScheduler

__all__ = [
    "STATUSES",
    "Attempt",
    "Budget",
    "Calculator",
    "ConsultHandle",
    "ConsultPolicy",
    "ConsultRequest",
    "ConsultResult",
    "ConsultScheduler",
    "ConsultStatus",
    "Expert",
    "ExpertFailure",
    "ExpertReply",
    "Function",
    "Ledger",
    "Limits",
    "LocalModel",
    "OpenAICompatible",
    "Pool",
    "Recorded",
    "ReplayMismatch",
    "Trace",
    "Usage",
    "acceptance",
    "clean_text",
    "escape_tags",
]
