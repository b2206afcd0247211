"""Initial weights of a run: ``--init`` from another run, a file, or published weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from diffratio_fast import networks
from diffratio_fast.config.run import RunConfig
from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.data.scaling import EDM_PIXELS, Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.networks import load_published
from diffratio_fast.networks.backbone import (
    BackboneGenerator,
    EncoderRatio,
    copy_weights,
    require_same,
)
from diffratio_fast.networks.conditional import ConditionalDenoiser, copy_denoiser
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import DAMAGE, one_line, parse_json, require_regular


def load_initial(
    source: Path, generator: nn.Module | None, ratio: nn.Module | None, dataset: DataSet
) -> None:
    """Copy initial weights into the given networks, in place; raises ``UserError`` if they do not match.

    A directory of ``train`` has a generator and a ratio network, the file of a generator only a generator. A
    denoiser (a directory of ``pretrain``, or a file of ``convert``) initializes the generator, and its
    encoder initializes a ratio network of kind ``encoder``.
    """
    if source.is_dir():
        run = RunPaths(source)
        if run.denoiser.exists():
            _from_denoiser(run.denoiser, generator, ratio, dataset)
            return
        if not run.generator.exists():
            raise UserError(
                f"--init {source}: not a finished run (no {run.generator.name} or {run.denoiser.name})"
            )
        if generator is not None:
            _copy(run.generator, "generator", generator)
        if ratio is not None:
            _copy(run.ratio, "ratio", ratio)
    elif "architecture" in _metadata(source):
        _from_denoiser(source, generator, ratio, dataset)
    elif generator is not None:
        _copy(source, "generator", generator)
    else:
        raise UserError(
            f"--init {source}: contains a generator only; expected weights for a ratio network too"
        )


def load_teacher(source: Path, denoisers: tuple[Denoiser, Denoiser], dataset: DataSet) -> None:
    """Copy a denoiser's weights into the teacher and the student of score distillation, in place."""
    denoiser = RunPaths(source).denoiser
    if source.is_dir() and not denoiser.exists():
        raise UserError(f"--teacher {source}: not a finished run of pretrain (no {denoiser.name})")
    loaded = load_denoiser(source, dataset, option="--teacher")
    for network in denoisers:
        take(source, network, loaded, option="--teacher")


def load_denoiser(source: Path, dataset: DataSet, *, option: str = "--init") -> Denoiser:
    """Load the denoiser of a ``pretrain`` directory or a converted file; checks its data scaling."""
    path = RunPaths(source).denoiser if source.is_dir() else source
    denoiser, metadata = load_published(path)
    theirs = EDM_PIXELS if dataset.kind == "image" else None
    if "scaling" in metadata:
        try:
            theirs = Scaling.parse(parse_json(metadata["scaling"]))
        except ValueError as error:
            raise UserError(f"--init {path}: damaged ({error})") from None
    if theirs is not None and theirs != dataset.scaling:
        raise UserError(
            f"{option} {path}: trained on data with mean {list(theirs.mean)} and std {list(theirs.std)}; "
            "this data "
            f"set has {list(dataset.scaling.mean)} and {list(dataset.scaling.std)}; prepare it with the same "
            "--scaling (published weights: edm)"
        )
    return denoiser


def _from_denoiser(
    path: Path, generator: nn.Module | None, ratio: nn.Module | None, dataset: DataSet
) -> None:
    if generator is not None and not isinstance(generator, BackboneGenerator):
        raise UserError(f"--init {path}: a denoiser; use --generator backbone")
    if generator is None and not isinstance(ratio, (EncoderRatio, ConditionalDenoiser)):
        raise UserError(f"--init {path}: a denoiser; use --ratio-network encoder")
    denoiser = load_denoiser(path, dataset)
    for network in (generator, ratio):
        if isinstance(network, (BackboneGenerator, EncoderRatio, ConditionalDenoiser)):
            take(path, network, denoiser)


def take(
    path: Path,
    network: BackboneGenerator | EncoderRatio | ConditionalDenoiser | Denoiser,
    denoiser: Denoiser,
    *,
    option: str = "--init",
) -> None:
    """Copy the weights of a denoiser to ``network``; a ``UserError`` suggests matching options."""
    try:
        if isinstance(network, ConditionalDenoiser):
            copy_denoiser(network, denoiser)
        else:
            copy_weights(network if isinstance(network, Denoiser) else network.denoiser, denoiser)
    except ValueError as error:
        raise _another_network(option, path, denoiser.architecture, denoiser.config, error) from None


def check_initial(source: Path, config: RunConfig, dataset: DataSet) -> None:
    """Raise ``UserError`` if a denoiser in ``source`` is not this run's network; reads metadata only.

    Large networks take minutes to build, so this comes first. Anything else is left to ``load_initial``.
    """
    path = RunPaths(source).denoiser if source.is_dir() else source
    metadata = _metadata(path) if path.exists() else {}
    if not {"architecture", "config"} <= metadata.keys():
        return
    channels, height, _ = model_shape(dataset)
    classes = len(dataset.class_names)
    size = {"img_resolution": height, "img_channels": channels, "label_dim": classes if classes > 1 else 0}
    architecture = metadata["architecture"]
    theirs: dict[str, Any] = {}
    try:
        theirs = dict(parse_json(metadata["config"]))
        require_same((config.backbone, {**config.backbone_arguments, **size}), (architecture, theirs))
    except ValueError as error:
        raise _another_network("--init", path, architecture, theirs, error) from None
    except DAMAGE as error:
        raise UserError(f"--init {path}: damaged ({one_line(error)})") from None


def _another_network(
    option: str, path: Path, architecture: str, config: Mapping[str, Any], error: ValueError
) -> UserError:
    data = ("img_resolution", "img_channels", "label_dim", "augment_dim")
    options = {name: value for name, value in config.items() if name not in data}
    side = config.get("img_resolution")
    return UserError(
        f"{option} {path}: another network than this run's ({error}); its options are --backbone "
        f"{architecture} --backbone-options '{json.dumps(options)}', for images "
        f"[{config.get('img_channels')}, {side}, {side}] and {config.get('label_dim') or 'no'} classes"
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"--init {path}: no such file or directory") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"--init {path}: damaged or not a safetensors file ({error})") from None


def _copy(path: Path, role: str, network: nn.Module) -> None:
    loaded, _ = networks.load(path, role)
    try:
        network.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--init {path}: another architecture than this run's ({reason[:200]})") from None
