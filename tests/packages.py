"""Packages that a machine may lack."""

import importlib.util

import pytest


def needs(*names: str) -> None:
    """Skips the test, or the module, where one is not installed. It need not import by itself: of some only files are
    used, and installed without their dependencies."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
