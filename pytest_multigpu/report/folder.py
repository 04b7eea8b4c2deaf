"""The folder of ``--gpu-report``: ``report.json`` and ``device_map.json``, kept up to date;
``drift.json`` (:mod:`.drift`) stays from run to run.

Imports records, errors and its neighbours in this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.report import RunReport
from .atomic import write_json
from .drift import DRIFT_FILE
from .json import SCHEMA, to_json

REPORT_FILE, DEVICE_MAP_FILE, HTML_FILE = "report.json", "device_map.json", "report.html"
_TEMPORARY = tuple(f".{name}." for name in (REPORT_FILE, DEVICE_MAP_FILE, DRIFT_FILE))


class ReportFile:
    """``report.json`` and ``device_map.json`` in one folder, up to date with the run."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing: a run that only collects leaves the earlier report as it is."""
        self.folder = folder
        self._opened = False
        self._map: dict[str, int | str] | None = None

    def open(self) -> None:
        """Make the folder, and clear it of an earlier run's report, once.

        :raises UsageError: the folder cannot be made or written.
        """
        if self._opened:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (REPORT_FILE, DEVICE_MAP_FILE, HTML_FILE):
                # What an earlier run left must not pass for this one's.
                (self.folder / name).unlink(missing_ok=True)
            for left in self.folder.glob(".*.tmp"):
                if left.name.startswith(_TEMPORARY):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"--gpu-report: cannot write to {self.folder} ({error.strerror}); name a folder "
                "that can be written"
            ) from error
        self._opened = True

    def update(self, report: RunReport) -> None:
        """Rewrite ``report.json``; and ``device_map.json`` when the map is known or changed.

        :raises OSError: a file cannot be written.
        :raises UsageError: the folder cannot be.
        """
        self.open()
        write_json(self.folder / REPORT_FILE, to_json(report))
        found = report.placement.device_map if report.placement is not None else {}
        device_map = dict(found or (report.plan.device_map if report.plan is not None else {}))
        if device_map and device_map != self._map:
            write_json(self.folder / DEVICE_MAP_FILE, device_map)
            self._map = device_map


def read_report(path: Path) -> dict[str, Any]:
    """A ``report.json`` as :func:`to_json` made it.

    :raises UsageError: missing, damaged, or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is not a report of schema {SCHEMA}")
    return data
