"""Where a run's first weights come from: ``--init`` of another run, of a file, of published weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from diffratio_fast import networks
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.scaling import EDM_PIXELS, Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.networks import load_published
from diffratio_fast.networks.backbone import BackboneGenerator, EncoderRatio, copy_weights
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import parse_json, require_regular


def load_initial(
    source: Path, generator: nn.Module | None, ratio: nn.Module | None, dataset: DataSet
) -> None:
    """Copy initial weights into the networks that are given, in place; what does not fit is a ``UserError``.

    A directory of ``train`` gives generator and ratio network, a generator's file that alone. A denoiser
    (a directory of ``pretrain``, or a file of ``convert``) gives the generator, and half of it the ratio
    network where that is an encoder.
    """
    if source.is_dir():
        run = RunPaths(source)
        if run.denoiser.exists():
            _from_denoiser(run.denoiser, generator, ratio, dataset)
            return
        if not run.generator.exists():
            raise UserError(
                f"--init {source}: holds no finished run (no {run.generator.name} or {run.denoiser.name})"
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
        raise UserError(f"--init {source}: holds a generator and nothing for a ratio network")


def load_teacher(source: Path, denoisers: tuple[Denoiser, Denoiser], dataset: DataSet) -> None:
    """Copy a denoiser's weights into the teacher and the student of score distillation, in place."""
    denoiser = RunPaths(source).denoiser
    if source.is_dir() and not denoiser.exists():
        raise UserError(f"--teacher {source}: holds no finished run of pretrain (no {denoiser.name})")
    loaded = load_denoiser(source, dataset, option="--teacher")
    for network in denoisers:
        take(source, network, loaded, option="--teacher")


def load_denoiser(source: Path, dataset: DataSet, *, option: str = "--init") -> Denoiser:
    """The denoiser of a ``pretrain`` directory or a converted file, for data scaled as ``dataset`` is."""
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
            f"{option} {path}: was trained on data of mean {list(theirs.mean)} and std {list(theirs.std)}, "
            f"not {list(dataset.scaling.mean)} and {list(dataset.scaling.std)}; prepare the data with that "
            "--scaling (published weights: edm)"
        )
    return denoiser


def _from_denoiser(
    path: Path, generator: nn.Module | None, ratio: nn.Module | None, dataset: DataSet
) -> None:
    if generator is not None and not isinstance(generator, BackboneGenerator):
        raise UserError(f"--init {path}: is a denoiser, which needs --generator backbone")
    if generator is None and not isinstance(ratio, EncoderRatio):
        raise UserError(f"--init {path}: is a denoiser, which needs --ratio-network encoder")
    denoiser = load_denoiser(path, dataset)
    for network in (generator, ratio):
        if isinstance(network, (BackboneGenerator, EncoderRatio)):
            take(path, network, denoiser)


def take(
    path: Path,
    network: BackboneGenerator | EncoderRatio | Denoiser,
    denoiser: Denoiser,
    *,
    option: str = "--init",
) -> None:
    """``network`` takes the weights; the ``UserError`` advises the options that would fit."""
    try:
        copy_weights(network if isinstance(network, Denoiser) else network.denoiser, denoiser)
    except ValueError as error:
        data = ("img_resolution", "img_channels", "label_dim", "augment_dim")
        options = {name: value for name, value in denoiser.config.items() if name not in data}
        raise UserError(
            f"{option} {path}: another network than this run's ({error}); it is of --backbone "
            f"{denoiser.architecture} --backbone-options '{json.dumps(options)}', for images "
            f"[{denoiser.img_channels}, {denoiser.img_resolution}, {denoiser.img_resolution}] and "
            f"{denoiser.label_dim or 'no'} classes"
        ) from None


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
