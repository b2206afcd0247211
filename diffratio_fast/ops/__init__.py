"""The fused operations: public functions here, their definitions in plain PyTorch in ``reference_*``.

An operation runs compiled code if it was built for the device of the tensors, otherwise its reference.
The noise is bit-identical in both.
"""

from diffratio_fast.ops import (
    edm2,
    parameters,
    reference_edm2,
    reference_noise,
    reference_parameters,
    reference_ratio,
)
from diffratio_fast.ops.noise import add_noise, make_rng, normal, random_words, uniform
from diffratio_fast.ops.purpose import SEPARATE_NOISE, SHARED_NOISE, Purpose
from diffratio_fast.ops.ratio import log_ratio, pack_weights, ratio_loss, score_difference

__all__ = [
    "SEPARATE_NOISE",
    "SHARED_NOISE",
    "Purpose",
    "add_noise",
    "edm2",
    "log_ratio",
    "make_rng",
    "normal",
    "pack_weights",
    "parameters",
    "random_words",
    "ratio_loss",
    "reference_edm2",
    "reference_noise",
    "reference_parameters",
    "reference_ratio",
    "score_difference",
    "uniform",
]
