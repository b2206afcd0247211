"""Published snapshots to safetensors: pickles of the published structure; the underlying reader."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from support.published_snapshots import (
    FIXTURES,
    TINY,
    code,  # noqa: F401 - a fixture
    fails,
    published,
    snapshot,
    write,
)

from diffratio_fast import convert, networks
from diffratio_fast.networks import published_pickles
from diffratio_fast.storage import pickles

# Conversion.


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_snapshot_becomes_the_network(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "network.pkl", snapshot(name), protocol)
    for module in [key for key in sys.modules if key.startswith(("torch_utils", "dnnlib"))]:
        monkeypatch.delitem(sys.modules, module)  # the code is no longer importable
    out = tmp_path / "deep" / "network.safetensors"
    assert convert.main([str(path), str(out)]) == 0
    assert not [key for key in sys.modules if key.startswith(("torch_utils", "dnnlib"))]
    fixture = load_file(FIXTURES / f"{name}.safetensors")
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        about = file.metadata()
    written = load_file(out)
    assert set(written) == {key.removeprefix("state.") for key in fixture if key.startswith("state.")}
    assert all(torch.equal(value, fixture[f"state.{key}"]) for key, value in written.items())
    network, metadata = networks.load_published(out)
    assert metadata["architecture"] == about["architecture"].replace("edm2:a", "edm2:other")
    assert json.loads(metadata["config"]) == json.loads(about["config"])
    by_hand = networks.from_published(metadata["architecture"], metadata["config"]).eval()
    by_hand.load_state_dict(written, strict=True)
    for result in (network, by_hand):
        denoised = result(fixture["input.x"], fixture["input.sigma"], fixture.get("input.labels"))
        assert (denoised - fixture["output.denoised"]).abs().max() < 3e-6 * fixture[
            "output.denoised"
        ].abs().max()


@pytest.mark.usefixtures("code")
def test_half_precision_weights_stay_as_they_are(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    network, _ = networks.load_published(FIXTURES / "edm2_tiny.safetensors")
    content["ema"] = published(network.half(), network.config)
    out = tmp_path / "out.safetensors"
    convert.main([str(write(tmp_path / "n.pkl", content)), str(out)])
    written = load_file(out)
    assert written["unet.out_conv.weight"].dtype == torch.float16
    assert next(networks.load_published(out)[0].parameters()).dtype == torch.float32


@pytest.mark.usefixtures("code")
def test_views_of_storages_and_positional_arguments(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    state = content["ema"].meta["state"]
    config = state["_init_kwargs"]
    state["_init_args"] = tuple(config.pop(key) for key in ("img_resolution", "img_channels", "label_dim"))
    network, _ = networks.load_published(FIXTURES / "edm2_tiny.safetensors")
    freqs = network.logvar_fourier.freqs
    wide = torch.stack([torch.full_like(freqs, 9.0), freqs])
    state["_modules"]["logvar_fourier"].meta["state"]["_buffers"]["freqs"] = wide.T[
        :, 1
    ]  # strided, with offset
    out = tmp_path / "out.safetensors"
    convert.main([str(write(tmp_path / "n.pkl", content)), str(out)])
    assert torch.equal(load_file(out)["logvar_fourier.freqs"], freqs)
    loaded, _ = networks.load_published(out)
    assert (loaded.img_resolution, loaded.img_channels, loaded.label_dim) == (16, 4, 10)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("name", "dropped", "architecture", "added"),
    [
        ("edm_ddpmpp_tiny", ["embedding_type", "encoder_type", "decoder_type", "channel_mult_noise",
                             "resample_filter"], "edm:ddpmpp", {}),
        ("edm_adm_tiny", ["model_type", "label_dim"], "edm:adm", {"model_type": "DhariwalUNet"}),
        ("edm_ncsnpp_tiny", ["decoder_type"], "edm:ncsnpp", {"decoder_type": "standard"}),
    ],
)  # fmt: skip
def test_options_left_to_the_published_defaults(
    name: str, dropped: list[str], architecture: str, added: dict[str, Any]
) -> None:
    content = snapshot(name)
    kwargs = content["ema"].meta["state"]["_init_kwargs"]
    for option in dropped:
        del kwargs[option]
    kwargs["sigma_max"] = float("inf")
    record = pickles.read(io.BytesIO(pickle.dumps(content)))["ema"]
    network = published_pickles.published_network(record)
    assert network.architecture == architecture
    assert "sigma_max" not in network.config
    assert added.items() <= network.config.items()
    built = networks.from_published(network.architecture, network.config)
    if "label_dim" not in dropped:
        built.load_state_dict(network.state, strict=True)


@pytest.mark.usefixtures("code")
def test_info_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "n.pkl", snapshot("edm2_tiny"))
    assert convert.main([str(path), "--info"]) == 0
    printed = capsys.readouterr().out
    assert (
        "ema: Precond" in printed
        and "encoder: StabilityVAEEncoder" in printed
        and "loss_fn: EDMLoss" in printed
    )
    assert "edm2:other" in printed and '"model_channels": 16' in printed
    tensors = sum(key.startswith("state.") for key in load_file(FIXTURES / "edm2_tiny.safetensors"))
    assert f"{tensors} tensors of float32" in printed
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("code")
def test_another_key(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    content["net"] = content.pop("ema")
    path = write(tmp_path / "n.pkl", content)
    assert "expected one of 'encoder', 'dataset_kwargs', 'loss_fn', 'net'" in fails(path)
    assert convert.main([str(path), str(tmp_path / "o.safetensors"), "--key", "net"]) == 0
    assert "has class StabilityVAEEncoder; expected EDMPrecond (EDM) or Precond (EDM2)" in fails(
        path, "--key", "encoder"
    )
    assert "has class dict" in fails(path, "--key", "dataset_kwargs")


# The reader against Python's.

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=12,
)


@given(plain, st.integers(4, 5), st.booleans())
def test_plain_data_is_read_as_python_reads_it(value: Any, protocol: int, twice: bool) -> None:
    value = [value, value] if twice else value  # shared, through the memo
    data = pickle.dumps(value, protocol)
    assert repr(pickles.read(io.BytesIO(data))) == repr(pickle.loads(data))


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_value_or_a_value_error(data: bytes) -> None:
    try:
        pickles.read(io.BytesIO(b"\x80\x04" + data))
    except ValueError as error:
        assert str(error)


def test_sharing_and_cycles_survive() -> None:
    inner = [1]
    value: list[Any] = [inner, inner]
    value.append(value)
    read = pickles.read(io.BytesIO(pickle.dumps(value)))
    assert read[0] is read[1] and read[2] is read
