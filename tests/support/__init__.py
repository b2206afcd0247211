"""Helpers shared by several tests: small runs, data sets, published networks, paths of the checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
