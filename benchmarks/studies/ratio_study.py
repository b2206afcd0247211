"""The study that chose the RatioMixer: candidate ratio networks at equal training time, in plain PyTorch.

    python -m benchmarks.studies.ratio_study [--out FILE] [--seconds S] [--only 'NAME;...']
        [--data digits|DIRECTORY]

Each candidate replaces the ratio network of the digits preset. Two metrics, without the test split:

- ``frechet``: the Fréchet distance of the averaged generator to the validation split, after as many steps as
  fit in ``--seconds`` (CPU time of this process);
- ``held_out``: the logistic loss on the validation split, after training the network for a third of that time
  against one frozen generator, the same for all (2 log 2 = 1.386 is the loss of a constant log ratio of 0).

``--out`` receives one JSON line per candidate. DIRECTORY contains the four gzipped IDX files of
Fashion-MNIST; there, images are padded to 32 x 32, patches are twice as large, learning rates half as large,
noise levels larger (in more dimensions small noise is classified without error), and batches have 64 images.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from diffratio_fast import networks, ops
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet, InMemoryDataSet
from diffratio_fast.data.scaling import SIGMA_DATA, Scaling
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.networks.layers import Embedding, FourierFeatures, Linear, Weight
from diffratio_fast.networks.mlp import MLPRatio
from diffratio_fast.objectives.diffratio import log_ratio_pair, ratio_loss
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.training.monitor import Evaluation
from diffratio_fast.training.state.generator import initial_state
from diffratio_fast.training.step.generator import Iteration

CONDITION = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """One candidate: the axes of the study. The first round varies one axis at a time from the defaults."""

    width: int = 64
    depth: int = 4
    expansion: int = 2
    patch: int = 2
    mixing: str = "linear"  # linear, activated (silu of it), two_layer, gated
    norm: str = "none"  # none (residual x 0.7 per layer), token, sample
    head: str = "position"  # position, moments, attention
    condition: str = "bias"  # bias, film, projection, token (the token bias alone)
    token_bias: str = (
        "none"  # none, mixing (one number per token in every layer), hidden (tokens x hidden units)
    )
    rate: float = 3e-3
    decay: float = 0.3
    residual: float = 0.7


class Candidate(nn.Module):
    """A mixer of tokens and channels along the axes of ``Shape``."""

    def __init__(self, shape: tuple[int, int, int], classes: int, axes: Shape) -> None:
        super().__init__()
        self.axes, self.patch = axes, axes.patch
        channels, height, width = shape
        tokens, hidden = height * width // axes.patch**2, axes.width * axes.expansion
        self.tokens, self.hidden = tokens, hidden
        self.fourier = FourierFeatures(16, low=0.25, high=4.0)
        self.noise = Linear(self.fourier.size, CONDITION)
        self.label = Embedding(classes, CONDITION)
        per_block = {"bias": hidden, "film": 2 * hidden, "projection": hidden, "token": 0}[axes.condition]
        self.biases = Linear(CONDITION, axes.width + axes.depth * per_block)
        self.first = Linear(channels * axes.patch**2, axes.width, gain=1.4)
        self.position = nn.Parameter(torch.zeros(tokens, axes.width))
        count = {"linear": 1, "activated": 1, "two_layer": 2, "gated": 2}[axes.mixing]
        self.mix = nn.ModuleList(Weight((tokens, tokens), fan_in=tokens) for _ in range(axes.depth * count))
        self.up = nn.ModuleList(Linear(axes.width, hidden, gain=1.4) for _ in range(axes.depth))
        self.down = nn.ModuleList(Linear(hidden, axes.width) for _ in range(axes.depth))
        if axes.token_bias == "mixing":
            self.extra = nn.Parameter(torch.zeros(axes.depth, tokens, 1))
        elif axes.token_bias == "hidden":
            self.extra = nn.Parameter(torch.zeros(axes.depth, tokens, hidden))
        features = {"position": tokens * axes.width, "moments": 2 * axes.width, "attention": axes.width}
        self.last = Linear(features[axes.head], 1, gain=0.0)
        self.query = Linear(axes.width, 1, bias=False)
        self.project = Linear(CONDITION, axes.width, gain=0.0)

    def norm(self, h: Tensor) -> Tensor:
        if self.axes.norm == "none":
            return h
        over = -1 if self.axes.norm == "token" else (-2, -1)
        return h * (h.square().mean(over, keepdim=True) + 1e-5).rsqrt()

    def mixed(self, block: int, h: Tensor) -> Tensor:
        kind, mix = self.axes.mixing, [part.weight for part in cast("Iterable[Weight]", self.mix)]
        if kind in ("linear", "activated"):
            mixed = mix[block] @ h
            if self.axes.token_bias == "mixing":
                mixed = mixed + self.extra[block]
            return mixed if kind == "linear" else silu(mixed)
        first, second = mix[2 * block], mix[2 * block + 1]
        return second @ silu(first @ h) if kind == "two_layer" else (first @ h) * torch.sigmoid(second @ h)

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        axes, p = self.axes, self.patch
        batch, channels, height, width = noised.shape
        c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
        patches = (noised * c_in.reshape(-1, 1, 1, 1)).reshape(batch, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.tokens, -1)
        condition = silu(self.noise(self.fourier(sigma.log())) + self.label(labels))
        token, *blocks = self.biases(condition)[:, None].split(
            [axes.width] + ([] if axes.condition == "token" else
                            [self.hidden] * (axes.depth * (2 if axes.condition == "film" else 1))), dim=2
        )  # fmt: skip
        h = self.first(patches) + self.position + token
        keep = axes.residual if axes.norm == "none" else 1.0
        for block in range(axes.depth):
            h = h + self.mixed(block, self.norm(h))
            inner = self.up[block](self.norm(h))
            if axes.token_bias == "hidden":
                inner = inner + self.extra[block]
            if axes.condition == "film":
                inner = inner * (1 + blocks[2 * block]) + blocks[2 * block + 1]
            elif axes.condition != "token":
                inner = inner + blocks[block]
            h = (h + self.down[block](silu(inner))) * keep
        if axes.norm != "none":
            h = self.norm(h)
        if axes.head == "position":
            pooled = h.flatten(1)
        elif axes.head == "moments":
            pooled = torch.cat((h.mean(1), (h.var(1) + 1e-5).sqrt()), 1)
        else:
            pooled = (h * self.query(h).softmax(1)).sum(1)
        out = self.last(pooled).squeeze(1)
        if axes.condition == "projection":
            out = out + (self.project(condition) * h.mean(1)).sum(1)
        return out


class Convolutions(nn.Module):
    """A small convolutional encoder, for comparison: three 3x3 layers, two of stride 2, dense head."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, image_width = shape
        self.fourier = FourierFeatures(16, low=0.25, high=4.0)
        self.noise = Linear(self.fourier.size, CONDITION)
        self.label = Embedding(classes, CONDITION)
        self.sizes = sizes = [width, 2 * width, 4 * width]
        self.biases = Linear(CONDITION, sum(sizes))
        self.kernels = nn.ModuleList(
            Linear(9 * a, b, gain=1.4) for a, b in zip([channels, *sizes], sizes, strict=False)
        )
        self.last = Linear(sizes[-1] * (height // 4) * (image_width // 4), 1, gain=0.0)

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        h = noised * (sigma**2 + SIGMA_DATA**2).rsqrt().reshape(-1, 1, 1, 1)
        condition = silu(self.noise(self.fourier(sigma.log())) + self.label(labels))
        biases = self.biases(condition).split(self.sizes, dim=1)
        kernels = cast("Iterable[Linear]", self.kernels)
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            weight = kernel.weight.reshape(len(kernel.weight), -1, 3, 3)
            h = torch.nn.functional.conv2d(h, weight, kernel.bias, stride=1 + (i > 0), padding=1)
            h = silu(h + bias[:, :, None, None])
        return self.last(h.flatten(1)).squeeze(1)


FAST = Shape(rate=6e-3)
BIASED = Shape(rate=6e-3, token_bias="mixing")  # the base of the second round: the best of the first


def _vary(shape: Shape, **axes: Any) -> Shape:
    return dataclasses.replace(shape, **axes)


CANDIDATES: dict[str, Shape | str] = {
    "mlp 192x4 (preset)": "mlp",
    "base": Shape(),
    "norm per token": Shape(norm="token"),
    "norm per sample": Shape(norm="sample"),
    "head mean/std": Shape(head="moments"),
    "lr 1e-3": Shape(rate=1e-3),
    "lr 6e-3": FAST,
    "mixing two-layer": Shape(mixing="two_layer"),
    "bias per token, mixing": Shape(token_bias="mixing"),
    "lr 6e-3, activated": _vary(FAST, mixing="activated"),
    "lr 6e-3, two-layer": _vary(FAST, mixing="two_layer"),
    "biased": BIASED,
    "biased, activated": _vary(BIASED, mixing="activated"),
    "biased, lr 1.2e-2": _vary(BIASED, rate=1.2e-2),
    "biased, norm per sample": _vary(BIASED, norm="sample"),
    "biased, 2 blocks": _vary(BIASED, depth=2),
    "biased, 128 wide, 2 blocks": _vary(BIASED, width=128, depth=2),
    "hidden bias per token": _vary(BIASED, token_bias="hidden"),
    "biased, projection": _vary(BIASED, condition="projection"),
    "biased, FiLM": _vary(BIASED, condition="film"),
    "biased, token condition": _vary(BIASED, condition="token"),
    "biased, expansion 4, 2 blocks": _vary(BIASED, expansion=4, depth=2),
    "biased, gated": _vary(BIASED, mixing="gated"),
    "biased, head attention": _vary(BIASED, head="attention"),
    "biased, residual 1": _vary(BIASED, residual=1.0),
    "biased, 8 blocks": _vary(BIASED, depth=8),
    "convolutions": "convolutions",
}


def fashion(directory: Path) -> DataSet:
    """Fashion-MNIST padded to 32 x 32; the last 5,000 training images are the validation split."""

    def read(name: str) -> np.ndarray[Any, Any]:
        raw = gzip.decompress((directory / f"{name}-ubyte.gz").read_bytes())
        sizes = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(*map(int, sizes))

    def part(images: str, labels: str, chosen: slice) -> tuple[Tensor, Tensor]:
        padded = np.pad(read(images)[chosen], ((0, 0), (2, 2), (2, 2)))
        return torch.from_numpy(padded)[:, None], torch.from_numpy(read(labels)[chosen].astype(np.int64))

    train = ("train-images-idx3", "train-labels-idx1")
    splits = {
        "train": part(*train, slice(0, 55_000)),
        "validation": part(*train, slice(55_000, 60_000)),
        "test": part("t10k-images-idx3", "t10k-labels-idx1", slice(None)),
    }
    values = splits["train"][0].double()
    scaling = Scaling((values.mean().item(),), (values.std(correction=0).item(),), 0.0, 255.0)
    return InMemoryDataSet("fashion", tuple("0123456789"), scaling, splits)


class Study:
    """Trainings on one data set that differ in the ratio network only."""

    def __init__(self, dataset: DataSet, seconds: float, seed: int) -> None:
        self.dataset, self.seconds, self.seed = dataset, seconds, seed
        self.device = torch.device("cpu")
        self.frozen: nn.Module | None = None

    def config(self, axes: Shape | str, steps: int) -> TrainConfig:
        options = PRESETS["digits"] | {"steps": steps, "seed": self.seed, "ratio_ema_half_life_images": None}
        if isinstance(axes, Shape):
            options |= {"ratio_weight_decay": axes.decay, "ratio_lr": axes.rate}
        if self.dataset.name != "digits":  # 55,000 images do not overfit
            options |= {"generator_width": 512, "ratio_weight_decay": 0.01, "batch_size": 64}
            options |= {"ratio_noise": "loguniform(0.2, 8)", "ratio_lr": options["ratio_lr"] / 2}
        return TrainConfig(**options)

    def ratio(self, axes: Shape | str, config: TrainConfig) -> nn.Module:
        shape, classes = self.dataset.shape, len(self.dataset.class_names)
        network: nn.Module
        if isinstance(axes, Shape):
            patch = axes.patch if self.dataset.name == "digits" else 2 * axes.patch
            network = Candidate(shape, classes, _vary(axes, patch=patch))
        elif axes == "mlp":
            network = MLPRatio(shape, classes, width=config.ratio_width, depth=config.ratio_depth)
        else:
            network = Convolutions(shape, classes)
        networks.initialize(network, self.seed, stream=1)
        return network

    def iteration(self, axes: Shape | str, steps: int) -> Iteration:
        config = self.config(axes, steps)
        state = initial_state(config, self.dataset, self.device)
        state.ratio = self.ratio(axes, config)
        state.ratio_optimizer = torch.optim.AdamW(
            state.ratio.parameters(), betas=(config.beta1, config.beta2),
            weight_decay=config.ratio_weight_decay, fused=True,
        )  # fmt: skip
        return Iteration(config, self.dataset.scaling, state, self.device)

    def batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        size = self.config("mlp", 1).batch_size
        for batch in self.dataset.batches("train", size, seed=self.seed):
            yield [batch]

    def train(self, axes: Shape | str, seconds: float) -> Iteration:
        """Train as many steps as fit in ``seconds``; the learning rate schedule covers these steps."""
        probe, batches = self.iteration(axes, 1000), self.batches()
        for _ in range(5):
            probe.run(next(batches))
        start = time.process_time()
        for _ in range(25):
            probe.run(next(batches))
        steps = max(50, int(seconds / (time.process_time() - start) * 25))
        iteration, batches = self.iteration(axes, steps), self.batches()
        for _ in range(steps):
            iteration.run(next(batches))
        return iteration

    def held_out(self, axes: Shape | str, seconds: float) -> float:
        """Validation loss of a network trained for ``seconds`` against the frozen generator."""
        if self.frozen is None:
            self.frozen = self.train("mlp", 6.0).state.average
        iteration = self.iteration(axes, 1000)
        ratio, optimizer = iteration.state.ratio, iteration.state.ratio_optimizer
        rate, index = iteration.config.ratio_lr, iteration.index
        start = time.process_time()
        for step, (batch,) in enumerate(self.batches()):
            done = (time.process_time() - start) / seconds
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = rate * (1 - 0.8 * done)
            real, labels = iteration.to_device(batch)
            rng = ops.make_rng(self.seed, step)
            with torch.no_grad():
                latents = latents_for(self.frozen, rng, index, ops.Purpose.LATENT)
                fake = self.frozen(latents, labels)
            sigma, _ = sample_sigma(iteration.ratio_law, rng, index, ops.Purpose.SIGMA_RATIO)
            optimizer.zero_grad()
            ratio_loss(ratio, real, fake, sigma[:, 0], labels, rng, index).loss.backward()
            optimizer.step()
        return self.validation_loss(iteration, self.frozen)

    @torch.no_grad()
    def validation_loss(self, iteration: Iteration, generator: nn.Module) -> float:
        real, labels = iteration.to_device(self.dataset.first("validation", 1000))
        index = torch.arange(len(labels))
        total, repeats = 0.0, -(-4000 // len(labels))
        for repeat in range(repeats):
            rng = ops.make_rng(10_000 + self.seed, repeat)
            fake = generator(latents_for(generator, rng, index, ops.Purpose.SAMPLE_LATENT), labels)
            sigma, _ = sample_sigma(iteration.ratio_law, rng, index, ops.Purpose.EVALUATION_SIGMA)
            halves = log_ratio_pair(iteration.state.ratio, real, fake, sigma[:, 0], labels, rng, index)
            total += float(softplus(-halves[0]).mean() + softplus(halves[1]).mean())
        return total / repeats

    def measure(self, name: str, axes: Shape | str) -> dict[str, Any]:
        iteration = self.train(axes, self.seconds)
        evaluation = Evaluation(iteration.config, self.dataset, iteration)
        distance = evaluation.validation_distance()
        count = sum(p.numel() for p in iteration.state.ratio.parameters())
        row = {"name": name, "data": self.dataset.name, "seed": self.seed, "parameters": count}
        row |= {"steps": iteration.config.steps, "frechet": distance}
        return row | {"held_out": self.held_out(axes, self.seconds / 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare candidate ratio networks.")
    parser.add_argument("--out", type=Path, default=Path("ratio_study.jsonl"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--only", help="names of candidates, separated by semicolons")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset("digits") if arguments.data == "digits" else fashion(Path(arguments.data))
    study = Study(dataset, arguments.seconds, arguments.seed)
    for name in arguments.only.split(";") if arguments.only else CANDIDATES:
        print(row := study.measure(name, CANDIDATES[name]), flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
