"""The baseline file: read whole, updated key by key, replaced atomically.

Imports the pure rules of :mod:`pytest_multigpu.judging.baseline` and its file's form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError
from ..files import read_text
from ..judging.baseline import merged
from ..judging.baseline_file import dump_baselines, parse_baselines
from ..records.baseline import Baseline, Measurement
from .atomic import locked, write_json


def read_baselines(path: Path) -> dict[str, Baseline]:
    """Every baseline of the file by its key's text; empty if there is no file yet.

    :raises UsageError: unreadable or damaged; the text names file and key.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name another file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8; delete it or name another file") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}); delete it or repair it") from error
    return parse_baselines(data, str(path))


def update_baseline(path: Path, key: str, new: Iterable[Measurement]) -> Baseline:
    """Write this run's numbers under its key; every other key stays as it is.

    Two runs that update at once wait for each other; whoever is killed leaves a whole file.

    :raises UsageError: damaged or unwritable file, or nothing to record.
    """
    try:
        with locked(path.parent):
            baselines = read_baselines(path)
            baseline = merged(baselines.get(key), key, new)
            if not baseline.values:
                raise UsageError(
                    "--gpu-baseline-update: this run measured nothing to record; run more than "
                    "the quick checks"
                )
            write_json(path, dump_baselines({**baselines, key: baseline}))
    except OSError as error:
        raise _unwritable(path, error) from error
    return baseline


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be written ({error.strerror}); name another file")
