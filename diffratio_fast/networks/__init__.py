"""Generators and ratio networks, by name, and their files.

A generator is ``generator(latents [N, *latent_shape], labels int64 [N]) -> x0 [N, C, H, W]``; a ratio
network is ``ratio(noised [N, C, H, W], sigma [N], labels int64 [N]) -> log_ratio [N]``.
"""

from diffratio_fast.networks.generate import generate
from diffratio_fast.networks.layers import initialize
from diffratio_fast.networks.published import from_published, load_published
from diffratio_fast.networks.saved import GENERATORS, RATIO_NETWORKS, SavedNetwork, build, load, save

__all__ = [
    "GENERATORS",
    "RATIO_NETWORKS",
    "SavedNetwork",
    "build",
    "from_published",
    "generate",
    "initialize",
    "load",
    "load_published",
    "save",
]
