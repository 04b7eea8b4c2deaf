"""Two profiles: ``ci-fuzz`` (100 inputs a test, always the same) and ``fuzz`` (1,000 new ones).

``HYPOTHESIS_PROFILE=fuzz pytest tests/fuzz`` runs the second. The deadline is for an input that
hangs, not for a slow machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

DEADLINE_MS = 10_000

settings.register_profile(
    "ci-fuzz",
    max_examples=100,
    deadline=DEADLINE_MS,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "fuzz",
    max_examples=1000,
    deadline=DEADLINE_MS,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
