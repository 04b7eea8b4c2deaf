"""Bytes, placement, peaks and prices: pure logic. No torch, no pytest, no I/O."""
