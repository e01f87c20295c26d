"""A program of scripts/ as a module."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from tests.helpers.paths import ROOT

SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    """What it imports lies beside it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
