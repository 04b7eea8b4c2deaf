"""The fault campaign: plants one fault at a time into a real run and demands its verdict.

``python benchmarks/faults.py`` plants on the CPU, with a fake machine where GPUs are needed;
``--gpu`` plants on this machine's GPUs for real. ``--only NAME`` picks faults by their names,
``--healthy N`` adds N runs without a fault, which must be READY. It prints fault, expected and
actual verdict, exit code and seconds; ends with 1 if any differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.fault import Fault, NotHereError  # noqa: E402  (as a file it finds them now)

SUPPORT = ROOT / "tests" / "support"
CLEARED = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "RUNPOD_GPU_COUNT",
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run said."""

    name: str
    issue: int
    expected: str
    actual: str
    exit: int | None
    seconds: float
    ok: bool
    why: str = ""
    """Why it is not ok, or why it could not be planted (then ``exit`` is None)."""
    red: tuple[str, ...] = ()
    """Every red record, shortened."""


def run_fault(fault: Fault, *, keep: Path | None = None) -> Result:
    """Plant, run pytest in a process of its own, and compare."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fault-")))
        try:
            if fault.around is not None:
                stack.enter_context(fault.around(folder))
            values = dict((fault.prepare(folder) if fault.prepare else None) or {})
        except NotHereError as error:
            return _result(fault, "not planted", None, 0.0, ok=True, why=str(error))
        command = _command(fault, folder, values)
        environ = {k: v for k, v in os.environ.items() if k not in CLEARED}
        environ |= {"PLANT": json.dumps(fault.plants), "PYTHONPATH": _python_path(environ)}
        # One thread for each run: several run beside each other.
        environ |= {"OMP_NUM_THREADS": "1", "PY_COLORS": "0"}
        environ |= {name: text.format(folder=folder, **values) for name, text in fault.env.items()}
        began = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environ,
                capture_output=True,
                text=True,
                timeout=fault.limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            why = f"it did not end within {fault.limit:g} s"
            return _result(fault, "no end", None, fault.limit, ok=False, why=why)
        seconds = time.monotonic() - began
        if keep is not None:
            (keep / f"{fault.name.replace('/', '-')}.txt").write_text(done.stdout + done.stderr)
        report = _read(folder / "report" / "report.json")
        actual, why = judge(fault, done.returncode, done.stdout, done.stderr, report)
        if fault.never and (folder / fault.never).exists():
            why = f"{fault.never} has come about"
        rows = red_rows(report) if report is not None else []
        found = _result(fault, actual, done.returncode, seconds, ok=not why, why=why)
        return replace(found, red=tuple(row[:200] for row in rows))


def _command(fault: Fault, folder: Path, values: Mapping[str, str]) -> list[str]:
    checks = ["--pyargs", "pytest_multigpu.checks"] if fault.checks else []
    return [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
        *("-p", "no:hypothesispytest", "-p", "no:randomly", "-p", "plant", f"--rootdir={folder}"),
        *(f"--gpu-report={folder}/report", *checks),
        *(part.format(folder=folder, **values) for part in _split(fault.args)),
    ]


def _split(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


def _python_path(environ: Mapping[str, str]) -> str:
    before = environ.get("PYTHONPATH")
    return os.pathsep.join([str(SUPPORT), str(ROOT), *([before] if before else [])])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    assert isinstance(found, dict)
    return found


def judge(
    fault: Fault, code: int, stdout: str, stderr: str, report: dict[str, Any] | None
) -> tuple[str, str]:
    """What the run said in a line, and why that is wrong; empty if it is right."""
    if fault.killed:
        running = (report or {}).get("running")
        actual = f"killed during {running}" if code < 0 else f"ended with {code}"
        whole = code == -9 and report is not None and report["verdict"] is None
        good = whole and re.search(fault.reason, str(running))
        return actual, "" if good else "the report does not name what was running"
    if code == 4:
        errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")]
        actual = errors[-1] if errors else "usage error without a text"
        return actual, _differences(fault, code, actual, [])
    lines = [line for line in stdout.splitlines() if line.strip()]
    actual = lines[-1] if lines else "nothing was printed"
    if report is None or not actual.startswith(("READY: ", "NOT READY: ")):
        return actual, f"no verdict; {stderr.strip().splitlines()[-1:]}"
    if report["line"] != actual or report["exit_code"] != code:
        return actual, "the report says something else"
    red = red_rows(report, strict="--gpu-strict" in fault.args)
    # What READY rests on is red where it is unmeasured, strict or not.
    return actual, _differences(fault, code, actual, red, red_rows(report, strict=True))


def _differences(
    fault: Fault, code: int, actual: str, red: Sequence[str], told: Sequence[str] = ()
) -> str:
    if code != fault.exit:
        return f"exit {code} in place of {fault.exit}"
    if not fault.exit and not actual.startswith("READY: "):
        return "not READY"
    if not re.search(fault.line or fault.reason, actual):
        return "the last line gives another reason"
    if red and not any(re.search(fault.reason, row) for row in told):
        return "no record has that reason"
    allowed = (fault.reason, *fault.also)
    other = [row for row in red if not any(re.search(text, row) for text in allowed)]
    return f"also red: {other[0]}" if other else ""


def red_rows(report: Mapping[str, Any], *, strict: bool = False) -> list[str]:
    """``GPU 1 -> GPU 2: 512 of 1,024 bytes differ; rent another``: every red row of a report."""
    outcomes = ("failed", "error", "unknown") if strict else ("failed", "error")
    return [
        f"{row['device']}: {row['reason'] or row['name']}; {row['remedy']}".removeprefix(": ")
        for row in report["checks"]
        if row["outcome"] in outcomes
    ]


def _result(
    fault: Fault, actual: str, code: int | None, seconds: float, *, ok: bool, why: str
) -> Result:
    return Result(
        name=fault.name,
        issue=fault.issue,
        expected=fault.expected,
        actual=actual,
        exit=code,
        seconds=round(seconds, 1),
        ok=ok,
        why=why,
    )


def run_all(faults: Sequence[Fault], *, jobs: int, keep: Path | None) -> Iterator[Result]:
    """Results as they come: those that may have company first, ``jobs`` at a time."""
    shared = [fault for fault in faults if not fault.alone]
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(lambda fault: run_fault(fault, keep=keep), shared)
    for fault in faults:
        if fault.alone:
            yield run_fault(fault, keep=keep)


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    rows = [
        "| fault | issue | expected | said | exit | s | |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        end = "-" if one.exit is None else str(one.exit)
        mark = "NOT OK" if not one.ok else "ok" if one.exit is not None else "not planted"
        said = f"{one.actual} ({one.why})" if one.why else one.actual
        cells = (one.name, str(one.issue), one.expected, said, end, f"{one.seconds:.1f}", mark)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def summary(results: Sequence[Result]) -> str:
    planted = [one for one in results if one.exit is not None or not one.ok]
    wrong = [one.name for one in planted if not one.ok]
    text = f"{len(planted)} runs, {len(planted) - len(wrong)} as expected"
    left = len(results) - len(planted)
    text += f", {left} not planted here" if left else ""
    return text + (f"; NOT OK: {', '.join(wrong)}" if wrong else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpu", action="store_true", help="plant on this machine's GPUs")
    parser.add_argument("--only", default="", help="a regular expression on the names")
    parser.add_argument("--healthy", type=int, default=0, metavar="N")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (CPU: 2, GPU: 4)")
    parser.add_argument("--out", type=Path, help="results in JSON")
    parser.add_argument(
        "--update", action="store_true", help="keep the other rows that --out has already"
    )
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--keep", type=Path, help="a folder for what every run printed")
    options = parser.parse_args()
    if options.gpu:
        from benchmarks.fault_table_gpu import FAULTS, HEALTHY
    else:
        from benchmarks.fault_table import FAULTS, HEALTHY
    chosen = [fault for fault in FAULTS if re.search(options.only, fault.name)]
    chosen += [HEALTHY[i % len(HEALTHY)] for i in range(options.healthy)]
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    known = {fault.name for fault in [*FAULTS, *HEALTHY]}
    began = time.monotonic()
    results = []
    jobs = options.jobs or (4 if options.gpu else 2)
    for one in run_all(chosen, jobs=jobs, keep=options.keep):
        results.append(one)
        mark = "ok    " if one.ok else "NOT OK"
        print(f"{mark} {one.seconds:5.1f} s  {one.name}", flush=True)
        if not one.ok or one.exit is None:
            print(f"       expected {one.expected}\n       said {one.actual}\n       {one.why}")
        _write(options, results, known)  # a campaign that is cut short leaves what it knew
    print(f"{summary(results)}; {time.monotonic() - began:.0f} s")
    return 0 if results and all(one.ok for one in results) else 1


def _write(options: argparse.Namespace, results: Sequence[Result], known: set[str]) -> None:
    if options.update and options.out is not None and options.out.exists():
        before = json.loads(options.out.read_text())["results"]
        results = updated([row for row in before if row["name"] in known], results)
    seconds = round(sum(one.seconds for one in results))
    if options.out is not None:
        everything = {
            "summary": summary(results),
            "seconds of all runs": seconds,
            "hardware": _hardware(gpu=options.gpu),
            "versions": _versions(),
            "results": [asdict(one) for one in results],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(everything, indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(
            f"{summary(results)}; runs took {seconds} s in all.\n\n{table(results)}\n"
        )


def updated(before: Sequence[Mapping[str, Any]], new: Sequence[Result]) -> list[Result]:
    """Rows of an earlier run, those of the same name replaced, and what is new."""
    by_name = {one.name: one for one in new}
    kept = [by_name.pop(row["name"]) if row["name"] in by_name else Result(**row) for row in before]
    return kept + list(by_name.values())


def _hardware(*, gpu: bool) -> list[str]:
    if not gpu:
        return [f"{os.cpu_count()} cores, {platform.machine()}"]
    from pytest_multigpu.machine.nvml import read_machine

    return [f"GPU {one.index}: {one.name}" for one in read_machine().gpus]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "pytest"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
