"""``-p fake_machine``: NVML answers for ``FAKE_GPUS`` H100s, also in xdist's workers."""

from __future__ import annotations

import os

from pytest_multigpu.machine import nvml
from pytest_multigpu.machine.fake import FakeNvml

_FAKE = FakeNvml(int(os.environ["FAKE_GPUS"]))
nvml.load_nvml = lambda: _FAKE
