from __future__ import annotations

import os
from contextlib import suppress

import pytest

# pytester forgets modules that an inner run imports; those of ours must stay the same ones.
import pytest_multigpu.planview
import pytest_multigpu.runlog
import pytest_multigpu.runtime  # noqa: F401

OTHERS = ("hypothesispytest", "cacheprovider", "randomly", "memray", "html", "pytest_cov")
"""Plugins that inner runs do without, unless they are about them."""


@pytest.fixture(autouse=True)
def _only_our_plugins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner runs load what they are about; hypothesis alone would add half a second to each.

    And pytest-randomly imports numpy, which pytester would have to import twice.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in OTHERS))


@pytest.fixture(autouse=True, scope="session")
def heavy_modules() -> None:
    """torch, transformers and bitsandbytes, as runs with a model or a plan import them: those that
    an inner run imports are forgotten, and torch's C part cannot be imported twice. A run whose
    plan is in no cache imports them, whatever it is about."""
    from pytest_multigpu.errors import LoadError
    from pytest_multigpu.model.bitsandbytes_import import import_bitsandbytes
    from pytest_multigpu.options import CPU_MODEL, Settings
    from pytest_multigpu.session import GpuSession

    session = GpuSession(Settings(tier="cpu", model=CPU_MODEL), os.environ)
    try:
        session.score_texts()
    finally:
        session.close()
    with suppress(LoadError):  # for tests that need it to say
        import_bitsandbytes()
