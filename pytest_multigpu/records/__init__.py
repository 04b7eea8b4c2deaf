"""Frozen data that every other part shares. One file a subject; import from the file.

Imports only :mod:`pytest_multigpu.units` and the standard library.
"""
