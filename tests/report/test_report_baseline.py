"""Baselines: the rule, the comparison at its boundaries, the file."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_examples import check, four_h100s, machine, plan, speed, text_scores

from pytest_multigpu.errors import UsageError, shown
from pytest_multigpu.judging.baseline import check_run, compare, key_of, measurements, merged
from pytest_multigpu.judging.baseline_file import dump_baselines, parse_baselines
from pytest_multigpu.judging.baseline_rule import parse_rule
from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.baseline import Baseline, Kind, Measurement, Tolerance
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.report import RunReport
from pytest_multigpu.report.baseline import read_baselines, update_baseline
from pytest_multigpu.units import GIB, MIB

KEY = (
    "4 x NVIDIA H100 80GB HBM3, llama-3.3-70b, 16bit bfloat16, auto, synthetic, "
    "context 2048 x 1, torch 2.11, transformers 5.17"
)
PEAK = Measurement(name="prefill peak", kind="peak", value=36 * GIB, device="cuda:0")
SPEED = Measurement(name="decode speed", kind="speed", value=10.0)
LOAD = Measurement(name="load time", kind="load", value=4.0)
SCORE = Measurement(name="probe score", kind="score", value=-1.5)
REMEDY = "repair or delete the file, then run with --gpu-baseline-update"


def baseline(*rows: Measurement) -> Baseline:
    return Baseline(key=KEY, values={row.key: row for row in rows})


def judged(before: Measurement, value: float, rule: str) -> Record:
    now = replace(before, value=value)
    (record,) = compare(baseline(before), {now.key: now}, parse_rule(rule), key=KEY, file="b.json")
    return record


def test_rule() -> None:
    assert parse_rule("peak:2%+256MiB speed:10%  load:20%+5s score:0.05") == {
        "peak": Tolerance(0.02, 256 * MIB),
        "speed": Tolerance(0.1, 0),
        "load": Tolerance(0.2, 5),
        "score": Tolerance(0, 0.05),
    }
    assert parse_rule("peak:1GiB") == {"peak": Tolerance(0, GIB)}
    assert set(parse_rule(None)) == {"peak", "load", "speed", "score"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write it like peak:2%+256MiB speed:10%"),
        ("peek:2%", "'peek:2%' is of no known kind; known: peak, load, speed, score"),
        ("peak", "'peak' has no tolerance; write it like peak:10%"),
        ("peak:", "'peak:' has no tolerance; write it like peak:10%"),
        ("peak:1% peak:2%", "peak is named twice; name it once"),
        ("peak:1%+2%", "'peak:1%+2%' has two percentages; write one"),
        ("peak:1GiB+2GiB", "'peak:1GiB+2GiB' has two amounts; write one"),
        ("peak:x%", "'peak:x%': 'x%' is not a percentage like 10%"),
        ("speed:-1%", "'speed:-1%': '-1%' is not a percentage like 10%"),
        ("speed:100%", "'speed:100%' could never fail; write less than 100%"),
        ("load:5", "'load:5': '5' is not a percentage or seconds like 5s"),
        ("speed:2s", "'speed:2s': '2s' is not a percentage or tokens/s like 2"),
        ("score:nan", "'score:nan': 'nan' is not a percentage or a number"),
    ],
)
def test_rule_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert str(caught.value) == f"--gpu-baseline-rule: {message}"


def test_rule_size_without_unit() -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule("peak:256")
    assert str(caught.value) == (
        "--gpu-baseline-rule: peak:256: '256' has no unit; write 256GiB or 256MiB"
    )


@pytest.mark.parametrize(
    ("before", "rule", "value", "outcome"),
    [
        (PEAK, "peak:256MiB", 36 * GIB + 256 * MIB, "passed"),
        (PEAK, "peak:256MiB", 36 * GIB + 256 * MIB + 64, "failed"),
        (PEAK, "peak:50%+1GiB", 55 * GIB, "passed"),
        (PEAK, "peak:50%+1GiB", 55 * GIB + 64, "failed"),
        (PEAK, "peak:0%", 1, "passed"),
        (SPEED, "speed:10%", 9.0, "passed"),
        (SPEED, "speed:10%", 8.999, "failed"),
        (SPEED, "speed:10%", 99.0, "passed"),
        (SPEED, "speed:1", 9.0, "passed"),
        (LOAD, "load:25%+1s", 6.0, "passed"),
        (LOAD, "load:25%+1s", 6.001, "failed"),
        (SCORE, "score:0.1", -1.4, "passed"),
        (SCORE, "score:0.1", -1.6, "passed"),
        (SCORE, "score:0.1", -1.39, "failed"),
        (SCORE, "score:0.1", -1.61, "failed"),
        # In standard deviations of the scores: a tenth of 4.
        (replace(SCORE, spread=4.0), "score:0.1", -1.1, "passed"),
        (replace(SCORE, spread=4.0), "score:0.1", -1.09, "failed"),
    ],
)
def test_boundaries(before: Measurement, rule: str, value: float, outcome: str) -> None:
    assert judged(before, value, rule).outcome == outcome


def test_a_failed_comparison_says_what_and_how_much() -> None:
    record = judged(PEAK, 45 * GIB, "peak:2%")
    assert record == Record(
        name="prefill peak against the baseline",
        outcome="failed",
        expected=f"at most {int(36 * GIB * 1.02)}",
        measured=45 * GIB,
        unit="bytes",
        device="cuda:0",
        reason="prefill peak on GPU 0 is 25.0% higher than the baseline",
        remedy="find the cause, or accept it with --gpu-baseline-update",
    )
    assert judged(SPEED, 5.0, "speed:10%").reason == (
        "decode speed is 50.0% lower than the baseline"
    )
    assert judged(SPEED, 5.0, "speed:10%").expected == "at least 9.0"
    assert judged(SCORE, 5.0, "score:0.1").expected == "-1.5 within 0.1"


def test_no_baseline_is_unknown() -> None:
    (record,) = compare(None, {PEAK.key: PEAK}, parse_rule(None), key=KEY, file="b.json")
    assert record.outcome == "unknown"
    assert record.reason == f"b.json has no baseline for {KEY}"
    assert record.remedy == "record it with --gpu-baseline-update"


def reasons(old: Baseline, *new: Measurement, rule: str | None = None) -> list[tuple[str, str]]:
    found = compare(old, {row.key: row for row in new}, parse_rule(rule), key=KEY, file="b.json")
    return [(record.outcome, record.reason) for record in found]


def test_what_is_missing_on_either_side_is_unknown() -> None:
    other = replace(PEAK, device="cuda:1")
    assert reasons(baseline(PEAK), other) == [
        ("unknown", "prefill peak @ cuda:0 was not measured"),
        ("unknown", f"b.json has no prefill peak @ cuda:1 for {KEY}"),
    ]
    assert reasons(baseline(PEAK, SPEED), SPEED) == [
        ("unknown", "this run measured no peak"),
        ("passed", ""),
    ]
    nan = replace(SPEED, value=float("nan"))
    assert reasons(baseline(SPEED), nan) == [("unknown", "decode speed was not measured")]
    assert reasons(baseline(SPEED), SPEED, rule="peak:1%") == [
        ("unknown", "the rule compares nothing that was measured")
    ]


def test_measurements_of_a_run() -> None:
    found = measurements(four_h100s())
    assert len(found) == 3 * 4 + 1 + 1
    assert found["prefill peak @ cuda:3"].value == 36 * GIB + 600 * MIB
    assert found["load time"] == replace(LOAD, value=0.74)
    assert found["decode speed"] == replace(SPEED, value=10.04)


def test_an_unknown_speed_is_no_measurement() -> None:
    record = replace(speed().records[0], outcome="unknown")
    assert "decode speed" not in measurements(four_h100s(check("x", record)))


def test_key() -> None:
    key = key_of(four_h100s())
    assert key is not None
    assert key.text == KEY
    assert key_of(replace(four_h100s(), versions={})) is None
    cpu = key_of(replace(four_h100s(), tier="cpu"))
    assert cpu is not None
    assert cpu.hardware == "cpu"


def test_key_tells_allocators_apart() -> None:
    report = four_h100s()
    assert report.machine is not None
    grows = replace(report, machine=replace(report.machine, expandable_segments=True))
    key = key_of(grows)
    assert key is not None
    assert key.text == KEY.replace(
        "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 with expandable segments"
    )
    cpu = key_of(replace(grows, tier="cpu"))
    assert cpu is not None
    assert cpu.hardware == "cpu"


def test_key_tells_dtypes_and_mixed_machines_apart() -> None:
    report = four_h100s()
    half = replace(plan(), architecture=replace(plan().architecture, dtype="float16"))

    def text(*names: str) -> str:
        found = machine(len(names))
        gpus = tuple(replace(gpu, name=name) for gpu, name in zip(found.gpus, names, strict=True))
        key = key_of(replace(report, machine=replace(found, gpus=gpus)))
        assert key is not None
        return key.hardware

    key = key_of(replace(report, plan=half))
    assert key is not None
    assert "16bit float16" in key.text
    assert text("A", "A") == "2 x A"
    assert text("A", "B", "B") == "1 x A + 2 x B"
    assert text("A", "A", "B") == "2 x A + 1 x B"
    assert text("A", "B", "A") == "1 x A + 1 x B + 1 x A"


def test_the_whole_run_against_its_file(tmp_path: Path) -> None:
    path, report = tmp_path / "b.json", four_h100s()
    rule = parse_rule("speed:10%")
    missing = check_run(report, read_baselines(path), rule, file="b.json")
    assert [record.outcome for record in missing.records] == ["unknown"]
    assert decide(report.with_check(missing)).ready
    strict = decide(report.with_check(missing), strict=True)
    assert strict.exit_code == 1
    assert strict.line == (
        f"NOT READY: b.json has no baseline for {KEY}; record it with --gpu-baseline-update"
    )
    update_baseline(path, KEY, measurements(report).values())
    same = check_run(report, read_baselines(path), parse_rule("peak:0% speed:0%"), file="b.json")
    assert {record.outcome for record in same.records} == {"passed"}
    assert len(same.records) == 13
    assert decide(report.with_check(same)).line == decide(report).line
    update_baseline(path, KEY, [replace(SPEED, value=20.0)])
    slower = check_run(report, read_baselines(path), rule, file="b.json")
    verdict = decide(report.with_check(slower))
    assert (verdict.exit_code, verdict.line) == (
        1,
        "NOT READY: decode speed is 49.8% lower than the baseline; find the cause, or accept it "
        "with --gpu-baseline-update",
    )


def test_a_run_without_a_plan_has_nothing_to_compare_by() -> None:
    found = check_run(RunReport(), {}, parse_rule(None), file="b.json")
    assert [record.reason for record in found.records] == ["this run has no plan to compare by"]


def test_update_keeps_other_keys_and_kinds_that_were_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "b.json"
    assert read_baselines(path) == {}
    update_baseline(path, "other", [LOAD])
    update_baseline(path, KEY, [PEAK, replace(PEAK, device="cuda:1"), SPEED])
    update_baseline(path, KEY, [replace(PEAK, value=1.0)])
    found = read_baselines(path)
    assert found["other"].values == {LOAD.key: LOAD}
    assert found[KEY].values == {PEAK.key: replace(PEAK, value=1.0), SPEED.key: SPEED}
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_nothing_measured_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        update_baseline(tmp_path / "b.json", KEY, [replace(SPEED, value=float("inf"))])
    assert str(caught.value) == (
        "--gpu-baseline-update: this run measured nothing to record; run more than the quick checks"
    )
    assert not (tmp_path / "b.json").exists()


def _update(path: Path, number: int) -> None:
    for i in range(5):
        update_baseline(path, f"{number}-{i}", [SPEED])


def test_updates_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_update, args=(path, i)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert len(read_baselines(path)) == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], f"is not a baseline file; {REMEDY}"),
        ({"schema": 2, "baselines": {}}, f"schema is 2, known is 1; {REMEDY}"),
        ({"schema": 1, "baselines": {"k": 3}}, f"'k' is not an object; {REMEDY}"),
        ({"schema": 1, "baselines": {"k": {"v": 3}}}, f"'k': 'v' is not an object; {REMEDY}"),
        (
            {"schema": 1, "baselines": {"k": {"v": {"name": "a", "kind": "x", "value": 1}}}},
            f"'k': 'v': kind is 'x'; known: peak, load, speed, score; {REMEDY}",
        ),
        (
            {"schema": 1, "baselines": {"k": {"v": {"name": "a", "kind": "load", "value": True}}}},
            f"'k': 'v': value is True, not a number; {REMEDY}",
        ),
        (
            {
                "schema": 1,
                "baselines": {"k": {"v": {"name": "a", "kind": "load", "value": 9**999}}},
            },
            f"'k': 'v': value is a huge number, not a number; {REMEDY}",
        ),
        (
            {"schema": 1, "baselines": {"k": {"v": {"name": 1, "kind": "load", "value": 1}}}},
            f"'k': 'v': name and device must be text; {REMEDY}",
        ),
    ],
)
def test_damaged_files_name_file_and_key(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps(data))
    for use in (lambda: read_baselines(path), lambda: update_baseline(path, KEY, [SPEED])):
        with pytest.raises(UsageError) as caught:
            use()
        assert str(caught.value) == f"{path}: {message}"
    assert json.loads(path.read_text()) == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"{",
            "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); delete it or repair it",
        ),
        (b"\xff", "is not UTF-8; delete it or name another file"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_baselines(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_baselines(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: cannot be read (it is a folder, not a regular file); name another file"
    )
    (tmp_path / "f").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written \(.*\); name another file$"):
        update_baseline(tmp_path / "f" / "b.json", KEY, [SPEED])


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_ROW = st.fixed_dictionaries(
    {
        "name": st.text(max_size=5) | _JSON,
        "kind": st.sampled_from(["peak", "load", "speed", "score", "x"]) | _JSON,
        "value": st.floats() | st.integers() | _JSON,
    },
    optional={"device": st.text(max_size=5) | _JSON},
)
_FILE = st.fixed_dictionaries(
    {
        "schema": st.just(1) | _JSON,
        "baselines": st.dictionaries(
            st.text(max_size=5),
            st.dictionaries(st.text(max_size=5), _ROW, max_size=2) | _JSON,
            max_size=2,
        ),
    }
)


@settings(max_examples=1000, deadline=None)
@given(data=_FILE | _JSON)
def test_fuzz_a_result_or_one_clear_error(data: Any) -> None:
    try:
        found = parse_baselines(data, "b.json")
    except UsageError as error:
        text = str(error)
        assert text.startswith("b.json: ")
        assert "\n" not in text
        assert text.endswith(REMEDY)
    else:
        assert parse_baselines(json.loads(json.dumps(dump_baselines(found))), "b.json").keys() == (
            found.keys()
        )


@settings(max_examples=1000, deadline=None)
@given(
    text=st.text(max_size=30)
    | st.lists(
        st.builds(
            "{}{}{}".format,
            st.sampled_from(["peak", "load", "speed", "score", ""]),
            st.sampled_from([":", "", "::"]),
            st.text(alphabet="0123456789.%+sGiBMx-", max_size=12),
        ),
        max_size=3,
    ).map(" ".join)
)
def test_fuzz_rules(text: str) -> None:
    try:
        rule = parse_rule(text)
    except UsageError as error:
        message = str(error)
        assert message.startswith("--gpu-baseline-rule: ")
        assert "\n" not in message
    else:
        assert rule
        assert all(t.fraction >= 0 and t.absolute >= 0 for t in rule.values())


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["peak", "load", "speed", "score"]),
    value=st.floats(min_value=0.001, max_value=1e12),
    better=st.floats(min_value=0, max_value=1),
)
def test_equal_passes_and_better_passes(kind: Kind, value: float, better: float) -> None:
    before = Measurement(name="x", kind=kind, value=value)
    rule: dict[Kind, Tolerance] = {kind: Tolerance()}
    shift = 0.0 if kind == "score" else value * better
    now = replace(before, value=value + (shift if kind == "speed" else -shift))
    for measured in (before, now):
        (record,) = compare(baseline(before), {"x": measured}, rule, key=KEY, file="f")
        assert record.outcome == "passed"


def test_merged_starts_from_nothing() -> None:
    assert merged(None, KEY, [SPEED]) == baseline(SPEED)


def test_one_worse_number_fails_the_whole_comparison() -> None:
    report = four_h100s()
    good = baseline(*measurements(report).values())
    rule = parse_rule("peak:0% speed:0%")
    same = check_run(report, {KEY: good}, rule, file="b.json")
    assert (same.nodeid, same.outcome, same.is_check) == ("baseline b.json", "passed", False)
    faster = baseline(*good.values.values(), replace(SPEED, value=20.0))
    worse = check_run(report, {KEY: faster}, rule, file="b.json")
    assert worse.outcome == "failed"
    assert [r.outcome for r in worse.records].count("failed") == 1
    nothing = check_run(RunReport(), {}, rule, file="b.json")
    assert (nothing.outcome, nothing.records[0].name) == ("passed", "baseline")
    assert nothing.records[0].remedy == "run the checks that need the model"


def test_names_and_remedies_of_what_is_unknown() -> None:
    def named(old: Baseline | None, *new: Measurement, rule: str) -> list[tuple[str, str]]:
        measured = {row.key: row for row in new}
        found = compare(old, measured, parse_rule(rule), key=KEY, file="b.json")
        return [(record.name, record.remedy) for record in found]

    update = "record it with --gpu-baseline-update"
    assert named(None, rule="peak:1%") == [("baseline", update)]
    assert named(baseline(SPEED), rule="speed:1%") == [
        ("speed baseline", "run the checks that measure it")
    ]
    other = replace(SPEED, name="prefill speed")
    assert named(baseline(SPEED), other, rule="speed:1%") == [
        ("decode speed baseline", "run the check that measures it"),
        ("prefill speed baseline", update),
    ]
    assert named(baseline(SPEED), SPEED, rule="peak:1%") == [("baseline", update)]


def test_a_passed_comparison_in_full() -> None:
    assert judged(PEAK, 36 * GIB + 1, "peak:1%+1MiB") == Record(
        name="prefill peak against the baseline",
        outcome="passed",
        expected=f"at most {int(36 * GIB * 1.01 + MIB)}",
        measured=36 * GIB + 1,
        unit="bytes",
        device="cuda:0",
    )
    speed_record = judged(SPEED, 9.5, "speed:10%")
    assert (speed_record.measured, speed_record.unit) == (9.5, "tokens/s")
    load = judged(LOAD, 10.5, "load:25%+1s")
    assert (load.expected, load.measured, load.unit) == ("at most 6.0", 10.5, "s")
    assert load.reason == "load time is 162.5% higher than the baseline"


def test_a_change_from_zero_is_told_as_it_is() -> None:
    record = judged(replace(SCORE, value=0.0), 0.25, "score:0.1")
    assert record.reason == "probe score is 0.25 higher than the baseline"
    assert record.expected == "0 within 0.1"


def test_a_file_as_people_see_it() -> None:
    assert dump_baselines({KEY: baseline(SPEED, PEAK)}) == {
        "schema": 1,
        "baselines": {
            KEY: {
                "decode speed": {
                    "name": "decode speed",
                    "kind": "speed",
                    "value": 10.0,
                    "unit": "tokens/s",
                    "device": "",
                },
                "prefill peak @ cuda:0": {
                    "name": "prefill peak",
                    "kind": "peak",
                    "value": 36 * GIB,
                    "unit": "bytes",
                    "device": "cuda:0",
                },
            }
        },
    }
    dumped = dump_baselines({KEY: baseline(replace(PEAK, value=2.0))})
    (row,) = dumped["baselines"][KEY].values()
    assert type(row["value"]) is int


@pytest.mark.parametrize(
    ("value", "text"),
    [(10**20, "a huge number"), (-(10**20), "a huge number"), (10**20 - 1, str(10**20 - 1))],
)
def test_huge_schemas_are_not_spelled_out(value: int, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_baselines({"schema": value, "baselines": {}}, "b.json")
    assert str(caught.value) == f"b.json: schema is {text}, known is 1; {REMEDY}"


def test_rules_at_their_limits() -> None:
    assert parse_rule("speed:99%") == {"speed": Tolerance(0.99, 0)}
    assert parse_rule("peak:100%+1B") == {"peak": Tolerance(1.0, 1)}
    assert parse_rule("score:123456789.123456789") == {"score": Tolerance(0, 123456789.123456789)}
    for text in ("score:1234567890", "load:1.s", "load:s"):
        with pytest.raises(UsageError, match="is not a percentage or"):
            parse_rule(text)


def test_what_counts_as_a_measurement() -> None:
    rows = [
        Record(name="a", outcome="failed", measured=2, unit="tokens/s", device="cuda:1"),
        Record(name="b", outcome="passed", measured=0.5, unit="score"),
        Record(name="c", outcome="passed", measured=True, unit="tokens/s"),
        Record(name="d", outcome="passed", measured="fast", unit="tokens/s"),
        Record(name="e", outcome="passed", measured=3, unit="bytes"),
        Record(name="f", outcome="unknown", measured=3, unit="tokens/s"),
    ]
    report = RunReport(checks=(check("x", *rows),))
    assert list(measurements(report).values()) == [
        Measurement(name="a", kind="speed", value=2.0, device="cuda:1"),
    ]


def test_scores_of_the_text_set_are_measured() -> None:
    """Their mean and their deviation, of this probe: another one's are never compared with it."""
    scores = text_scores(values=(1.0, 2.0, 3.0, 6.0))
    spread = 3.5**0.5
    assert list(measurements(RunReport(scores=scores)).values()) == [
        Measurement(
            name="mean score of alibi-60 1, probe aaaaaaaa", kind="score", value=3.0, spread=spread
        ),
        Measurement(
            name="score deviation of alibi-60 1, probe aaaaaaaa",
            kind="score",
            value=spread,
            spread=spread,
        ),
    ]
    for values in ((1.0, float("nan"), 2.0), (1.0, 1.0, 1.0)):
        assert measurements(RunReport(scores=text_scores(values=values))) == {}


def test_a_spread_is_kept_and_must_be_one() -> None:
    score = replace(SCORE, spread=0.25)
    dumped = dump_baselines({KEY: baseline(score)})
    assert parse_baselines(dumped, "b.json") == {KEY: baseline(score)}
    for spread, text in ((0, "0"), (-1, "-1"), (float("nan"), "nan"), (True, "True")):
        dumped["baselines"][KEY]["probe score"]["spread"] = spread
        with pytest.raises(UsageError) as caught:
            parse_baselines(dumped, "b.json")
        where = f"b.json: {shown(KEY)}: 'probe score'"
        assert str(caught.value) == f"{where}: spread is {text}, not above zero; {REMEDY}"
