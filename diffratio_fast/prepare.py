"""``python -m diffratio_fast.prepare SOURCE DEST``: write a data set as shards; ``--verify``, ``--info``."""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from diffratio_fast import launch
from diffratio_fast.command import Parser, run
from diffratio_fast.data.manifest import Manifest
from diffratio_fast.data.protocols import PROTOCOLS
from diffratio_fast.data.scaling import Vae
from diffratio_fast.data.sources import (
    CROPS,
    FORMATS,
    PIXELS_LIMIT,
    FileSource,
    ImageOptions,
    Joined,
    Source,
    Unreadable,
    cut_splits,
    open_source,
    whole_train,
)
from diffratio_fast.data.sources.sizes import require_one_size
from diffratio_fast.data.writer import (
    SHARD_BYTES,
    Entries,
    Plan,
    Records,
    begun,
    fixed_order,
    write_shards,
)
from diffratio_fast.errors import UserError
from diffratio_fast.progress import ImageProgress
from diffratio_fast.storage.reading import UNPACKED_LIMIT

ODD_SHARE = 0.1
"""Share of the images that --unreadable skip leaves out for their size; more are no accident."""
A = TypeVar("A")
B = TypeVar("B")


def parser() -> Parser:
    p = Parser(
        prog="python -m diffratio_fast.prepare",
        description="Convert a data set to shards for fast loading. Rerun to resume. See docs/data.md.",
    )
    p.add_argument("source", nargs="?", type=Path, help="image folder, EDM ZIP, CIFAR-10, IDX files or tars")
    p.add_argument("destination", nargs="?", type=Path, help="directory to write")
    p.add_argument("--verify", type=Path, metavar="DIR", help="check every byte of a prepared data set")
    p.add_argument("--info", type=Path, metavar="DIR", help="print a summary of a prepared data set")
    p.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet of --info (default: in DIR)")
    p.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="kind of source")
    p.add_argument("--name", help="name of the data set (default: the source's)")
    p.add_argument("--resolution", type=int, help="crop and resize images to squares of this side in pixels")
    p.add_argument(
        "--crop", choices=CROPS, default="dhariwal", help="ImageNet crop, or center crop with Lanczos"
    )
    p.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: gray, 3: RGB")
    p.add_argument(
        "--max-pixels", type=int, default=PIXELS_LIMIT, metavar="N",
        help="pixels of an image at most, as it is and scaled; one with more is unreadable",
    )  # fmt: skip
    p.add_argument(
        "--max-bytes", type=int, default=UNPACKED_LIMIT, metavar="N",
        help="bytes that a source held in memory (CIFAR-10, IDX files) may unpack to, at most",
    )  # fmt: skip
    p.add_argument("--class-names", help="file with a name a line, or names with commas between")
    p.add_argument("--test-source", type=Path, help="a second source, of the same kind, for the test split")
    p.add_argument("--validation", metavar="N", help="records or fraction cut from train")
    p.add_argument("--test", metavar="N", help="likewise, where the source has no test set of its own")
    p.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="keep the published training set whole, for `evaluate --protocol`: validation records come from "
        "the test side",
    )
    p.add_argument("--scaling", choices=("auto", "edm", "measured"), default="auto", help="pixels to x0")
    p.add_argument("--unreadable", choices=("fail", "skip"), default="fail", help="what to do then")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    p.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="size of a shard")
    p.add_argument("--seed", type=int, default=0, help="of the order of records and the cut splits")
    p.add_argument("--vae", type=Path, metavar="DIR", help="encode images to latents with this AutoencoderKL")
    p.add_argument("--vae-name", help="published name of the VAE (default: detected from its weights)")
    p.add_argument("--vae-precision", choices=("fp32", "bf16"), default="fp32", help="precision of the VAE")
    p.add_argument("--vae-batch", type=int, default=16, help="images per batch of the VAE")
    p.add_argument("--device", default="auto", help="device of the VAE: auto, cpu, cuda or cuda:N")
    p.add_argument("--mirrors", action="store_true", help="also encode training images mirrored")
    return p


def main(argv: list[str]) -> int | None:
    options = parser().parse_args(argv)
    if options.verify or options.info:
        if options.source or (options.verify and options.info):
            raise UserError(
                "--verify and --info cannot be combined with each other or with a source; pass one of them "
                "(see --help)"
            )
        return show_verification(options) if options.verify else show_info(options)
    if options.source is None or options.destination is None:
        raise UserError("missing arguments; expected SOURCE and DESTINATION (see --help)")
    for name in ("workers", "shard_bytes", "vae_batch", "resolution", "max_pixels", "max_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: out of range; expected at least 1")
    manifest = prepare(options)
    if manifest is None:
        print("this process has finished; another process is still writing")
        return 0
    skipped = manifest.source["unreadable"]
    if skipped:
        print(f"{skipped} unreadable records skipped, listed in {options.destination / 'unreadable.txt'}")
    splits = ", ".join(f"{name} {end - first:,}" for name, (first, end) in manifest.splits.items())
    print(f"{options.destination}: {manifest.name}, {manifest.records:,} records ({splits})")
    return 0


def prepare(options: argparse.Namespace) -> Manifest | None:
    """Prepare the data set of ``options``; None if another process has not finished."""
    rank, world_size = launch.process()
    source = load_source(options)
    source.splits = splits_of(source, options)
    shape, kind, vae, encoder = source.shape, source.kind, source.vae, None
    if options.vae is not None:
        encoder = open_encoder(options, source)
        shape, kind, vae = encoder.shape(source.shape), "latent_moments", encoder.vae
    elif options.mirrors:
        raise UserError("--mirrors needs --vae; omit it for pixels, which are mirrored during training")
    elif vae is not None and options.vae_name:
        vae = Vae(options.vae_name)
    plan = Plan(
        name=options.name or source.name,
        kind=kind,
        shape=shape,
        class_names=source.class_names,
        scaling=options.scaling,
        shard_bytes=options.shard_bytes,
        seed=options.seed,
        mirrors=options.mirrors,
        vae=vae,
        source={
            "format": source.format,
            "fingerprint": source.fingerprint(),
            "splits": {s: getattr(options, s) for s in ("validation", "test")}
            | ({"whole_train": True} if options.protocol else {}),
            "image": {"resolution": options.resolution, "crop": options.crop, "channels": options.channels},
            "encoder": encoder.description | {"batch": options.vae_batch} if encoder else None,
        },
    )
    order = fixed_order(source.labels, source.splits, seed=options.seed, mirrors=options.mirrors)
    with (
        ThreadPoolExecutor(options.workers) as pool,
        tqdm(total=len(order), unit="rec", desc=plan.name, disable=rank > 0, mininterval=0.5) as bar,
    ):

        def read(entries: Entries) -> Records:
            records = decoded(source, entries, pool, options.workers)
            return encoded(records, encoder, options.vae_batch) if encoder else records

        unreadable = 0

        def progress(done: int, failed: int) -> None:
            nonlocal unreadable
            unreadable += failed
            bar.update(done)
            if unreadable:
                bar.set_postfix(unreadable=unreadable)

        return write_shards(
            options.destination,
            plan,
            order,
            read,
            skip_unreadable=options.unreadable == "skip",
            part=rank / world_size,
            progress=progress,
        )


def splits_of(source: Source, options: argparse.Namespace) -> np.ndarray:
    """The split of each record, an index into ``SPLITS``: uint8 (N,)."""
    if options.protocol is None:
        return cut_splits(source.splits, options.validation, options.test, options.seed)
    if options.test is not None:
        raise UserError("--test: --protocol takes no records from the training set; omit --test")
    return whole_train(source.splits, options.validation, options.seed)


def load_source(options: argparse.Namespace) -> Source:
    """Open the source of ``options``, with its test source and class names."""
    images = ImageOptions(
        options.resolution, options.crop, options.channels, options.max_pixels, options.max_bytes
    )
    parts = [open_source(options.source, options.format, images)]
    if options.test_source is not None:
        parts.append(open_source(options.test_source, options.format, images))
    if options.resolution is None and not begun(options.destination):
        for part in parts:
            if isinstance(part, FileSource) and part.kind == "image":
                check_sizes(part, options)
    if options.class_names is not None:
        names = class_names(options.class_names)
        for part in parts:
            if int(part.labels.max()) >= len(names):
                raise UserError(
                    f"--class-names: {len(names)} names; expected at least {part.labels.max() + 1} (largest "
                    "label + 1)"
                )
            part.class_names = names
    return Joined(*parts) if len(parts) == 2 else parts[0]


def check_sizes(source: FileSource, options: argparse.Namespace) -> None:
    """Raise ``UserError`` unless all images of the source have one size; reads their headers."""
    quiet = launch.process()[0] > 0
    odd_share = ODD_SHARE if options.unreadable == "skip" else 0.0
    with (
        ThreadPoolExecutor(options.workers) as pool,
        ImageProgress(len(source), f"{source.name}: sizes", quiet=quiet) as progress,
    ):
        require_one_size(source, pool, progress.update, odd_share=odd_share)


def class_names(text: str) -> tuple[str, ...]:
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names {text}: cannot be read ({error})") from None
    return tuple(line.strip() for line in lines if line.strip())


def open_encoder(options: argparse.Namespace, source: Source) -> Any:
    import torch

    from diffratio_fast.data.latents import LatentEncoder

    if source.kind != "image" or source.shape[0] != 3:
        raise UserError(f"--vae: expected RGB images; the source has {source.kind} {list(source.shape)}")
    name = options.device
    if name == "auto":
        name = f"cuda:{launch.local_process()[0]}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return LatentEncoder(options.vae, name=options.vae_name, precision=options.vae_precision, device=device)


def decoded(source: Source, entries: Entries, pool: ThreadPoolExecutor, workers: int) -> Records:
    """Decode the records of ``entries`` in parallel, in their stored dtype."""
    from diffratio_fast.data.latents import to_float16

    def one(entry: tuple[int, bool]) -> np.ndarray | str:
        index, mirrored = entry
        try:
            record = source.read(index)
        except Unreadable as error:
            return str(error)
        if source.kind == "latent_moments":
            try:
                return to_float16(record)
            except ValueError as error:
                return f"{source.key(index)}: {error}"
        return record[:, :, ::-1] if mirrored else record

    work = zip(entries.index.tolist(), entries.mirrored.tolist(), strict=True)
    return in_order(pool, one, work, 4 * workers)


def encoded(records: Records, encoder: Any, batch: int) -> Records:
    """Encode images to moments in batches of ``batch``; unreadable records are passed through."""
    from diffratio_fast.data.latents import to_float16

    while group := list(islice(records, batch)):
        images = [image for image in group if not isinstance(image, str)]
        moments = iter(encoder.encode(np.stack(images)) if images else ())
        for item in group:
            if isinstance(item, str):
                yield item
                continue
            try:
                yield to_float16(next(moments))
            except ValueError as error:
                raise UserError(f"{error}; use --vae-precision fp32") from None


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], ahead: int
) -> Iterator[B]:
    """``map`` on a pool, at most ``ahead`` items in advance; closing cancels pending items."""
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def show_verification(options: argparse.Namespace) -> int:
    from diffratio_fast.data.manifest import read_manifest
    from diffratio_fast.data.verify import verify

    total = sum(shard.size for shard in read_manifest(options.verify).shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
        manifest, problems = verify(options.verify, threads=options.workers, progress=bar.update)
    for line in problems:
        print(line)
    if problems:
        raise UserError(
            f"{options.verify}: {len(problems)} problems (listed above); restore the files or prepare again"
        )
    print(f"{options.verify}: {manifest.name}, {manifest.records:,} records, no damage found")
    return 0


def show_info(options: argparse.Namespace) -> int:
    from diffratio_fast.data.info import contact_sheet, describe
    from diffratio_fast.data.shards import ShardDataSet

    data = ShardDataSet(options.info)
    print(describe(data))
    sheet = options.sheet or options.info / "contact-sheet.png"
    try:
        contact_sheet(data, sheet)
    except OSError as error:
        raise UserError(
            f"{sheet}: cannot be written ({error.strerror}); set --sheet to another file"
        ) from None
    print(f"contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    run(main)
