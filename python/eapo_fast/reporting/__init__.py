"""What a run tells its user: live view, metrics, curves, report page, closing summary.

Nothing here imports torch; rich and matplotlib are imported where they are used.
"""

from __future__ import annotations

from eapo_fast.reporting.curves import plot_curves
from eapo_fast.reporting.live import LiveView
from eapo_fast.reporting.metrics import MetricsLog, read_jsonl
from eapo_fast.reporting.report import write_report
from eapo_fast.reporting.stats import wilson
from eapo_fast.reporting.summary import print_summary, summarise

__all__ = [
    "LiveView",
    "MetricsLog",
    "plot_curves",
    "print_summary",
    "read_jsonl",
    "summarise",
    "wilson",
    "write_report",
]
