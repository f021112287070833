"""Settings that every test shares."""

from __future__ import annotations

import os

# Figures are written to files, never shown.
os.environ.setdefault("MPLBACKEND", "Agg")

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # The same examples on every run, however slow the machine is.
    settings.register_profile("fastcil", derandomize=True, deadline=None, database=None)
    settings.load_profile("fastcil")
