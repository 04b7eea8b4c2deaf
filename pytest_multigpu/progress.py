"""How far a load has come, past pytest's capture: one moving line, or a line now and then."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from .records.progress import Progress

_LINE_EVERY_S = 10.0
"""Between lines where there is no terminal, as in a CI log."""

_WORTH_SHOWING = 10**9
"""Bytes; less is loaded before anybody could read the line."""


class ProgressLine:
    """Called by the loader from any thread. Writes past the capture to the real terminal."""

    def __init__(self, config: pytest.Config) -> None:
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._reporter = config.pluginmanager.get_plugin("terminalreporter")
        self._lock = threading.Lock()
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        small = progress.bytes_total < _WORTH_SHOWING
        if self._reporter is None or self._reporter.verbosity < 0 or small:
            return
        moving = self._reporter.isatty
        with self._lock:
            now = time.monotonic()
            done = progress.bytes_done >= progress.bytes_total
            if not (moving or done) and now - self._last < _LINE_EVERY_S:
                return
            self._last = now
            text = line(progress)
            if self._capture is None:
                self._write(text, moving=moving, done=done)
            else:
                with self._capture.global_and_fixture_disabled():
                    self._write(text, moving=moving, done=done)

    def _write(self, text: str, *, moving: bool, done: bool) -> None:
        end = "\n" if done else ""
        sys.stdout.write(f"\r{text}\x1b[K{end}" if moving else f"\n{text}{end}")
        sys.stdout.flush()


def line(progress: Progress) -> str:
    """``loading 70.6 of 141.1 GB, 30.7 GB/s, 2 s left``"""
    text = (
        f"loading {progress.bytes_done / 1e9:.1f} of {progress.bytes_total / 1e9:.1f} GB, "
        f"{progress.gb_per_second:.1f} GB/s"
    )
    left = progress.seconds_left
    return text if not left else f"{text}, {left:.0f} s left"
