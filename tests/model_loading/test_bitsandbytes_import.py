"""bitsandbytes is imported without torch's compiler, which its functions get when called."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pytest_multigpu.errors import LoadError
from pytest_multigpu.model.bitsandbytes_import import compiling_when_called, import_bitsandbytes

SCRIPT = """
import sys, torch
compile_before = torch.compile
from pytest_multigpu.model.bitsandbytes_import import import_bitsandbytes
import_bitsandbytes()
assert torch.compile is compile_before
print("bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""


def test_the_compiler_is_not_imported_with_it() -> None:
    pytest.importorskip("bitsandbytes")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True False"
    assert done.stderr == ""  # no word of kernels for CPUs


CAST = """
from pytest_multigpu.model.bitsandbytes_import import import_bitsandbytes
import_bitsandbytes()
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
for _ in range(3):
    state = MatmulLtState()
    MatMul8bitLt.apply(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8), None, None, state)
"""


def test_the_cast_of_each_product_is_logged_once() -> None:
    pytest.importorskip("bitsandbytes")
    done = subprocess.run(
        [sys.executable, "-c", CAST], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("inputs will be cast from torch.bfloat16 to float16") == 1


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The logger of LLM.int8's products, as if nobody had set it."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


@pytest.mark.parametrize(("chosen", "lines"), [(logging.NOTSET, 1), (logging.WARNING, 3)])
def test_who_has_chosen_what_to_hear_of_products_hears_it(
    products: logging.Logger, caplog: pytest.LogCaptureFixture, chosen: int, lines: int
) -> None:
    """Here bitsandbytes may be there already, which makes no difference."""
    pytest.importorskip("bitsandbytes")
    products.setLevel(chosen)
    import_bitsandbytes()
    import_bitsandbytes()
    for _ in range(3):
        products.warning("cast")
    assert caplog.messages == ["cast"] * lines
    products.error("no kernel")
    assert caplog.messages[-1] == "no kernel"


def test_functions_are_compiled_when_first_called_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[tuple[str, dict[str, object]]] = []

    def compile_now(model: Callable[[int], int], **options: object) -> Callable[[int], int]:
        compiled.append((model.__name__, options))
        return lambda x: 100 + model(x)

    monkeypatch.setattr(torch, "compile", compile_now)

    def double(x: int) -> int:
        return 2 * x

    with compiling_when_called():
        plain = torch.compile(double)
        decorated = torch.compile(dynamic=False)(double)
        assert plain.__name__ == "double"
    assert torch.compile is compile_now
    assert not compiled
    assert plain(4) == 108
    assert plain(5) == 110
    assert decorated(6) == 112
    assert compiled == [("double", {}), ("double", {"dynamic": False})]


def test_a_module_is_compiled_at_once() -> None:
    layer = torch.nn.Linear(2, 2)
    with compiling_when_called():
        assert isinstance(torch.compile(layer), torch.nn.Module)


def test_the_compiler_is_put_back_after_a_failure() -> None:
    before = torch.compile
    with pytest.raises(ImportError), compiling_when_called():
        raise ImportError("libbitsandbytes")
    assert torch.compile is before


def test_what_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    level = logging.getLogger("bitsandbytes").level
    with pytest.raises(
        LoadError,
        match=r"^bitsandbytes cannot be imported \(ModuleNotFoundError: .*\); reinstall it, or "
        r"choose --gpu-tier=16bit$",
    ):
        import_bitsandbytes()
    assert logging.getLogger("bitsandbytes").level == level


def test_a_library_built_for_another_cuda_is_told_and_its_cause_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no  kernel\\n for sm_90')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    before = torch.compile
    with pytest.raises(LoadError) as caught:
        import_bitsandbytes()
    assert str(caught.value) == (
        "bitsandbytes cannot be imported (RuntimeError: no kernel for sm_90); reinstall it, or "
        "choose --gpu-tier=16bit"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert torch.compile is before
