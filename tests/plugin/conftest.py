from __future__ import annotations

import pytest

# pytester forgets modules that an inner run imports; those of ours must stay the same ones.
import pytest_multigpu.planview
import pytest_multigpu.runlog
import pytest_multigpu.runtime  # noqa: F401


@pytest.fixture(autouse=True)
def _only_our_plugins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner runs load what they are about; hypothesis alone would add half a second to each."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:cacheprovider")
