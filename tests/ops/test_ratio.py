"""The ratio operations: the reference against autograd and closed forms, errors, the composed path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffratio_fast import networks, ops
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives import diffratio, fused
from diffratio_fast.ops import Purpose, reference_ratio
from diffratio_fast.ops.ratio import forward_flops, weight_shapes

CHANNELS, SIDE, SIZE = 2, 4, 2
TOKENS, WIDTH, DEPTH, HIDDEN = 4, 3, 2, 5
D = WIDTH + DEPTH * HIDDEN


def problem(
    batch: int = 3, draws: int = 2, dtype: torch.dtype = torch.float64, energy: bool = False
) -> dict[str, Any]:
    shapes = weight_shapes(TOKENS, WIDTH, DEPTH, HIDDEN, CHANNELS * SIZE**2, energy)
    image = (batch, CHANNELS, SIDE, SIDE)
    return {
        "weights": [0.6 * torch.randn(shape, dtype=dtype) for shape in shapes.values()],
        "real": torch.randn(image, dtype=dtype),
        "fake": torch.randn(image, dtype=dtype),
        "sigma": torch.rand(batch, draws, dtype=dtype) + 0.1,
        "weight": torch.rand(batch, draws, dtype=dtype) + 0.5,
        "conditioning": torch.randn(batch, draws, D, dtype=dtype),
        "rng": ops.make_rng(3, 8),
        "index": torch.arange(batch) + 7,
    }


def straightforward(weights: list[Tensor], x: Tensor, sigma: Tensor, e: Tensor) -> Tensor:
    """The log ratio of one image, computed per token and channel as in the documentation."""
    patch, position, mix, mix_bias, up, down, head, *energy = weights
    c_in = 1 / (sigma**2 + 0.25).sqrt()
    vectors = []
    for row in range(0, SIDE, SIZE):
        for across in range(0, SIDE, SIZE):
            vectors.append((c_in * x[:, row : row + SIZE, across : across + SIZE]).reshape(-1))
    h = torch.stack([patch @ vector for vector in vectors]) + position + e[:WIDTH]
    for block in range(DEPTH):
        m = torch.stack(
            [
                h[t] + sum(mix[block, t, s] * h[s] for s in range(TOKENS)) + mix_bias[block, t]
                for t in range(TOKENS)
            ]
        )
        hidden = e[WIDTH + block * HIDDEN : WIDTH + (block + 1) * HIDDEN]
        u = torch.stack([up[block] @ m[t] + hidden for t in range(TOKENS)])
        a = u / (1 + (-u).exp())
        h = 0.7 * (m + torch.stack([down[block] @ a[t] for t in range(TOKENS)]))
    value = (head * h).sum()
    for matrix in energy:
        value += sum(v @ (h[t] @ matrix) for t, v in enumerate(vectors)) / x.numel() ** 0.5
    return value


@pytest.mark.parametrize("energy", [False, True])
def test_log_ratio_is_what_is_written(energy):
    p = problem(energy=energy)
    sigma, e = p["sigma"][:, 0], p["conditioning"][:, 0]
    expected = [straightforward(p["weights"], x, s, c) for x, s, c in zip(p["real"], sigma, e, strict=True)]
    torch.testing.assert_close(ops.log_ratio(p["weights"], p["real"], sigma, e), torch.stack(expected))


@pytest.mark.parametrize("energy", [False, True])
def test_log_ratio_passes_gradcheck_for_every_input(energy):
    p = problem(batch=2, energy=energy)
    inputs = [*p["weights"], p["real"], p["conditioning"][:, 0]]
    for tensor in inputs:
        tensor.requires_grad_()

    def call(*tensors: Tensor) -> Tensor:
        return ops.log_ratio(list(tensors[:-2]), tensors[-2], p["sigma"][:2, 0], tensors[-1])

    assert torch.autograd.gradcheck(call, inputs)


def test_without_mixing_and_hidden_units_the_log_ratio_is_linear():
    p = problem()
    patch, position, mix, mix_bias, up, down, head = p["weights"]
    weights = [patch, position, 0 * mix, 0 * mix_bias, up, 0 * down, head]
    sigma = p["sigma"][:, 0]
    e = p["conditioning"][:, 0]
    c_in = (sigma**2 + 0.25).rsqrt()[:, None, None]
    h = c_in * (reference_ratio.patches(p["real"], SIZE) @ patch.T) + position + e[:, None, :WIDTH]
    expected = 0.7**DEPTH * (head * h).sum((1, 2))
    torch.testing.assert_close(ops.log_ratio(weights, p["real"], sigma, e), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_score_difference_is_the_mean_of_the_factors_times_the_gradients(name):
    p = problem()
    p["weights"][-1] *= 8  # log ratios beyond the clamps
    result = ops.score_difference(
        p["weights"], p["fake"], p["sigma"], p["conditioning"], p["rng"], p["index"],
        weight=p["weight"], divergence=name,
    )  # fmt: skip
    expected, clamped = torch.zeros_like(p["fake"]), 0
    for k in range(2):
        sigma = p["sigma"][:, k]
        eps = ops.normal(p["rng"], p["index"], p["fake"].shape[1:], Purpose.NOISE_GENERATOR, draw=k)
        noised = (p["fake"] + sigma[:, None, None, None] * eps.double()).requires_grad_()
        value = ops.log_ratio(p["weights"], noised, sigma, p["conditioning"][:, k])
        (slope,) = torch.autograd.grad(value.sum(), noised)
        h, outside = DIVERGENCES[name].factor(value)
        expected -= (p["weight"][:, k] * h)[:, None, None, None] * slope / 2
        clamped += int(outside.sum())
        torch.testing.assert_close(result.log_ratio[:, k], value.detach())
    torch.testing.assert_close(result.gradient, expected)
    if DIVERGENCES[name].clamp is not None:
        assert clamped > 0


@pytest.mark.parametrize("energy", [False, True])
def test_ratio_loss_passes_gradcheck_in_weights_and_conditionings(energy):
    p = problem(batch=2, energy=energy)
    inputs = [*p["weights"], p["conditioning"][:, 0].clone(), p["conditioning"][:, 1].clone()]
    for tensor in inputs:
        tensor.requires_grad_()

    def call(*tensors: Tensor) -> Tensor:
        return 3 * ops.ratio_loss(
            list(tensors[:-2]), p["real"], p["fake"], p["sigma"][:, 0], tensors[-2], tensors[-1],
            p["rng"], p["index"],
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_loss_is_differentiable(dtype):
    p = problem(dtype=dtype)
    for weight in p["weights"]:
        weight.requires_grad_()
    e = p["conditioning"].requires_grad_()
    p["fake"].requires_grad_()
    outcome = ops.ratio_loss(
        p["weights"], p["real"], p["fake"], p["sigma"][:, 0], e[:, 0], e[:, 1], p["rng"], p["index"]
    )
    others = [*outcome[1:3], *outcome.weight_gradients, *outcome.conditioning_gradients]
    assert outcome.loss.requires_grad and not any(tensor.requires_grad for tensor in others)
    outcome.loss.backward()
    assert p["fake"].grad is None
    for weight, gradient in zip(p["weights"], outcome.weight_gradients, strict=True):
        assert torch.equal(weight.grad, gradient) and bool((gradient != 0).any())
    assert torch.equal(e.grad[:, 0], outcome.conditioning_gradients[0])
    score = ops.score_difference(
        p["weights"], p["fake"], p["sigma"], e, p["rng"], p["index"], weight=p["weight"]
    )
    assert not any(tensor.requires_grad for tensor in score)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 64, 64), (1, 28, 28), (1, 6, 9)])
@pytest.mark.parametrize("head", ["scalar", "energy"])
def test_the_network_takes_every_shape(shape, head):
    network = RatioMixer(shape, 3, width=16, depth=2, head=head)
    networks.initialize(network, 0, stream=1)
    out = network(torch.randn(2, *shape), torch.tensor([0.2, 0.9]), torch.tensor([0, 2]))
    assert out.shape == (2,) and bool((out == 0).all())  # the head starts at zero
    tokens = len(network.weights()[1])
    assert tokens <= 256


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        RatioMixer((1, 8, 8), 3, width=16, depth=2, patch=3)
    with pytest.raises(ValueError, match="no patch size"):
        RatioMixer((1, 8, 521), 3, width=16, depth=2)


def mixer(dtype: torch.dtype, head: str) -> RatioMixer:
    network = RatioMixer((2, 8, 8), 5, width=8, depth=2, head=head)
    networks.initialize(network, 4, stream=1)
    torch.nn.init.normal_(network.parts["head"].weight, std=0.2)
    torch.nn.init.normal_(network.parts["mix_bias"].weight, std=0.2)
    if head == "energy":
        torch.nn.init.normal_(network.parts["energy"].weight, std=0.2)
    return network.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", ["scalar", "energy"])
def test_fused_steps_are_the_composed_ones(dtype, head):
    network, batch = mixer(dtype, head), 6
    real, fake = torch.randn(2, batch, 2, 8, 8, dtype=dtype).unbind()
    sigma = torch.rand(batch, 2, dtype=dtype) + 0.1
    labels, rng, index = torch.arange(batch) % 5, ops.make_rng(1, 2), torch.arange(batch)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    gradients = []
    for module in (diffratio, fused):
        network.zero_grad()
        outcome = module.ratio_loss(network, real, fake, sigma[:, 0], labels, rng, index)
        outcome.loss.backward()
        named = {name: p.grad.clone() for name, p in network.named_parameters()}
        score = module.score_difference(
            network, fake, sigma, labels, rng, index, weight=sigma**2,
            divergence=DIVERGENCES["jeffreys"], h_mean=sigma + 1,
        )  # fmt: skip
        gradients.append((outcome, named, score))
    for composed, other in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(other, composed, **tolerance)


@pytest.mark.parametrize("energy", [False, True])
def test_flops_are_those_of_the_matrix_products(energy):
    p = problem(energy=energy)
    with FlopCounterMode(display=False) as counter:
        reference_ratio.log_ratio(p["weights"], p["fake"], p["sigma"][:, 0], p["conditioning"][:, 0])
    assert counter.get_total_flops() == 3 * forward_flops([weight.shape for weight in p["weights"]])


WRONG = [
    ({"weights": []}, ValueError, "7 tensors"),
    ({"weights": [torch.zeros(0, 8), torch.zeros(4, 0), *[torch.zeros(1, 0, 0)] * 5]}, ValueError, "empty"),
    ({"weights": 3}, ValueError, "weight up must be"),
    ({"weights": "int"}, TypeError, "float32, bfloat16 or float64"),
    ({"fake": torch.zeros(3, 2, 4)}, ValueError, r"\[B, channels, H, W\]"),
    ({"fake": torch.zeros(3, 2, 4, 6)}, ValueError, "do not fit"),
    ({"fake": torch.zeros(3, 1, 4, 4)}, ValueError, "do not fit"),
    ({"fake": torch.zeros(3, 2, 4, 4).double()}, TypeError, "float64"),
    ({"fake": torch.zeros(3, 2, 4, 4).half()}, TypeError, "images must be"),
    ({"sigma": torch.ones(3)}, ValueError, r"\[B, K\]"),
    ({"sigma": torch.ones(2, 2)}, ValueError, "sigma must be"),
    ({"sigma": torch.full((3, 2), float("nan"))}, ValueError, "sigma contains NaN"),
    ({"sigma": torch.ones(3, 2, requires_grad=True)}, ValueError, "not differentiable in sigma"),
    ({"weight": torch.ones(3, 1)}, ValueError, "weight must be"),
    ({"conditioning": torch.ones(3, 2, 4)}, ValueError, "conditioning must be"),
    ({"index": torch.arange(4)}, ValueError, "one entry per sample"),
    ({"rng": torch.zeros(2)}, ValueError, "rng must be int64"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of"),
]


@pytest.mark.parametrize("function", [ops.score_difference, reference_ratio.score_difference])
@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(function, change, error, message):
    p = problem(dtype=torch.float32) | {"divergence": "reverse_kl"}
    if change.get("weights") == 3:
        p["weights"][4] = p["weights"][4][:, :, :2]
    elif change.get("weights") == "int":
        p["weights"][0] = p["weights"][0].int()
    else:
        p |= change
    with pytest.raises(error, match=message):
        function(
            p["weights"], p["fake"], p["sigma"], p["conditioning"], p["rng"], p["index"],
            weight=p["weight"], divergence=p["divergence"],
        )  # fmt: skip
