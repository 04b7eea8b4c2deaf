"""The root of this repository's tests. ``pytester`` is loaded by pyproject.toml.

Not by ``pytest_plugins`` here: an editable install's checks are collected from other roots too
(``gpu_checks = true`` in a game's repository), where that is an error.
"""
