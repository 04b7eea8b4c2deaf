"""xdist's schedulers, with the tests that need the whole machine kept on one worker.

Imports xdist, so it is imported only where xdist asks for a scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xdist.scheduler import (
    LoadFileScheduling,
    LoadGroupScheduling,
    LoadScheduling,
    LoadScopeScheduling,
    WorkStealingScheduling,
)

from .grouping import GROUP

if TYPE_CHECKING:
    import pytest

    Node = Any


class _Together(LoadScopeScheduling):
    """The group is the first work of a worker that has had none, and its only work.

    That worker owns every GPU, and CUDA lets go of them only when its process ends.
    """

    def _split_scope(self, nodeid: str) -> str:
        return GROUP if nodeid.endswith(f"@{GROUP}") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: Node) -> None:
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

    def __init__(self, dist: str, config: pytest.Config, log: Any) -> None:
        ours, usual = _KINDS[dist]
        self._inner: Any = ours(config, log)
        self._usual = lambda: usual(config, log)
        self._chosen = False

    def schedule(self) -> None:
        if not self._chosen:
            self._chosen = True
            collected: dict[Node, Sequence[str]] = self._inner.registered_collections
            if not any(name.endswith(f"@{GROUP}") for ids in collected.values() for name in ids):
                usual = self._usual()
                for node in self._inner.nodes:
                    usual.add_node(node)
                    if node in collected:
                        usual.add_node_collection(node, collected[node])
                self._inner = usual
        self._inner.schedule()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
