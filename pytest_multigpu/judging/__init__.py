"""Readings against expectations: pure functions that return records. No torch, no pytest, no I/O."""
