"""``--gpu-plan``: print the plan, and what else to rent or change, then exit."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from .beside_plan import longest_contexts, rentable
from .judging.visibility import BY_BUS, order_unknown
from .options import Settings
from .records.report import RunReport
from .report.folder import ReportFile
from .report.rent import rent_lines
from .report.terminal import plan_lines
from .session import GpuSession


def print_plan(settings: Settings, *, verbosity: int = 0) -> int:
    """0 if the plan fits, 1 if not.

    :raises UsageError: bad input.
    """
    session = GpuSession(settings, os.environ)
    session.plans.check_inputs()
    plan = session.plan
    if verbosity > 0 and settings.tier != "cpu":
        plan = replace(plan, longest=longest_contexts(session.plans))
    rows = rentable(session.plans)
    for line in [*plan_lines(plan, verbosity=verbosity), *rent_lines(rows, plan)]:
        print(line.text)
    if session.machine.expandable_segments:
        print("\npeaks are those with expandable segments, which the environment asks for")
    if (problem := session.machine.order_problem) is not None:
        print(f"\n{order_unknown(problem)}; {BY_BUS}")
    if settings.report_dir is not None:
        report = RunReport(started=time.time(), tier_asked=settings.tier, versions=session.versions)
        facts = {**session.facts(), "plan": plan}
        ReportFile(settings.report_dir).update(replace(report, **facts))
    return 0 if plan.fits else 1
