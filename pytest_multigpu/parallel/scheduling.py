"""xdist's schedulers, with the tests that need the whole machine kept on one worker.

Imports xdist, so it is imported only where xdist asks for a scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from xdist.scheduler import (
    LoadFileScheduling,
    LoadGroupScheduling,
    LoadScheduling,
    LoadScopeScheduling,
    WorkStealingScheduling,
)

from .wire import read_group

if TYPE_CHECKING:
    import pytest

Node = Any
"""xdist's WorkerController."""


GROUP = "tests that need the whole machine"
"""The name of their unit of work."""


class _Together(LoadScopeScheduling):
    """Where GPUs are taken, the group is the first work of a worker that has had none, and its only
    work: that worker owns every GPU, and CUDA lets go of them only when its process ends.
    """

    group: frozenset[str] = frozenset()
    """Node ids, set before the first scheduling."""
    takes_gpus = True

    def _split_scope(self, nodeid: str) -> str:
        return GROUP if nodeid in self.group else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: Node) -> None:
        if not self.takes_gpus:
            super()._assign_work_unit(node)
            return
        if GROUP in self.workqueue:
            fresh = not self.assigned_work.get(node)
            self.workqueue.move_to_end(GROUP, last=not fresh)
            if not fresh and len(self.workqueue) == 1:
                node.shutdown()  # the one that replaces a crashed worker will run it
                return
        is_group = next(iter(self.workqueue)) == GROUP
        super()._assign_work_unit(node)
        others = [one for one in self.nodes if one is not node and not one.shutting_down]
        if is_group and others:
            node.shutdown()

    def remove_node(self, node: Node) -> str | None:
        """As xdist's own, but a test that crashed its worker is not run again."""
        units = self.assigned_work.pop(node)
        left = [name for unit in units.values() for name, done in unit.items() if not done]
        if not left:
            return None
        for unit in units.values():
            if left[0] in unit:
                unit[left[0]] = True
        self.workqueue.update({name: u for name, u in units.items() if not all(u.values())})
        for other in self.nodes:
            self._reschedule(other)
        return left[0]


class _TogetherByTest(_Together, LoadGroupScheduling):
    pass


class _TogetherByScope(_Together, LoadScopeScheduling):
    pass


class _TogetherByFile(_Together, LoadFileScheduling):
    pass


_KINDS: dict[str, tuple[type[_Together], Any]] = {
    "load": (_TogetherByTest, LoadScheduling),
    "worksteal": (_TogetherByTest, WorkStealingScheduling),
    "loadscope": (_TogetherByScope, LoadScopeScheduling),
    "loadfile": (_TogetherByFile, LoadFileScheduling),
    "loadgroup": (_TogetherByTest, LoadGroupScheduling),
}
KNOWN = frozenset(_KINDS)


class Scheduling:
    """Ours if a test of the group was collected, else the one that was asked for."""

    def __init__(
        self,
        dist: str,
        folder: str,
        config: pytest.Config,
        log: Any,
        *,
        takes_gpus: Callable[[], bool],
    ) -> None:
        """:param folder: where the workers name the group.
        :param takes_gpus: asked only if there is a group: a run about something else has no options
            of ours that would have to be right.
        """
        self._folder = folder
        ours, usual = _KINDS[dist]
        self._inner: Any = ours(config, log)
        self._takes_gpus = takes_gpus
        self._usual: Callable[[], Any] = lambda: usual(config, log)
        self._chosen = False

    def schedule(self) -> None:
        if not self._chosen:
            self._chosen = True
            self._inner.group = read_group(self._folder)
            if self._inner.group:
                self._inner.takes_gpus = self._takes_gpus()
            else:
                self._fall_back()
        self._inner.schedule()

    def _fall_back(self) -> None:
        usual = self._usual()
        collected: dict[Node, Sequence[str]] = self._inner.registered_collections
        present = self._inner.nodes
        for node in dict.fromkeys([*collected, *present]):
            usual.add_node(node)
            if node in collected:
                usual.add_node_collection(node, collected[node])
            if node not in present:
                usual.remove_node(node)  # it found nothing to run and has gone; it counts
        self._inner = usual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
