"""A training loop over the public API, with a ratio network of its own: digits, a few minutes on a CPU.

    python examples/training_loop.py [STEPS]

The command `python -m diffratio_fast.train` does the same with averages, checkpoints and evaluation.
"""

import sys

import torch
from torch import Tensor, nn

from diffratio_fast import networks, ops
from diffratio_fast.config.noise_laws import parse_noise_law
from diffratio_fast.data import open_dataset
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.objectives.diffratio import ratio_loss, score_difference
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.objectives.weights import WEIGHTS

BATCH, CLASSES, SEED = 128, 10, 0


class ConvolutionalRatio(nn.Module):
    """Any network is a ratio network: noised [N, C, H, W], sigma [N], labels [N] to log ratios [N]."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, channels)
        self.layers = nn.ModuleList(
            nn.Conv2d(1 + channels if i == 0 else channels, channels, 3, padding=1) for i in range(3)
        )
        self.read = nn.Linear(channels, 1)
        nn.init.zeros_(self.read.weight)  # all log ratios start at zero

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        scale = (sigma**2 + 0.25).rsqrt()[
            :, None, None, None
        ]  # unit variance: data have standard deviation 0.5
        condition = (self.embed(labels) + sigma.log()[:, None])[:, :, None, None].expand(
            -1, -1, *noised.shape[2:]
        )
        h = torch.cat((scale * noised, condition), 1)
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        return self.read(h.mean((2, 3))).squeeze(1)


def main(steps: int) -> float:
    """Train for ``steps`` steps; return the last ratio loss, 2 log 2 where real and fake look the same."""
    data = open_dataset("digits")
    generator = networks.build("generator", "mlp", {
        "shape": data.shape, "classes": CLASSES, "latent_size": 64, "width": 256, "depth": 3,
        "bounds": data.scaling.bounds(),
    })  # fmt: skip
    networks.initialize(generator, SEED, stream=0)
    ratio, law = ConvolutionalRatio(), parse_noise_law("loguniform(0.04, 1.33)")
    fit_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.99))
    fit_ratio = torch.optim.Adam(ratio.parameters(), 2e-3, betas=(0.0, 0.99))
    index, value = torch.arange(BATCH), 0.0
    for step, (records, labels) in zip(range(steps), data.batches("train", BATCH, seed=SEED), strict=False):
        rng = ops.make_rng(SEED, step)  # every random number is a function of (seed, step, sample, purpose)
        fake = generator(ops.normal(rng, index, (64,), ops.Purpose.LATENT), labels)
        real = data.scaling.to_model(records)

        sigma = sample_sigma(law, rng, index, ops.Purpose.SIGMA_RATIO)[0][:, 0]
        loss = ratio_loss(ratio, real, fake, sigma, labels, rng, index).loss
        fit_ratio.zero_grad()
        loss.backward()
        fit_ratio.step()

        sigma = sample_sigma(law, rng, index, ops.Purpose.SIGMA_GENERATOR)[0]
        direction = score_difference(
            ratio, fake, sigma, labels, rng, index,
            weight=WEIGHTS["sigma2"](sigma, 0.5), divergence=DIVERGENCES["jensen_shannon"],
        ).gradient  # fmt: skip
        fit_generator.zero_grad()
        fake.backward(direction / BATCH)
        fit_generator.step()
        value = float(loss.detach())
        if step % 100 == 0:
            print(f"step {step}: ratio loss {value:.3f}")
    return value


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
