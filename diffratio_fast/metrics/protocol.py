"""Evaluation of a generator, or of existing images, against a reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffratio_fast.config.options import read_yaml
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.manifest import MANIFEST
from diffratio_fast.data.protocols import has_whole_train
from diffratio_fast.devices import choose_device, device_name
from diffratio_fast.errors import UserError
from diffratio_fast.metrics import published
from diffratio_fast.metrics.classifiers import Classifier, ExportedProgram, SupportVectors
from diffratio_fast.metrics.features import Extractor, load_extractor
from diffratio_fast.metrics.images import DataSetImages, FileImages, Images, open_images
from diffratio_fast.metrics.pixels import MAX_DIMENSION, proportional_labels
from diffratio_fast.metrics.reference import (
    QUANTIZATION,
    Measured,
    Reference,
    load_reference,
    measure,
    reference_of,
    require_enough,
    save_reference,
    saved_shape,
)
from diffratio_fast.metrics.results import Results, Sample, compute_metrics, floors, sample_of, summary
from diffratio_fast.progress import ImageProgress
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.sampling.sampler import Sampler
from diffratio_fast.storage.reading import UNPACKED_LIMIT

CHUNK = 256
"""Images generated per batch."""


@dataclass(frozen=True)
class Options:
    """Options; see ``python -m diffratio_fast.evaluate --help``."""

    subject: Path
    reference: str | None
    split: str
    features: str
    weights: Path | None
    metrics: tuple[str, ...]
    count: int
    seeds: tuple[int, ...]
    labels: str
    classifier: str | None
    vae: Path | None
    save_reference: Path | None
    device: str
    max_bytes: int = UNPACKED_LIMIT
    trust_classifier: bool = False
    protocol: str | None = None


@dataclass
class GeneratedImages:
    """Images of ``sampler`` for ``seed``, one per label in ``labels`` int64 [count]."""

    sampler: Sampler
    seed: int
    labels: np.ndarray
    shape: tuple[int, int, int]

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def about(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def batches(self) -> Iterator[Tensor]:
        labels = torch.from_numpy(self.labels)
        for start in range(0, self.count, CHUNK):
            yield self.sampler.images(self.seed, start, labels[start : start + CHUNK])


def evaluate(options: Options) -> dict[str, Any]:
    """Return all results and their inputs as JSON data; raises ``UserError`` for bad input."""
    if options.classifier not in (None, "svm") and not options.trust_classifier:
        raise UserError(
            f"--classifier {options.classifier}: the file is a program, and evaluating runs it with your "
            "rights; add --trust-classifier if you trust its author"
        )
    device = choose_device(options.device)
    sampler = _sampler(options, device)
    source = options.reference or _trained_on(options, sampler)
    dataset = None if Path(source).suffix in (".npz", ".pkl") else _open_reference(source)
    protocol = None if options.protocol is None else published.PROTOCOLS[options.protocol]
    if dataset is None and options.save_reference is not None:
        raise UserError(
            "--save-reference: --reference is already saved statistics; expected a data set as --reference"
        )
    if dataset is not None and dataset.kind != "image":
        raise UserError(
            f"{source}: contains latents; use the data set of the images, or saved statistics, as --reference"
        )
    wanted = saved_shape(Path(source), options.max_bytes) if dataset is None else dataset.shape
    given = None if sampler else _given_images(options, wanted)
    shape = sampler.shape if sampler else given.shape  # type: ignore[union-attr]
    _check_shape(options, shape, source, wanted)
    if protocol is not None:
        published.check_reference(protocol, source, dataset)
        if given is not None:
            published.check_subject(protocol, given.count, options.subject)
    extractor = load_extractor(_features_for(options, shape), options.weights, shape, device)
    if protocol is not None:
        published.check_extractor(protocol, extractor)
    if "frechet" in options.metrics:
        require_enough(given.count if given else options.count, extractor, str(options.subject))
    if dataset is None:
        reference = load_reference(Path(source), extractor, options.max_bytes)
        names = reference.class_names
        if protocol is not None and reference.count is not None:  # published statistics have no count
            published.check_reference(protocol, source, None, reference.about)
    else:
        names = list(dataset.class_names)
    if given is not None:
        _check_classes(options, given, names)
    elif names is not None and len(sampler.class_names) not in (1, len(names)):  # type: ignore[union-attr]
        raise UserError(f"{options.subject}: its classes do not match the {len(names)} classes of {source}")
    if dataset is not None:
        reference = _reference_of(options, source, dataset, extractor)
        reference.about["whole_train"] = options.split == "train" and has_whole_train(dataset)
    subjects = [given] if given else _generated(options, sampler, reference)  # type: ignore[arg-type]
    return _measure_all(options, subjects, sampler, reference, dataset, extractor, device)


def _measure_all(
    options: Options,
    subjects: Sequence[Images],
    sampler: Sampler | None,
    reference: Reference,
    dataset: DataSet | None,
    extractor: Extractor,
    device: torch.device,
) -> dict[str, Any]:
    classifier = _classifier(options, reference, device)

    def measured(images: Images, what: str) -> tuple[Measured, Sample]:
        watch = classifier.watch if classifier else (lambda batches: batches)
        with ImageProgress(images.count, what) as progress:
            result = measure(images, extractor, watch=watch, progress=progress.update)
        return result, sample_of(result)

    classified = None if classifier is None else dict(classifier.identity)
    if dataset is not None:
        split = "train" if options.split == "test" else "test"
        held_out = DataSetImages(dataset, split, limit=max(images.count for images in subjects))
        if held_out.count:
            real, sample = measured(held_out, f"{split} split")
            reference.held_out, reference.held_out_name = sample.features, f"{split} against {options.split}"
            if classifier is not None and classified is not None:
                classified["class_accuracy_real"] = {"split": split, "value": classifier.accuracy(real)}
    if options.save_reference is not None:
        save_reference(options.save_reference, reference, extractor)
    whole = Sample(reference.count or 0, reference.moments, reference.features)
    results: list[dict[str, Any]] = []
    values: list[Results] = []
    first: Sample | None = None
    for images in subjects:
        generated, sample = measured(images, "generated" if sampler else "images")
        first = first or sample
        found = compute_metrics(sample, whole, extractor, options.metrics, device)
        if classifier is not None and generated.labels is not None and options.labels != "ignore":
            found["class_accuracy"] = classifier.accuracy(generated)
        values.append(found)
        results.append({"images": generated.about, **found})
    assert first is not None
    subject: dict[str, Any] = {"path": str(options.subject)}
    if sampler is not None:
        subject |= sampler.identity() | {"trained": sampler.about.training}
    return {
        "subject": subject,
        "reference": reference.about,
        "extractor": extractor.identity,
        "classifier": classified,
        "count": first.count,
        "seeds": list(options.seeds) if sampler else None,
        "labels": options.labels if sampler or options.labels == "ignore" else "as given",
        "quantisation": QUANTIZATION,  # words: ok
        "protocol": None if options.protocol is None else _protocol(published.PROTOCOLS[options.protocol]),
        "environment": {"torch": str(torch.__version__), "device": device_name(device)},
        "results": results,
        "summary": summary(values),
        "floors": floors(first, reference, extractor, options.metrics, device),
    }


def _protocol(protocol: published.Protocol) -> dict[str, str]:
    names = ("name", "metric", "quoted", "source")
    return {name: getattr(protocol, name) for name in names}


def _open_reference(source: str) -> DataSet:
    if source != "digits" and not Path(source).exists():
        raise UserError(f"--reference {source}: no such data set or file of statistics")
    return open_dataset(source)


def _sampler(options: Options, device: torch.device) -> Sampler | None:
    """The generator to evaluate; None if the subject is images."""
    path = options.subject
    if path.suffix == ".safetensors":
        return Sampler(path, device=device, vae=options.vae)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or directory; name a run directory, a generator's .safetensors, a "
            "folder of images or an .npz"
        )
    if not path.is_dir():
        return None
    if (path / MANIFEST).exists():
        raise UserError(f"{path}: a prepared data set; expected a generator or images; use it as --reference")
    if RunPaths(path).is_run():
        return Sampler(path, device=device, vae=options.vae)
    return None


def _trained_on(options: Options, sampler: Sampler | None) -> str:
    """The data set of the generator's run."""
    if sampler is not None:
        for root in (options.subject, options.subject.parent, options.subject.parent.parent):
            config = RunPaths(root).config
            if config.is_file():
                return str(read_yaml(TrainConfig, config)["data"])
    raise UserError(f"{options.subject}: its training data set is unknown; set --reference")


def _given_images(options: Options, wanted: tuple[int, int, int] | None) -> Images:
    if options.vae is not None:
        raise UserError(
            f"--vae: {options.subject} contains images; --vae needs a generator of latents; omit it"
        )
    return open_images(options.subject, 3 if wanted is None else wanted[0], options.max_bytes)


def _features_for(options: Options, shape: tuple[int, int, int]) -> str:
    if options.features != "auto":
        return options.features
    return "pixels" if int(np.prod(shape)) <= MAX_DIMENSION else "inception"


def _check_shape(
    options: Options, shape: tuple[int, int, int], source: str, wanted: tuple[int, int, int] | None
) -> None:
    if wanted is not None and shape != wanted:
        raise UserError(f"{options.subject}: images are {_size(shape)}; {source} needs {_size(wanted)}")


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]} x {shape[1]}" + {1: " gray", 3: " RGB"}.get(shape[0], f" x {shape[0]}")


def _check_classes(options: Options, given: Images, names: list[str] | None) -> None:
    """Raise ``UserError`` unless every class of the reference has images (if both have classes)."""
    if options.labels == "ignore" or names is None or len(names) == 1:
        return
    advice = "or ignore classes with --labels ignore"
    if isinstance(given, FileImages) and given.class_names is not None:
        if unknown := [name for name in given.class_names if name not in names]:
            raise UserError(
                f"{options.subject}: {unknown[0]} is not a class of the reference; rename it, {advice}"
            )
        given.labels = np.array([names.index(name) for name in given.class_names])[given.labels]
    if given.labels is None:
        return
    if given.labels.min() < 0 or given.labels.max() >= len(names):
        raise UserError(
            f"{options.subject}: some labels are out of range; expected 0 to {len(names) - 1}; correct "
            f"them, {advice}"
        )
    missing = np.flatnonzero(np.bincount(given.labels, minlength=len(names)) == 0)
    if len(missing):
        more = f" and of {len(missing) - 1} other classes" if len(missing) > 1 else ""
        raise UserError(
            f"{options.subject}: no image of class {names[missing[0]]}{more}; add images, {advice}"
        )


def _reference_of(options: Options, source: str, dataset: DataSet, extractor: Extractor) -> Reference:
    images = DataSetImages(dataset, options.split)
    if not images.count:
        raise UserError(f"{source}: the {options.split} split is empty; choose another --split")
    if "frechet" in options.metrics or options.save_reference is not None:
        require_enough(images.count, extractor, f"{source}: the {options.split} split")
    with ImageProgress(images.count, "reference") as progress:
        return reference_of(images, extractor, progress.update)


def _classifier(options: Options, reference: Reference, device: torch.device) -> Classifier | None:
    if options.classifier is None:
        return None
    if options.classifier == "svm":
        return SupportVectors(reference)
    print(f"--classifier {options.classifier}: runs the program in this file", file=sys.stderr)
    return ExportedProgram(Path(options.classifier), device)


def _generated(options: Options, sampler: Sampler, reference: Reference) -> list[GeneratedImages]:
    classes = len(sampler.class_names)
    if classes == 1 or options.labels != "proportional":
        labels = np.arange(options.count) % classes
    elif reference.class_counts is None:
        raise UserError("--labels: the reference has no class frequencies; use --labels uniform")
    else:
        of_reference = torch.repeat_interleave(
            torch.arange(classes), torch.from_numpy(reference.class_counts)
        )
        labels = proportional_labels(of_reference, options.count, classes).numpy()
    return [GeneratedImages(sampler, seed, labels, sampler.shape) for seed in options.seeds]
