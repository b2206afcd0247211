"""The protocols of published metrics: what each fixes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.protocols import has_whole_train
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features import Extractor

COUNT = 50_000


@dataclass(frozen=True)
class Protocol:
    """What a published metric fixes; ``quoted`` is the value that papers report: of the mean or the best.

    ``statistics`` requires the published statistics as reference, in place of a data set.
    """

    name: str
    metric: str
    options: Mapping[str, Any]
    statistics: bool
    quoted: str
    source: str


def _options(features: str, labels: str) -> dict[str, Any]:
    return {"features": features, "split": "train", "count": COUNT, "seeds": (0, 1, 2), "labels": labels}


PROTOCOLS = {
    "fid": Protocol("fid", "fid", _options("inception", "proportional"), False, "mean", "Heusel et al. 2017"),
    "fdd": Protocol("fdd", "fdd", _options("dinov2", "proportional"), False, "mean", "Stein et al. 2023"),
    "edm": Protocol("edm", "fid", _options("inception", "uniform"), True, "best", "Karras et al. 2022"),
}
"""50,000 images of each of three seeds, uint8, rounded to nearest, against the whole training set.

EDM and EDM2 report the lowest FID of three times 50,000 images with random classes, against statistics that
they publish."""


def resolve(name: str | None, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options to evaluate with: ``given`` ones (None: not given), the protocol's, else ``defaults``.

    A given option that contradicts the protocol is a ``UserError``.
    """
    fixed = {} if name is None else PROTOCOLS[name].options
    chosen: dict[str, Any] = {}
    for option, default in defaults.items():
        value = given[option]
        if option in fixed and value is not None and value != fixed[option]:
            raise UserError(
                f"--{option} {_text(value)}: --protocol {name} sets it to {_text(fixed[option])}; omit "
                f"--{option}"
            )
        chosen[option] = fixed.get(option, default if value is None else value)
    return chosen


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_subject(protocol: Protocol, count: int, path: object) -> None:
    """Refuse images of which there are not ``COUNT``."""
    if count != COUNT:
        raise UserError(
            f"{path}: holds {count:,} images, but --protocol {protocol.name} is of {COUNT:,}; "
            f"make them with `sample --count {COUNT}`"
        )


def check_reference(
    protocol: Protocol, source: str, dataset: DataSet | None, about: Mapping[str, Any] | None = None
) -> None:
    """Refuse a reference that is not the one of the protocol.

    ``dataset`` is the data set, or None for statistics, which ``about`` describes where they do so.
    """
    if dataset is not None:
        if protocol.statistics:
            raise UserError(
                f"--protocol {protocol.name} compares with the published statistics: name EDM's .npz or "
                "EDM2's .pkl as --reference (--protocol fid takes a data set)"
            )
        if not has_whole_train(dataset):
            raise UserError(
                f"{source}: its training split has {dataset.count('train'):,} images, not the whole "
                "published "
                f"training set that --protocol {protocol.name} compares with; prepare it again with "
                f"`prepare --protocol {protocol.name}`"
            )
        return
    if about and not about.get("whole_train"):
        raise UserError(
            f"{source}: statistics of a part of a training set; --protocol {protocol.name} compares with the "
            "whole one: save them from a data set made with `prepare --protocol`"
        )


def check_extractor(protocol: Protocol, extractor: Extractor) -> None:
    """Refuse weights that are not the published ones: the metric would have another name."""
    if extractor.names.frechet != protocol.metric:
        raise UserError(
            f"--protocol {protocol.name}: the weights of {extractor.name} are not the published ones, so the "
            f"distance is no {protocol.metric.upper()}; name the published file with --weights"
        )
