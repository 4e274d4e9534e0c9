"""Codecs, a file a kind.

Each module beside this one is imported, so that dropping a file in registers its codecs.
"""

from __future__ import annotations

import importlib
import pkgutil

from apiary.transport.codec import CODECS as CODECS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
