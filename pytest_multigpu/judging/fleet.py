"""One verdict over several machines that each ran everything. Pure: records only."""

from __future__ import annotations

from collections.abc import Sequence

from ..records.report import Pod, Verdict
from .verdict import EXIT_FAILED, EXIT_OK, EXIT_SHORTFALL, scope_of


def label(pod: Pod) -> str:
    """``gw0 (host-a)``"""
    return f"{pod.name} ({pod.host})" if pod.host else pod.name


def decide_fleet(pods: Sequence[Pod], whole: Verdict) -> Verdict:
    """READY if every machine is; else which are not, with the worst reason of each.

    :param pods: with their own verdicts.
    :param whole: the verdict over all tests together: how pytest itself ended.
    """
    kept = whole.exit_code not in (EXIT_OK, EXIT_FAILED, EXIT_SHORTFALL)
    if not pods or kept or not whole.checked:
        return whole
    verdicts = [(pod, pod.report.verdict) for pod in pods]
    bad = [(pod, verdict) for pod, verdict in verdicts if verdict is None or not verdict.ready]
    total = f"{len(pods)} machine{'' if len(pods) == 1 else 's'}"
    if not bad:
        if not whole.ready:
            return whole
        line = f"READY: {total}, every one ready{scope_of(pods[0].report)}"
        return Verdict(ready=True, exit_code=EXIT_OK, line=line)
    reasons = tuple(
        f"{label(pod)}: {verdict.reasons[0] if verdict and verdict.reasons else 'no verdict'}"
        for pod, verdict in bad
    )
    codes = {verdict.exit_code if verdict else EXIT_FAILED for _, verdict in bad}
    code = next((c for c in (EXIT_FAILED, EXIT_SHORTFALL) if c in codes), EXIT_OK)
    more = f" (+{len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return Verdict(
        ready=False,
        exit_code=code,
        line=f"NOT READY: {len(bad)} of {total}: {reasons[0]}{more}",
        reasons=reasons,
    )
