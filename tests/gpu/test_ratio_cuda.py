"""The CUDA checks of the ratio operations, one test each (collected only where there is a CUDA device)."""

import pytest
import ratio_checks

pytestmark = pytest.mark.requires_cuda


@pytest.mark.parametrize("check", ratio_checks.CHECKS, ids=lambda check: check.__name__)
def test_cuda(check):
    check()
