"""Exported generators compute what PyTorch computes; a folder for the Hub holds a model card."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from diffratio_fast import export, networks, ops
from diffratio_fast.errors import UserError
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.sampling.sampler import Sampler


def inputs_and_images(run: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Latents and labels of samples 0 to 6 of seed 0, and their images by ``sample``."""
    sampler = Sampler(run, device=torch.device("cpu"))
    labels = torch.arange(7) % 10
    rng = ops.make_rng(0, 0, "cpu")
    latents = latents_for(sampler.generator, rng, torch.arange(7), ops.Purpose.SAMPLE_LATENT)
    return latents, labels, sampler.images(0, 0, labels).numpy()


def test_torch_export_gives_the_images_of_sample(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.pt2"
    assert export.main([str(trained), "--to", "torch-export", "--out", str(out)]) == 0
    latents, labels, images = inputs_and_images(trained)
    found = torch.export.load(out).module()(latents, labels)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - images.astype(int)).max() <= 1  # rounding of half levels
    assert (found.numpy() == images).mean() > 0.99


def test_onnx_gives_the_images_of_sample(trained: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "g.onnx"
    assert export.main([str(trained), "--to", "onnx", "--out", str(out)]) == 0
    latents, labels, images = inputs_and_images(trained)
    session = runtime.InferenceSession(str(out))
    (found,) = session.run(None, {"latents": latents.numpy(), "labels": labels.numpy()})
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - images.astype(int)).max() <= 1
    assert (found == images).mean() > 0.99


def test_a_program_that_differs_is_an_error(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffratio_fast.sampling import exported

    load = torch.export.load
    shifted = lambda path: types.SimpleNamespace(  # noqa: E731
        module=lambda: lambda *inputs: load(path).module()(*inputs) // 2
    )
    monkeypatch.setattr(exported.torch.export, "load", shifted)
    with pytest.raises(UserError, match="differs from PyTorch by"):
        export.main([str(trained), "--to", "torch-export", "--out", str(tmp_path / "g.pt2")])


def test_a_folder_for_the_hub(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    assert export.main([str(trained), "--to", "hub", "--out", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    assert (
        "digits, 10 classes" in card and f"| frechet_distance | {summary['frechet_distance']:.5g} |" in card
    )
    assert card.startswith("---\nlibrary_name: diffratio_fast\n") and "3 steps, 48 images" in card
    network, _ = networks.load(folder / "generator.safetensors", "generator")
    assert {"ratio.safetensors", "config.yaml", "summary.json", "metrics.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert network is not None
    uploaded: list[tuple[str, str]] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            assert exist_ok

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            uploaded.append((repo_id, folder_path))

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = Api  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert not uploaded
    assert export.main([str(trained), "--to", "hub", "--out", str(folder), "--upload", "me/digits"]) == 0
    assert uploaded == [("me/digits", str(folder))]
    with pytest.raises(UserError, match="--upload is for --to hub"):
        export.main([str(trained), "--to", "onnx", "--upload", "me/digits"])
