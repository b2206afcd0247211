"""The divergences a generator can descend (a table of ``ops``), and the bound that is logged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffratio_fast.ops.divergences import DIVERGENCES, Divergence

__all__ = ["DIVERGENCES", "Divergence", "jensen_shannon_bound"]

LOG_2 = math.log(2.0)


def jensen_shannon_bound(log_ratio_real: Tensor, log_ratio_fake: Tensor) -> Tensor:
    """Lower bound on the Jensen-Shannon divergence in nats, a scalar; may be negative.

    log 2 - (E_real softplus(-l) + E_fake softplus(l)) / 2 (Nguyen, Wainwright and Jordan 2010; Goodfellow
    et al. 2014), from log ratios of any shape. A bound for the current ratio network only.
    """
    softplus = torch.nn.functional.softplus
    return LOG_2 - (softplus(-log_ratio_real).mean() + softplus(log_ratio_fake).mean()) / 2
