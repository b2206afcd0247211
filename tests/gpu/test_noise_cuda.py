"""The CUDA checks, one test each (collected only where there is a CUDA device: see tests/conftest.py)."""

import noise_checks
import pytest

pytestmark = pytest.mark.requires_cuda


@pytest.mark.parametrize("check", noise_checks.CHECKS, ids=lambda check: check.__name__)
def test_cuda(check):
    check()
