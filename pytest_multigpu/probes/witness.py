"""What a probe's layers put out while something else runs the model, without disturbing it.

Imports :mod:`.capture`, :mod:`.probe`, errors; torch inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from .capture import check_ran, noting, stream_of
from .probe import Probe

if TYPE_CHECKING:
    import torch


class Witness:
    """A context manager around somebody else's forwards. Nothing that goes wrong with the probe
    reaches them: it is raised by :meth:`streams`.

    :param probe: is called on entering; it may raise.
    """

    def __init__(self, model: Any, probe: Callable[[], Probe]) -> None:
        self._model, self._probe = model, probe
        self._stack = ExitStack()
        self._parts: dict[int, list[Any]] = {}
        self._streams: dict[int, torch.Tensor] = {}
        self._error: Exception | None = None

    def __enter__(self) -> Witness:
        try:
            layers = self._probe().layers
            self._stack.enter_context(noting(self._model, layers, self._note))
            self._parts = {layer: [] for layer in layers}
        except Exception as error:  # a probe file can fail in any way; the probe's checks say so
            self._error = error.with_traceback(None)
        return self

    def _note(self, layer: int, output: Any) -> None:
        # A tuple may hold a cache, which must not be kept.
        self._parts[layer].append(output[0] if isinstance(output, tuple) and output else output)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch

        self._stack.close()
        parts, self._parts = self._parts, {}
        if error is not None or self._error is not None:
            return
        try:
            check_ran(set(parts), {layer: seen for layer, seen in parts.items() if seen})
            for layer, seen in parts.items():
                joined = torch.cat([stream_of(part, layer) for part in seen], dim=1)
                # To the host: what lies on a GPU would count as somebody's peak.
                self._streams[layer] = joined.detach().cpu()
        except Exception as failure:
            self._error = failure.with_traceback(None)

    def streams(self) -> dict[int, torch.Tensor]:
        """Layer to ``(batch, tokens, hidden)`` on the host, all forwards one after another.

        :raises ScoringError: it could not be watched.
        :raises MultiGpuError: the probe could not be had.
        """
        if self._error is not None:
            raise self._error
        if not self._streams:
            raise ScoringError("nothing was watched: the generation failed")
        return self._streams
