"""Readings against expectations: pure functions that return records. No torch, no I/O."""
