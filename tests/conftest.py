"""Fixtures that every test may ask for, and the checks that every test must pass."""

from __future__ import annotations

import os

# Before torch is imported: two test processes at once would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
