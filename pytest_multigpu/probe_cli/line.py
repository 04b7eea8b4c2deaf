"""How far a long command has come, on stderr: one moving line, or a line now and then."""

from __future__ import annotations

import sys
import threading
import time

_EVERY_S = 10.0
"""Between lines where there is no terminal."""


class Line:
    """Called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        """In place of the line before."""
        moving = sys.stderr.isatty()
        with self._lock:
            now = time.monotonic()
            if not moving and now - self._last < _EVERY_S:
                return
            self._last = now
            if moving:
                sys.stderr.write(f"\r{text:<{self._width}}")
                self._width = len(text)
            else:
                sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave nothing on the terminal's line."""
        with self._lock:
            if self._width:
                sys.stderr.write(f"\r{'':<{self._width}}\r")
                sys.stderr.flush()
                self._width = 0
