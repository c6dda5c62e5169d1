"""How the tests run: random networks per property, threads, and what is kept for `make test-all`."""

from __future__ import annotations

import os
import tempfile

# What is measured of this machine is not kept where the user keeps it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kfe-fx-tests-")
# Two workers share two cores. Set before torch, numpy or ONNX Runtime can start their own threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

THOROUGH = os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0")

# No deadline: the first example pays for importing torch. A failing example is printed with its seed.
_common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
# By default the same networks each time, so that what turns red was turned red by a change.
settings.register_profile("default", max_examples=200, derandomize=True, database=None, **_common)
settings.register_profile("thorough", max_examples=3000, **_common)
settings.load_profile("thorough" if THOROUGH else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what takes minutes to `make test-all`."""
    if THOROUGH:
        return
    slow = [item for item in items if item.get_closest_marker("thorough")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
