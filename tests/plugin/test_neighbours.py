"""All the plugins that people load beside this one, loaded together and all at work."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
NEIGHBOURS = {
    "xdist": "xdist",
    "timeout": "pytest_timeout",
    "rerunfailures": "pytest_rerunfailures",
    "randomly": "pytest_randomly",
    "cov": "pytest_cov",
    "memray": "pytest_memray",
    "html": "pytest_html",
}
MISSING = [name for name, module in NEIGHBOURS.items() if not importlib.util.find_spec(module)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
ALL = (
    *("--timeout=60", "--reruns=1", "-p", "randomly", "--randomly-seed=7"),
    *("--cov=test_suite", "--cov-report=json:cov.json", "--memray"),
    *("--html=all.html", "--self-contained-html", "--junitxml=junit.xml", "--gpu-report=out"),
)
CHECKS = """
    import pytest
    from pathlib import Path
    from pytest_multigpu.records.check import Record

    pytestmark = [pytest.mark.quick, pytest.mark.check(needs="machine")]

    def test_gpus(gpu_inventory):
        return Record(name="GPUs", outcome="passed", measured=len(gpu_inventory.gpus))

    def test_flaky():
        again = Path("tried").exists()
        Path("tried").touch()
        return Record(name="flaky", outcome="passed" if again else "failed", reason="not yet")

    def test_links():
        return Record(name="links", outcome="{links}", device="GPU 1",
                      reason="" if "{links}" == "passed" else "it is slow", remedy="")
"""
SUITE = """
    import pytest

    @pytest.mark.gpu(count=2)
    def test_two(gpu_inventory):
        assert len(gpu_inventory.visible) == 2

    @pytest.mark.gpu(count=3)
    def test_three():
        pass

    @pytest.mark.xfail
    def test_known():
        assert 0

    def test_plain():
        assert [0] * 1000
"""


@pytest.mark.parametrize("distributed", [(), ("-n2",)], ids=["alone", "n2"])
@pytest.mark.parametrize("links", ["passed", "failed"])
def test_all_together(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    distributed: tuple[str, ...],
    links: str,
) -> None:
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_GPUS", "2")
    monkeypatch.setenv("TMPDIR", str(pytester.path))
    pytester.makepyfile(test_checks=CHECKS.replace("{links}", links), test_suite=SUITE)
    result = pytester.runpytest_subprocess(
        *ALL, *distributed, "-p", "fake_machine", "-p", "no:cacheprovider", timeout=120
    )
    output = result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in output
    line = (
        "READY: llama-3.3-70b in 16bit on 2 x NVIDIA H100 80GB HBM3: 3 checks passed, 3 own "
        "tests passed, 1 warning, 1 skipped (no model was loaded)"
    )
    if links == "failed":
        line = "NOT READY: GPU 1: it is slow"
    assert result.outlines[-1] == line
    assert sum("READY: " in row for row in result.outlines) == 1
    assert result.ret == (links == "failed")

    report = json.loads(Path("out/report.json").read_text())
    assert (report["line"], report["exit_code"]) == (line, result.ret)
    rows = {(row["name"], row["outcome"]) for row in report["checks"]}
    assert {("GPUs", "passed"), ("flaky", "passed"), ("reruns", "warned"), ("links", links)} <= rows
    assert ("test_three", "skipped") in rows
    if not distributed:  # randomly shuffles, and the checks come first all the same
        names = [row["nodeid"].partition("::")[0] for row in report["checks"]]
        assert names == sorted(names)

    page = Path("out/report.html").read_text()
    assert "it is slow" in page if links == "failed" else "READY" in page
    cases = ElementTree.parse("junit.xml").findall(".//testcase")
    found = {(case.get("name"), row.get("name")) for case in cases for row in case.iter("property")}
    assert {("test_gpus", "GPUs"), ("test_links", "links [GPU 1]")} <= found
    assert "test_plain" in Path("all.html").read_text()
    coverage = json.loads(Path("cov.json").read_text())
    assert coverage["totals"]["percent_covered"] > 50
    assert "MEMRAY REPORT" in output
    assert "7" in output.partition("Using --randomly-seed=")[2][:2]
