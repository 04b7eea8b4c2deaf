"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import version

from pytest_multigpu.installed import installed_versions


def test_absent_packages_are_left_out() -> None:
    found = installed_versions("pytest", "no-such-package-anywhere")
    assert found == {"pytest": version("pytest")}
