"""Curation steps, a file each.

Each module beside this one is imported, so that dropping a file in registers its steps.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
