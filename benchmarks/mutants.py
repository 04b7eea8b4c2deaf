"""Mutation testing of the pure logic: how many small faults in it do the fast tests notice?

    python benchmarks/mutants.py --sample 800 --out results/mutants.md
    python benchmarks/mutants.py --module units          # every mutant of one module

Each mutant is one change to a module's syntax tree: a comparison moved by its boundary or turned
round, an arithmetic operator swapped, a number one up or one down, a text changed, ``and``/``or``,
``not``, a condition turned round, a return value lost, ``min``/``max`` and ``any``/``all`` swapped,
a statement removed, ``break``/``continue`` swapped. Docstrings, annotations, decorators, asserts
and imports are left alone, and so are the two data tables: catalogue rows and measured costs.

For each mutant a forked process imports the package with that module changed and runs the test
files that belong to it, for a limited time. A mutant is killed if a test fails or if it never
ends; the unchanged tree goes through the same path first and must pass.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pytest_multigpu"
LIMIT_S, LIMIT_TIMES = 5, 3
"""Processor seconds a mutant may take, and that many times what the unchanged module took."""
WALL_S = 240
MEMORY_BYTES = 6 << 30
PRELOAD = (
    "pytest",
    "_pytest.pytester",
    "hypothesis",
    "torch",
    "transformers.models.llama.modeling_llama",
)
FUZZ_OUT = ["-k", "not fuzz"]
"""Fuzz tests ask for an error or a result, whichever: slow, and no judge of a mutant."""

_PLAN = "tests/planning/test_planning_"
_FORWARD = (f"{_PLAN}forward.py", f"{_PLAN}against_torch.py")
TESTS: dict[str, tuple[str, ...]] = {
    "units": ("tests/test_units.py",),
    "requirements": ("tests/test_requirements.py",),
    "planning.allocator": (f"{_PLAN}allocator.py", f"{_PLAN}forward.py"),
    "planning.barred": (f"{_PLAN}barred.py",),
    "planning.catalogue": (f"{_PLAN}catalogue.py",),
    "planning.costs": (f"{_PLAN}forward.py", f"{_PLAN}rent.py"),
    "planning.device_maps": (f"{_PLAN}device_maps.py",),
    "planning.device_plans": (f"{_PLAN}plans.py", f"{_PLAN}peaks.py"),
    "planning.expandable": (f"{_PLAN}expandable.py",),
    "planning.fit": (f"{_PLAN}fit.py",),
    "planning.grown": (f"{_PLAN}fit.py", f"{_PLAN}expandable.py"),
    "planning.forward": _FORWARD,
    "planning.gpu": (f"{_PLAN}forward.py",),
    "planning.known": (f"{_PLAN}known.py",),
    "planning.linears": (f"{_PLAN}linears.py", f"{_PLAN}forward.py"),
    "planning.load": (f"{_PLAN}load.py", f"{_PLAN}forward.py", f"{_PLAN}parts.py"),
    "planning.longest": (f"{_PLAN}longest.py",),
    "planning.max_memory": (f"{_PLAN}max_memory.py",),
    "planning.balance": (f"{_PLAN}balance.py", f"{_PLAN}fit.py"),
    "planning.nf4": (f"{_PLAN}nf4.py",),
    "planning.partition": (f"{_PLAN}partition.py",),
    "planning.peaks": (f"{_PLAN}plans.py", f"{_PLAN}spare.py", f"{_PLAN}peaks.py"),
    "planning.reasons": (f"{_PLAN}plans.py", f"{_PLAN}spare.py", f"{_PLAN}peaks.py"),
    "planning.remedies": (f"{_PLAN}fit.py",),
    "planning.replay": (f"{_PLAN}replay.py", f"{_PLAN}plans.py", f"{_PLAN}known.py"),
    "planning.rent": (f"{_PLAN}rent.py",),
    "planning.speed": (f"{_PLAN}speed.py", f"{_PLAN}rent.py"),
    "planning.search": (f"{_PLAN}search.py",),
    "planning.simulate": (f"{_PLAN}catalogue.py",),
    "planning.use": (f"{_PLAN}replay.py", f"{_PLAN}parts.py", f"{_PLAN}plans.py"),
    "judging.verdict": ("tests/report/test_report_verdict.py",),
    "judging.baseline": ("tests/report/test_report_baseline.py",),
    "judging.baseline_file": ("tests/report/test_report_baseline.py",),
    "judging.baseline_rule": ("tests/report/test_report_baseline.py",),
    "judging.drift": ("tests/judging/test_judging_drift.py",),
    "judging.probe_fit": ("tests/judging/test_judging_probe_fit.py",),
    "judging.plan": ("tests/judging/test_judging_plan.py",),
    "judging.vram": ("tests/judging/test_judging_vram.py", "tests/judging/test_judging_machine.py"),
}
DATA = {"CATALOGUE", "HOPPER", "OTHER", "CPU", "MEASURED", "PRICES_GUESSED"}
"""Module-level tables of measured or looked-up figures: no logic."""
NO_LOGIC = {"__slots__", "_Ratio", "_Entry", "_Self"}
"""Names for Python itself and for types."""

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
}
_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}


def mutate(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Changes ``tree`` in place, yields line and description, and puts it back; again and again."""
    for node in list(_logic(tree)):
        yield from _of(node)


def _logic(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Assert):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(node, ast.Module | ast.ClassDef) and _is_data(child):
                continue
            yield from _logic(child)


def _is_data(node: ast.AST) -> bool:
    """A table of figures, ``__slots__``, a type alias."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id in DATA | NO_LOGIC for target in targets)


@contextlib.contextmanager
def _changed(node: ast.AST, field: str, value: object) -> Iterator[None]:
    before = getattr(node, field)
    setattr(node, field, value)
    try:
        yield
    finally:
        setattr(node, field, before)


def _of(node: ast.AST) -> Iterator[tuple[int, str]]:
    line = getattr(node, "lineno", 0)

    def change(field: str, value: object, what: str) -> Iterator[tuple[int, str]]:
        with _changed(node, field, value):
            yield line, what

    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            for other in _COMPARE.get(type(operator), ()):
                ops = [*node.ops[:at], other(), *node.ops[at + 1 :]]
                what = f"{type(operator).__name__} -> {other.__name__}"
                yield from change("ops", ops, f"{ast.unparse(node)}: {what}")
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        if not (isinstance(node, ast.BinOp) and (_text(node.left) or _text(node.right))):
            other_op = _ARITHMETIC[type(node.op)]
            what = f"{ast.unparse(node)}: {type(node.op).__name__} -> {other_op.__name__}"
            yield from change("op", other_op(), what)
    elif isinstance(node, ast.BoolOp):
        flipped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield from change("op", flipped, f"{ast.unparse(node)}: and <-> or")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        what = f"{ast.unparse(node)}: {type(node.op).__name__} removed"
        yield from change("op", ast.UAdd() if isinstance(node.op, ast.USub) else _Bool(), what)
    elif isinstance(node, ast.Constant):
        for value in _others(node.value):
            yield from change("value", value, f"{node.value!r} -> {value!r}")
    elif (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SWAPPED
    ):
        new = ast.copy_location(ast.Name(_SWAPPED[node.func.id], ast.Load()), node.func)
        what = f"{ast.unparse(node)}: {node.func.id} -> {new.id}"
        yield from change("func", new, what)
    elif isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        # A constant that is returned is changed as a constant; None for False is no fault.
        none = ast.copy_location(ast.Constant(None), node)
        yield from change("value", none, f"{ast.unparse(node)}: returns None")
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        plain = isinstance(node.test, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr)
        if plain:
            turned = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
            yield from change("test", turned, f"if {ast.unparse(node.test)}: turned round")
    for field in ("body", "orelse"):
        block = getattr(node, field, None)
        if isinstance(block, list) and not isinstance(node, ast.Module | ast.ClassDef):
            yield from _statements(node, field, block)


def _statements(node: ast.AST, field: str, block: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    for at, statement in enumerate(block):
        other: ast.stmt = ast.Pass()
        if isinstance(statement, ast.Break):
            other = ast.Continue()
        elif isinstance(statement, ast.Continue):
            other = ast.Break()
        elif isinstance(statement, ast.Expr):
            if isinstance(statement.value, ast.Constant | ast.Yield):
                continue
        elif isinstance(statement, ast.Assign):
            if all(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets):
                continue  # a name that is then missing: no fault that could be written
        elif not isinstance(statement, ast.AugAssign | ast.Raise):
            continue
        ast.copy_location(other, statement)
        first_line = ast.unparse(statement).splitlines()[0]
        what = f"{first_line}: {'removed' if isinstance(other, ast.Pass) else 'swapped'}"
        with _changed(node, field, [*block[:at], other, *block[at + 1 :]]):
            yield statement.lineno, what


class _Bool(ast.Invert):
    """Stands for ``not`` taken away; see :func:`_compiled`."""


class _Finish(ast.NodeTransformer):
    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return node.operand if isinstance(node.op, _Bool) else node


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _others(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [other for other in (value + 1, value - 1) if other != value]
    if isinstance(value, str):
        return [value + "~"]
    return []


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module from a changed tree, all others as they are."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)  # noqa: S102 - the package's own code


def _run_tests(module: str, code: CodeType, limit: int, output: Path | None) -> int:
    """In a forked process: the package with that module changed, under its tests."""
    import hypothesis
    import pytest

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    signal.alarm(WALL_S)
    to = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(to, 1)
    os.dup2(to, 2)
    # No deadline: a slow moment of the machine must not count as a kill.
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, print_blob=False
    )
    hypothesis.settings.load_profile("mutants")
    sys.meta_path.insert(0, _Mutated(f"{PACKAGE}.{module}", code))
    arguments = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:unraisableexception",
        "--tb=short",
        *FUZZ_OUT,
    ]
    arguments += _tests_of(module)
    return int(pytest.main(arguments))


def _tests_of(module: str) -> list[str]:
    return [name for name in TESTS[module] if (ROOT / name).exists()]


def _fork(module: str, tree: ast.Module, limit: int, output: Path | None = None) -> int:
    """Starts the tests with ``tree`` as it is now; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        finished = ast.fix_missing_locations(_Finish().visit(tree))
        code = compile(finished, f"{PACKAGE}/{module.replace('.', '/')}.py", "exec")
        status = _run_tests(module, code, limit, output)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 98
    finally:
        sys.stdout.flush()
        os._exit(status)


_UNUSABLE = {4: "pytest was used wrongly", 5: "no test ran", 98: "exit", 99: "crashed"}


@dataclass
class Outcome:
    """One mutant's end."""

    module: str
    line: int
    what: str
    killed: bool
    how: str


def _source(module: str) -> str:
    path = ROOT / PACKAGE / f"{module.replace('.', '/')}.py"
    return path.read_text(encoding="utf-8")


def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


def _chosen(modules: list[str], sample: int, seed: int) -> dict[str, list[int]]:
    """Numbers of the mutants to run: all, or a seeded sample with at least 25 of each module."""
    counts = {module: sum(1 for _ in mutate(_tree(module))) for module in modules}
    if not sample or sum(counts.values()) <= sample:
        return {module: list(range(count)) for module, count in counts.items()}
    rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
    share = sample / sum(counts.values())
    return {
        module: sorted(rng.sample(range(count), min(count, max(25, round(count * share)))))
        for module, count in counts.items()
    }


def _control(modules: list[str], log: Path | None) -> dict[str, int]:
    """Processor seconds that a mutant of each module may take, after its unchanged tests passed."""
    limits = {}
    for module in modules:
        pid = _fork(module, _tree(module), WALL_S, log)
        _, raw, used = os.wait4(pid, 0)
        status = os.waitstatus_to_exitcode(raw)
        if status:
            sys.exit(f"{module}: the unchanged tests end with {status}: {_tests_of(module)}")
        limits[module] = LIMIT_S + round(LIMIT_TIMES * (used.ru_utime + used.ru_stime))
    return limits


def run(chosen: dict[str, list[int]], limits: dict[str, int], workers: int) -> list[Outcome]:
    """Every chosen mutant, ``workers`` at a time."""
    outcomes: list[Outcome] = []
    running: dict[int, tuple[str, int, str]] = {}

    def wait() -> None:
        pid, raw = os.wait()
        module, line, what = running.pop(pid)
        status = os.waitstatus_to_exitcode(raw)
        if status in _UNUSABLE and status != 99:
            sys.exit(f"{module}:{line} {what}: {_UNUSABLE[status]}")
        how = "survived" if status == 0 else "test" if status in (1, 2) else "hang"
        if status not in (0, 1, 2, -signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM):
            how = f"status {status}"
        outcomes.append(Outcome(module, line, what, status != 0, how))
        if status == 0:
            print(f"survived: {module}:{line}: {what}", flush=True)

    for module, numbers in chosen.items():
        wanted = set(numbers)
        tree = _tree(module)
        for number, (line, what) in enumerate(mutate(tree)):
            if number not in wanted:
                continue
            while len(running) >= workers:
                wait()
            running[_fork(module, tree, limits[module])] = (module, line, what)
        print(f"# {module}: {len(numbers)} started, limit {limits[module]} s", flush=True)
    while running:
        wait()
    return outcomes


def table(
    outcomes: list[Outcome],
    counts: dict[str, int],
    seconds: float,
    command: str,
    why: dict[tuple[str, str], str],
) -> str:
    """Markdown: killed and survived for each module, then every survivor with why."""
    killed = sum(outcome.killed for outcome in outcomes)
    lines = [
        "# Mutants of the pure logic",
        "",
        f"`{command}`",
        "",
        f"{killed} of {len(outcomes)} mutants killed ({killed / len(outcomes):.1%}) in "
        f"{seconds:.0f} s; {sum(counts.values())} mutants exist"
        + (", a seeded sample of them ran." if len(outcomes) < sum(counts.values()) else "."),
        "",
        "| module | mutants | run | killed | of them by the time limit | survived | killed % |",
        "|---|---|---|---|---|---|---|",
    ]
    for module, count in counts.items():
        own = [outcome for outcome in outcomes if outcome.module == module]
        ways = Counter(outcome.how for outcome in own)
        dead = sum(outcome.killed for outcome in own)
        lines.append(
            f"| {module} | {count} | {len(own)} | {dead} | {ways['hang']} | {len(own) - dead} "
            f"| {dead / max(1, len(own)):.1%} |"
        )
    lines += ["", "## Survivors", "", "| where | line | change | why |", "|---|---|---|---|"]
    sources: dict[str, list[str]] = {}
    for outcome in outcomes:
        if not outcome.killed:
            source = sources.setdefault(outcome.module, _source(outcome.module).splitlines())
            text = source[outcome.line - 1].strip()
            cells = (text, outcome.what.removeprefix(f"{text}: "))
            shown = " | ".join("`" + cell.replace("|", "\\|")[:110] + "`" for cell in cells)
            reason = why.get((outcome.module, text), "no test asks for it yet")
            lines.append(f"| {outcome.module}:{outcome.line} | {shown} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--module", action="append", choices=sorted(TESTS), help="default: all")
    parser.add_argument("--sample", type=int, default=0, help="about that many; 0: all")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--log", type=Path, help="output of the unchanged tests")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    # The plugin itself stays out: pytest would import the package before it is changed.
    os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="1")
    for name in PRELOAD:
        importlib.import_module(name)
    if any(name.startswith(PACKAGE) for name in sys.modules):
        sys.exit(f"{PACKAGE} is imported already")
    # What is imported here stays: without this each fork's collections walk through all of it.
    gc.freeze()
    modules = given.module or list(TESTS)
    started = time.monotonic()
    limits = _control(modules, given.log)
    counts = {module: sum(1 for _ in mutate(_tree(module))) for module in modules}
    outcomes = run(_chosen(modules, given.sample, given.seed), limits, given.workers)
    outcomes.sort(key=lambda outcome: (modules.index(outcome.module), outcome.line))
    command = f"python benchmarks/mutants.py {' '.join(sys.argv[1:])}"
    text = table(outcomes, counts, time.monotonic() - started, command, explained())
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


def explained() -> dict[tuple[str, str], str]:
    """Why what survives on a line survives, from ``mutants_survivors.txt`` beside this file.

    A row ``<module> :: <source line> :: <why>`` each; rows that begin with ``#`` are comments.
    """
    text = Path(__file__).with_name("mutants_survivors.txt").read_text(encoding="utf-8")
    rows = [row.split(" :: ") for row in text.splitlines() if row and not row.startswith("#")]
    return {(module, source): why for module, source, why in rows}


if __name__ == "__main__":
    main()
