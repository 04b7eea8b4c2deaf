"""GitHub: annotations worst first and escaped, a summary within the limit; JUnit properties."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from report_examples import check, copies, few_gpus, four_h100s, free_vram, speed

from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.check import Outcome, Record
from pytest_multigpu.records.report import CheckResult, RunReport
from pytest_multigpu.report.github import (
    SUMMARY_BYTES,
    annotation_lines,
    step_summary,
    write_step_summary,
)
from pytest_multigpu.report.junit import properties


def red() -> RunReport:
    report = four_h100s(few_gpus(), speed(), copies(broken=(0, 2)), free_vram())
    return replace(report, verdict=decide(report))


def test_annotations_worst_first() -> None:
    assert annotation_lines(red()) == [
        "::error title=copy speed (GPU 0 -> GPU 2)::"
        "GPU 0 -> GPU 2 is slow; rent a machine with NVLink",
        "::error title=GPUs::needs 2 GPUs with 40.0 GiB free each; found 1 "
        "(GPU 0: 79.2 GiB free); rent 2 or more",
        "::warning title=decode speed::decoding is slower than half the bandwidth floor; "
        "torch.backends.cuda.enable_cudnn_sdp(False)",
    ]


def test_green_has_none_and_not_ready_always_has_one() -> None:
    report = four_h100s(free_vram())
    assert annotation_lines(replace(report, verdict=decide(report))) == []
    nothing = RunReport()
    lines = annotation_lines(replace(nothing, verdict=decide(nothing, strict=True)))
    assert lines == ["::error title=NOT READY::NOT READY: no check was executed"]
    # Only people's own tests ran, and none failed.
    assert annotation_lines(replace(nothing, verdict=decide(nothing))) == []


def test_escaping() -> None:
    record = Record(name="a:b,c\n%", outcome="failed", reason="100%\r\n::error::x")
    assert annotation_lines(RunReport(checks=(check("x", record),))) == [
        "::error title=a%3Ab%2Cc%0A%25::100%25%0D%0A::error::x"
    ]


def test_a_crash_and_a_record_without_reason() -> None:
    crash = CheckResult(nodeid="t.py::test_c", outcome="error", reason="OSError: x")
    bare = check("x", Record(name="tokens", outcome="failed", expected="equal", measured="differ"))
    assert annotation_lines(RunReport(checks=(crash, bare))) == [
        "::error title=tokens::expected equal, measured differ",
        "::error title=test_c::t.py::test_c error: OSError: x",
    ]


def many(outcome: Outcome, count: int) -> CheckResult:
    records = (Record(name=f"r{i}", outcome=outcome, reason="why") for i in range(count))
    return check("x", *records)


def test_at_most_ten_of_each() -> None:
    assert len(annotation_lines(RunReport(checks=(many("failed", 10),)))) == 10
    lines = annotation_lines(RunReport(checks=(many("failed", 11), many("unknown", 30))))
    assert sum(line.startswith("::error ") for line in lines) == 10
    assert sum(line.startswith("::warning ") for line in lines) == 10
    assert lines[9] == "::error title=2 more::r9; r10"


def test_summary() -> None:
    text = step_summary(red())
    assert text.startswith(
        "## NOT READY: GPU 0 -\\> GPU 2 is slow; rent a machine with NVLink (+1 more)\n"
    )
    assert "| GPU 0 | NVIDIA H100 80GB HBM3 | 0-18 | 32.2 | 0.1 | 33.8 | 36.3 | 78.7 |  |" in text
    rows = [
        line for line in text.splitlines() if line.startswith(("| failed", "| warned", "| pas"))
    ]
    assert [row.split(" | ")[0] for row in rows] == [
        "| failed",
        "| failed",
        "| warned",
        "| passed",
        "| passed",
    ]
    assert rows[3] == (
        "| passed | copy speed | 11 pairs | at least 20 GB/s | 151.0 to 182.0 GB/s |  |"
    )


def test_markdown_in_names_stays_text() -> None:
    evil = Record(name="a|b<img src=x>\n# h", outcome="failed", reason="*x* `y` [z](w) &amp;")
    text = step_summary(RunReport(checks=(check("x", evil),)))
    assert "a\\|b\\<img src=x\\> \\# h" in text
    assert "\\*x\\* \\`y\\` \\[z\\](w) &amp;amp;" in text


def test_summary_is_cut_at_whole_rows_to_the_limit() -> None:
    report = RunReport(checks=(many("failed", 400),))
    whole = step_summary(report)
    size = len(whole.encode())
    assert step_summary(report, limit_bytes=size) == whole
    cut = step_summary(report, limit_bytes=size - 1)
    assert len(cut.encode()) <= size - 1
    assert cut.endswith("|\n\n(cut: more than GitHub shows; see report.json)\n")


def test_writing(tmp_path: Path) -> None:
    assert not write_step_summary(red(), {})
    path = tmp_path / "summary"
    path.write_text("earlier\n")
    assert write_step_summary(red(), {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.read_text() == "earlier\n" + step_summary(red())
    path.write_bytes(b"x" * (SUMMARY_BYTES - 5000))
    report = RunReport(checks=(many("failed", 400),))
    write_step_summary(report, {"GITHUB_STEP_SUMMARY": str(path)})
    assert SUMMARY_BYTES - 5000 < path.stat().st_size <= SUMMARY_BYTES


def test_junit_properties() -> None:
    assert properties((*free_vram(1).records, *few_gpus().records)) == [
        ("free VRAM [GPU 0]", "passed: expected at least 36.0 GiB, measured 78.7 GiB"),
        (
            "GPUs",
            "failed: expected 2 GPUs, measured 1 GPU; needs 2 GPUs with 40.0 GiB free each; "
            "found 1 (GPU 0: 79.2 GiB free); rent 2 or more",
        ),
    ]


def test_junit_properties_are_xml_whatever_a_name_holds() -> None:
    (name, text) = properties([Record(name="a\x00\ud800\x1b<", outcome="failed", reason="\x08")])[0]
    assert (name, text) == ("a???<", "failed: expected -, measured -; ?")
    element = ElementTree.Element("property", name=name, value=text)
    assert ElementTree.fromstring(ElementTree.tostring(element)).get("name") == name
