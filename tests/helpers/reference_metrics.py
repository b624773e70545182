"""torchmetrics and torch-fidelity as references, without torchvision.

torch-fidelity's `__init__` imports torchvision, which is not installed beside CPU torch, and torchmetrics.image imports
torch-fidelity wherever it finds it. What the tests need of both runs without: it loads under an empty parent package.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def reference(module: str) -> ModuleType:
    """A module of torchmetrics or torch_fidelity; skips the test where the package is not installed."""
    if "torch_fidelity" not in sys.modules and (spec := importlib.util.find_spec("torch_fidelity")) is not None:
        parent = ModuleType("torch_fidelity")
        parent.__spec__, parent.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = parent
    pytest.importorskip(module.split(".")[0])
    return importlib.import_module(module)
