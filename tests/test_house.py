"""What holds for the whole house: importing is instant, and every module says what it is for."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_multigpu

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "pynvml", "numpy", "safetensors"}
PACKAGE = Path(pytest_multigpu.__file__).parent
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(PACKAGE)], "pytest_multigpu.")
    # A main of its own, which runs when imported; what exists only where xdist is; and classes
    # derived from torch's, which are imported inside functions.
    if not info.name.endswith(("__main__", ".parallel.scheduling", ".model.recording"))
)


def imported_by(code: str) -> set[str]:
    """Top-level names of every module that a fresh interpreter has after running ``code``."""
    shown = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", shown], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    assert not imported_by("import pytest_multigpu.plugin") & HEAVY


def test_no_module_imports_anything_heavy() -> None:
    code = "\n".join(f"import {name}" for name in MODULES)
    assert not imported_by(code) & HEAVY


def test_a_run_about_something_else_imports_nothing_heavy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            heavy = {"torch", "transformers", "accelerate", "bitsandbytes", "pynvml"}
            ours = {name for name in sys.modules if name.startswith("pytest_multigpu.")}
            assert not heavy & set(sys.modules)
            assert "pytest_multigpu.runtime" not in ours
        """
    )
    pytester.runpytest_subprocess("-p", "no:hypothesispytest").assert_outcomes(passed=1)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
