"""report.html: complete without pictures, safe with hostile names, sound in a real browser."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import chromium
import pytest
from report_examples import check, copies, few_gpus, four_h100s, free_vram, machine, speed

from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.report import CheckResult, RunReport
from pytest_multigpu.report.html import NO_PICTURES, page, write_page

EVIL = "<script>alert(1)</script>\"'&$x_1$ \x00\ud800"


def red() -> RunReport:
    report = four_h100s(free_vram(), copies(broken=(0, 2)), speed(), few_gpus())
    return replace(report, verdict=decide(report))


def hostile() -> RunReport:
    record = Record(
        name=EVIL,
        outcome="failed",
        expected=EVIL,
        measured=float("nan"),
        device=f"{EVIL} -> {EVIL}2",
        reason=EVIL,
        remedy=EVIL,
    )
    numbers = (replace(record, measured=3.0), replace(record, measured=1.0, device="cuda:0 -> b"))
    report = four_h100s(check("x", record), check(EVIL, *numbers), copies())
    report = replace(
        report,
        machine=machine(name=EVIL),
        versions={EVIL: EVIL},
        running=EVIL,
        spans=tuple(replace(span, nodeid=EVIL, start=0, end=9) for span in report.spans),
    )
    return replace(report, verdict=decide(report))


def test_the_verdict_and_its_remedy_come_first() -> None:
    text = page(red())
    body = text[text.index("<body>") :]
    order = [
        "<h1>NOT READY</h1>",
        "<strong>GPU 0 -&gt; GPU 2 is slow; rent a machine with NVLink</strong>",
        "<li>needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free); rent 2 or more",
        "<h2>GPUs</h2>",
        "<h2>Checks</h2>",
        "<h2>Peaks</h2>",
        "<h2>Versions</h2>",
    ]
    places = [body.index(part) for part in order]
    assert places == sorted(places)


def test_without_matplotlib_the_rest_is_there_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page(red())
    assert "<svg" not in text
    assert NO_PICTURES == "pictures need matplotlib: pip install 'pytest-multigpu[html]'"
    assert "pictures need matplotlib: pip install &#x27;pytest-multigpu[html]&#x27;" in text
    assert "copy speed" in text


def test_pictures_have_ids_of_their_own() -> None:
    pytest.importorskip("matplotlib")
    text = page(red())
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 100
    for used in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert used in ids
    assert "#010203" not in text
    assert "<image" not in text


def test_a_picture_that_cannot_be_drawn_leaves_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def broken(_: RunReport) -> list[str]:
        raise ValueError("no <font>")

    monkeypatch.setattr("pytest_multigpu.report.html.copy_pictures", broken)
    text = page(red())
    assert "this picture could not be drawn: ValueError: no &lt;font&gt;" in text
    assert text.count("<svg") == 2
    assert "copy speed" in text


def test_names_that_the_font_lacks_are_no_warning() -> None:
    pytest.importorskip("matplotlib")
    far = check("x", Record(name="\u4e2d", outcome="passed", measured=1.0, device="\u4e2d -> b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "\u4e2d" in page(RunReport(checks=(far,)))


def test_the_same_run_gives_the_same_page() -> None:
    assert page(red()) == page(red())


def test_hostile_texts_stay_text() -> None:
    text = page(hostile())
    assert "<script" not in text
    assert "\x00" not in text
    text.encode()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize("report", [RunReport(), RunReport(running="t.py::test_load")])
def test_a_run_that_knows_nothing_is_a_page_too(report: RunReport) -> None:
    text = page(report)
    assert "<h1>did not finish</h1>" in text
    assert f"When this was written, {report.running or 'no test'} was running." in text
    assert "No GPU was found." in text


def test_skips_and_crashes_have_rows_the_worst_on_top() -> None:
    skipped = CheckResult(nodeid="t.py::test_s", outcome="skipped", reason="needs NVLink")
    crashed = CheckResult(nodeid="t.py::test_c", outcome="error", reason="OSError: x")
    text = page(RunReport(checks=(skipped, free_vram(), crashed)))
    assert text.index("OSError: x") < text.index("needs NVLink") < text.index("free VRAM")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.BINARY is None:
        pytest.skip("needs chromium to look at the page; found none on PATH")
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["red", "hostile", "empty"])
def test_in_a_real_browser(
    browser: chromium.Browser, tmp_path: Path, name: str, width: int
) -> None:
    report = {"red": red, "hostile": hostile, "empty": RunReport}[name]()
    path = write_page(tmp_path, report)
    assert path == tmp_path / "report.html"
    browser.open(path, width=width, dark=width == 360)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelectorAll('h1').length") == 1
    dark = "rgb(21, 24, 28)" if width == 360 else "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == dark
    if name == "red":
        pytest.importorskip("matplotlib")
        sizes = browser.ask(
            "[...document.querySelectorAll('figure svg')].map(s => {"
            "const b = s.getBoundingClientRect(); return [b.width, b.height, b.right]})"
        )
        assert len(sizes) == 3
        for wide, high, right in sizes:
            assert wide > 300
            assert high > 100
            assert right <= width
        ink = browser.ask("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == ("rgb(230, 233, 237)" if width == 360 else "rgb(27, 31, 36)")
        texts = browser.ask("document.querySelector('figure svg').textContent")
        assert "measured peak" in texts
        assert "layers 61-79" in texts


def test_the_browser_test_sees_requests_and_errors(
    browser: chromium.Browser, tmp_path: Path
) -> None:
    """The test above can fail: a page that does what a report must not is caught."""
    (tmp_path / "x.css").write_text("")
    path = tmp_path / "bad.html"
    path.write_text('<link rel="stylesheet" href="x.css"><script>throw new Error("x")</script>')
    browser.open(path, width=800)
    assert any(url.endswith("x.css") for url in browser.requests())
    assert browser.complaints()
