"""The geometric augmentation of pre-training: each transform, its labels, the denoiser's input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from diffratio_fast import networks, ops
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.errors import UserError
from diffratio_fast.objectives import geometric
from diffratio_fast.objectives.geometric import LABELS, Transform
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer

TINY = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def transform(count: int = 1, **values: float) -> Transform:
    return Transform(*(torch.full((count,), values.get(name, 0.0)).double() for name in Transform._fields))


def picture(height: int = 6, width: int = 8) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, height, width)))


def applied(x: Tensor, **values: float) -> np.ndarray:
    return geometric.apply(transform(len(x), **values), x).numpy()


def test_nothing_is_done_at_probability_zero() -> None:
    x = picture().repeat(50, 1, 1, 1)
    found = geometric.random_transform(ops.make_rng(0, 0), torch.arange(50), 0)
    assert torch.equal(geometric.apply(found, x), x)
    assert torch.equal(found.labels(), torch.zeros(50, LABELS, dtype=torch.float64))


def test_flips_turns_and_whole_shifts_move_pixels() -> None:
    x = picture()
    np.testing.assert_array_equal(applied(x, mirror=1), x.numpy()[..., ::-1])
    np.testing.assert_array_equal(applied(x, upend=1), x.numpy()[..., ::-1, :])
    square = picture(7, 7)
    for quarters in (-1, 1, 2):
        turned = np.rot90(square.numpy(), quarters, (2, 3))  # counterclockwise, as seen
        np.testing.assert_allclose(applied(square, angle=quarters * math.pi / 2), turned, atol=1e-6)
    right, down = 3, -2
    moved = applied(x, right=right / geometric.SHIFT / 8, down=down / geometric.SHIFT / 6)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), "symmetric")
    np.testing.assert_allclose(moved, padded[:, :, 3 - down : 9 - down, 3 - right : 11 - right], atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"scale": 1.7},
        {"scale": -1.2},
        {"angle": 0.6},
        {"angle": -2.4},
        {"stretch": 1.3},
        {"stretch": 1.5, "stretch_angle": 0.9},
        {"stretch": -1.1, "stretch_angle": -2.0},
        {"right": 0.45, "down": -0.8},
        {"mirror": 1.0, "scale": 1.0, "angle": 1.0, "stretch": 1.0, "stretch_angle": 0.5, "right": 1.0,
         "upend": 1.0, "down": 0.4},
    ],
    ids=lambda values: "-".join(values),
)  # fmt: skip
def test_every_transform_is_that_of_scipy(values: dict[str, float]) -> None:
    """On a smooth image, where splines and bicubic interpolation agree."""
    rows, columns = np.mgrid[0:33, 0:33]
    x = np.cos(np.pi * (rows + 0.5) / 33) + 0.5 * np.cos(np.pi * 2 * (columns + 0.5) / 33) * np.cos(
        np.pi * (rows + 0.5) / 33
    )
    t = {name: values.get(name, 0.0) for name in Transform._fields}

    def turn(angle: float) -> np.ndarray:  # counterclockwise, in (column, row)
        return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    widen = np.diag([geometric.STRETCH ** t["stretch"], geometric.STRETCH ** -t["stretch"]])
    forward = turn(t["stretch_angle"]) @ widen @ turn(-t["stretch_angle"]) @ turn(t["angle"])
    forward = forward * geometric.SCALE ** t["scale"] @ np.diag([1 - 2 * t["mirror"], 1 - 2 * t["upend"]])
    swap = np.array([[0, 1], [1, 0]])
    back = swap @ np.linalg.inv(forward) @ swap  # in (row, column)
    moved = 33 * geometric.SHIFT * np.array([t["down"], t["right"]])
    offset = np.array([16, 16]) - back @ (np.array([16, 16]) + moved)
    expected = ndimage.affine_transform(x, back, offset, mode="reflect", order=3)
    found = applied(torch.from_numpy(x)[None, None], **values)[0, 0]
    assert np.abs(found - x).max() > 0.1  # the transform has an effect
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_labels_say_what_was_done() -> None:
    found = transform(mirror=1, upend=1, scale=0.3, angle=0.5, stretch=2, stretch_angle=0.7, right=-1, down=3)
    expected = [1, 1, 0.3, math.cos(0.5) - 1, math.sin(0.5), 2 * math.cos(0.7), 2 * math.sin(0.7), -1, 3]
    assert found.labels().tolist() == [pytest.approx(expected)]
    assert not transform(stretch_angle=1.0).labels().any()  # an angle without stretching


def test_how_often_and_how_far() -> None:
    count, probability = 20_000, 0.12
    found = geometric.random_transform(ops.make_rng(3, 1), torch.arange(count), probability)
    assert float(found.mirror.mean()) == pytest.approx(0.5, abs=0.015)
    assert float(found.upend.mean()) == pytest.approx(probability / 2, abs=0.01)
    for name in ("scale", "angle", "stretch", "right", "down"):
        values = getattr(found, name)
        chosen = values[values != 0]
        assert len(chosen) / count == pytest.approx(probability, abs=0.01), name
        spread = math.pi / math.sqrt(3) if name == "angle" else 1.0
        assert float(chosen.std()) == pytest.approx(spread, rel=0.05), name
    assert torch.equal(found.right != 0, found.down != 0)
    together = ((found.scale != 0) & (found.angle != 0)).double().mean()
    assert float(together) == pytest.approx(probability**2, abs=0.004)
    part = geometric.random_transform(ops.make_rng(3, 1), torch.arange(50, 60), probability)
    assert all(torch.equal(a[50:60], b) for a, b in zip(found, part, strict=True))
    x = torch.randn(60, 3, 9, 9)
    first60 = Transform(*(value[:60] for value in found))
    assert torch.equal(geometric.apply(first60, x)[50:], geometric.apply(part, x[50:]))


def pretrainer(path: Path, **options: Any) -> Pretrainer:
    config = {"device": "cpu", "batch_size": 12, "backbone_options": json.dumps(TINY)} | options
    return Pretrainer("digits", PretrainConfig(**config), RunDirectory(path))


def stepped(run: Pretrainer, steps: int = 3) -> dict[str, Tensor]:
    batches = run.batches()
    for _ in range(steps):
        run.advance(next(batches))
    return {name: tensor.clone() for name, tensor in run.state.tensors()}


def test_the_denoiser_gets_the_transformed_images_and_their_labels(tmp_path: Path) -> None:
    run = pretrainer(tmp_path, augment_probability=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    inner = run.iteration.denoiser

    def watching(x: Tensor, sigma: Tensor, labels: Tensor, given: Tensor) -> Tensor:
        seen.append((x, given))
        return inner(x, sigma, labels, given)

    run.iteration.denoiser = watching
    batch = next(run.batches())
    run.advance(batch)
    ((noised, given),) = seen
    wanted = geometric.random_transform(ops.make_rng(0, 0), torch.arange(12), 0.5)
    torch.testing.assert_close(given.double(), wanted.labels(), rtol=1e-6, atol=1e-6)
    x0, _, index = pretrainer(tmp_path).iteration.part(batch[0], slice(0, 12))
    noise = ops.normal(ops.make_rng(0, 0), index, (1, 8, 8), ops.Purpose.DENOISING_NOISE)
    residual = noised - geometric.apply(wanted, x0)
    sigma = (residual * noise).flatten(1).sum(1) / noise.square().flatten(1).sum(1)
    torch.testing.assert_close(residual, sigma.reshape(-1, 1, 1, 1) * noise, rtol=1e-4, atol=1e-4)


def test_parts_of_an_augmented_batch_add_up_to_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "float64", "augment_probability": 0.4, "beta1": 0.9}
    whole = stepped(pretrainer(tmp_path, **options))
    parts = stepped(pretrainer(tmp_path, **options, micro_batch=5))
    for name, tensor in whole.items():
        if not name.startswith("sums"):
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert any("map_augment" in name for name in whole)
    given = whole["denoiser.model.map_augment.weight"]
    assert not torch.equal(given, pretrainer(tmp_path, **options).state.denoiser.model.map_augment.weight)


def test_training_starts_from_an_augmented_denoiser(tmp_path: Path) -> None:
    run = pretrainer(tmp_path / "d", augment_probability=0.3)
    stepped(run, 1)
    run.directory.root.mkdir()
    run.results()
    denoiser, _ = networks.load_published(run.directory.denoiser)
    assert denoiser.config["augment_dim"] == LABELS
    config = TrainConfig(
        device="cpu", generator="backbone", ratio_network="encoder", backbone_options=json.dumps(TINY),
        init=str(tmp_path / "d"), batch_size=4,
    )  # fmt: skip
    state = Trainer("digits", config, RunDirectory(tmp_path / "t")).state
    z, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():  # augment labels of zero mean no augmentation
        image = denoiser(2.5 * z, torch.tensor(2.5), labels, torch.zeros(4, LABELS))
        made = state.generator(z, labels)
    torch.testing.assert_close(made, torch.clamp(image, state.generator.low, state.generator.high))


def test_networks_without_augment_labels_are_rejected(tmp_path: Path) -> None:
    edm2 = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [2]}
    with pytest.raises(UserError, match="augment_dim"):
        pretrainer(tmp_path, augment_probability=0.1, backbone="edm2:xs", backbone_options=json.dumps(edm2))
    with pytest.raises(UserError, match="augment_dim 9"):
        pretrainer(tmp_path, augment_probability=0.1, backbone_options=json.dumps(TINY | {"augment_dim": 4}))
