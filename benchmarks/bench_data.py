"""Throughput of reading records, compared with one-thread memcpy and with other readers.

``python -m benchmarks.bench_data [--json FILE]``. Synthetic latents, 8 x 64 x 64 float16 (64 KiB per record).
Every reader is checked before it is timed. The readers run interleaved, in rounds, on one machine in one run.
The first batches of a turn are not counted: they were read ahead during other turns. Results are medians over
rounds. No GPU is needed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from diffratio_fast.data.manifest import CHECKSUMS, LABELS, MANIFEST, Manifest, Shard, Statistics
from diffratio_fast.data.scaling import LATENT_SCALINGS, SD_VAE, Scaling, Vae
from diffratio_fast.data.shards import ShardDataSet
from diffratio_fast.data.writer import npy_bytes
from diffratio_fast.devices import device_name

if TYPE_CHECKING:
    from benchmarks.harness import Case, Settings

LATENT = (8, 64, 64)
BATCH = 256
SKIPPED, TIMED, ROUNDS = 8, 24, 7
THREADS = 2
IMAGENET = 1_281_167
PER_SHARD = 4096

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


# ------------------------------------------------------------------------------------------ making


def make_shards(directory: Path, records: int, shape: tuple[int, int, int], *, sparse: bool = False) -> Path:
    """Write a data set of random training records (with ``sparse``: zeros in sparse files)."""
    directory.mkdir(parents=True)
    latent = shape == LATENT
    size = int(np.prod(shape)) * (2 if latent else 1)
    rng = np.random.default_rng(0)
    checksums = np.zeros(records, "<u8")
    shards = []
    for number, first in enumerate(range(0, records, PER_SHARD)):
        count = min(PER_SHARD, records - first)
        file = f"shard-{number:05d}.bin"
        with (directory / file).open("wb") as stream:
            if sparse:
                stream.truncate(count * size)
            else:
                content = rng.integers(0, 256, (count, size), np.uint8)
                if latent:
                    content[:, 1::2] &= 0x3F  # finite, positive halves
                checksums[first : first + count] = [xxhash.xxh3_64_intdigest(r.data) for r in content]
                stream.write(content.data)
        shards.append(Shard(file, count, count * size, ""))
    np.save(directory / LABELS, np.arange(records, dtype="<i8") % 1000)
    np.save(directory / CHECKSUMS, checksums)
    flat = (0.0,) * shape[0]
    manifest = Manifest(
        name="benchmark",
        kind="latent_moments" if latent else "image",
        shape=shape,
        class_names=tuple(str(i) for i in range(1000)),
        scaling=LATENT_SCALINGS[SD_VAE] if latent else Scaling((127.5,), (63.75,), 0, 255),
        statistics=Statistics(flat, flat, flat, flat),
        splits={"train": (0, records), "validation": (records, records), "test": (records, records)},
        shards=tuple(shards),
        sha256={LABELS: "", CHECKSUMS: ""},
        vae=Vae(SD_VAE) if latent else None,
    )
    (directory / MANIFEST).write_text(manifest.to_json())
    return directory


def make_others(root: Path, source: ShardDataSet) -> None:
    """Write the same records in other formats.

    Stored ZIPs of ``.npy`` (float16, and float32 like EDM2), a webdataset tar, and one file per record.
    """
    (root / "files").mkdir()
    with (
        zipfile.ZipFile(root / "float32.zip", "w", zipfile.ZIP_STORED) as archive32,
        zipfile.ZipFile(root / "float16.zip", "w", zipfile.ZIP_STORED) as archive16,
        tarfile.open(root / "records.tar", "w") as tar,
    ):
        for row in range(source.count("train")):
            record = source.read(np.array([row]))[0][0].numpy()
            content = npy_bytes(record)
            (root / "files" / f"{row:08d}.npy").write_bytes(content)
            name = f"{row // 1000:05d}/img-mean-std-{row:08d}.npy"
            archive16.writestr(name, content)
            archive32.writestr(name, npy_bytes(record.astype(np.float32)))
            info = tarfile.TarInfo(f"{row:08d}.npy")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# ----------------------------------------------------------------------------------------- reading


def memcpy(source: np.ndarray) -> Batches:
    """One-thread copies of batches in memory; the batches exceed all caches."""
    ring = [np.ones(source.shape[1:], np.uint8) for _ in range(6)]
    turn = 0
    while True:
        np.copyto(ring[turn % len(ring)], source[turn % len(source)])
        yield torch.from_numpy(ring[turn % len(ring)]), torch.empty(0)
        turn += 1


class ZipRecords(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """A dataset like EDM2's, for a DataLoader: opens a member of a ZIP and decodes the ``.npy``."""

    def __init__(self, path: Path) -> None:
        self.path, self.zip = path, None
        with zipfile.ZipFile(path) as archive:
            self.names = sorted(archive.namelist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.zip is None:  # one handle per worker
            self.zip = zipfile.ZipFile(self.path)  # type: ignore[assignment]
        with self.zip.open(self.names[index]) as member:  # type: ignore[attr-defined]
            return torch.from_numpy(np.load(member)), index % 1000


class MappedRecords(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Mapped shards, one record per item, for a DataLoader."""

    def __init__(self, directory: Path) -> None:
        self.shards = [
            np.memmap(p, np.float16, "r").reshape(-1, *LATENT) for p in sorted(directory.glob("*.bin"))
        ]

    def __len__(self) -> int:
        return sum(len(s) for s in self.shards)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.shards[index // PER_SHARD][index % PER_SHARD])), index % 1000


def data_loader(records: Any) -> Batches:
    loader = torch.utils.data.DataLoader(
        records, BATCH, shuffle=True, num_workers=THREADS, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def dali_reader(build: Callable[[Any], Any], *, moments: bool = False) -> Batches:
    """A DALI pipeline around one of DALI's own readers."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=BATCH, num_threads=THREADS, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        pipeline.set_outputs(build(fn))
    pipeline.build()
    while True:
        outputs: Any = pipeline.run()
        array = outputs[0].as_array()
        if moments:  # includes the ``.npy`` header
            array = array[:, -int(np.prod(LATENT)) * 2 :].view(np.float16).reshape(-1, *LATENT)
        yield torch.from_numpy(array), torch.empty(0)


# ------------------------------------------------------------------------------------------ timing


def check(batches: Batches, known: set[bytes]) -> None:
    """Assert that two batches consist of records of the data set."""
    for records, _ in islice(batches, 2):
        assert records.shape == (BATCH, *LATENT), records.shape
        assert all(record.half().numpy().tobytes() in known for record in records[::16])


def take_turns(ways: dict[str, Batches], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of this process) per batch, for every reader and round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, batches in ways.items():
            for _ in islice(batches, SKIPPED):
                pass
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in islice(batches, TIMED):
                pass
            taken[name].append(((time.perf_counter() - wall) / TIMED, (time.process_time() - cpu) / TIMED))
    return taken


def row(
    op: str, provider: str, shape: tuple[int, ...], dtype: str, seconds: list[float], **more: Any
) -> dict[str, Any]:
    q20, median, q80 = np.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
    return {
        "benchmark": "data", "op": op, "shape": list(shape), "dtype": dtype, "provider": provider,
        "pass": "forward", "median_s": median, "q20_s": q20, "q80_s": q80, "checked": True, **more,
    }  # fmt: skip


def warm(root: Path, records: int, rounds: int) -> list[dict[str, Any]]:
    """Latents from a warm page cache, with every reader."""
    directory = make_shards(root / "latents", records, LATENT)
    data = ShardDataSet(directory)
    make_others(root, data)
    size = data.manifest.record_bytes
    known = {data.read(np.array([r]))[0][0].numpy().tobytes() for r in range(records)}

    def ours(**options: Any) -> Batches:
        return ShardDataSet(directory, threads=THREADS, **options).batches("train", BATCH, seed=0)

    files, tar = str(root / "files"), str(root / "records.tar")
    ways: dict[str, Batches] = {
        "native": ours(verify="never"),
        "native, every record hashed": ours(verify="always"),
        "EDM2-style ZIP of float16": data_loader(ZipRecords(root / "float16.zip")),
        "EDM2-style ZIP of float32": data_loader(ZipRecords(root / "float32.zip")),
        "mapped shards, DataLoader": data_loader(MappedRecords(directory)),
    }
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        print("DALI is not installed: its rows are skipped", file=sys.stderr)
    else:
        ways["DALI, these shards"] = ours(loader="dali", verify="never")
        ways["DALI's numpy reader"] = dali_reader(
            lambda fn: fn.readers.numpy(file_root=files, file_filter="*.npy", random_shuffle=True)
        )
        ways["DALI's webdataset reader"] = dali_reader(
            lambda fn: fn.readers.webdataset(
                paths=[tar], ext=["npy"], random_shuffle=True, missing_component_behavior="error"
            ),
            moments=True,
        )
    for batches in ways.values():
        check(batches, known)
    del known
    # As many distinct batches as the data set, so that caches have the same effect on both.
    source = np.ones((records // BATCH, BATCH, size), np.uint8)
    taken = take_turns({"memcpy, one thread": memcpy(source)} | ways, rounds)
    copy = float(np.median([wall for wall, _ in taken["memcpy, one thread"]]))
    rows = []
    for name, figures in taken.items():
        seconds = [wall for wall, _ in figures]
        median = float(np.median(seconds))
        rows.append(
            row(
                "read_batch", name, (BATCH, *LATENT), "float16", seconds,
                bytes_per_s=BATCH * size / median,
                images_per_s=BATCH / median,
                fraction_of_memcpy=copy / median,
                cpu_s=float(np.median([cpu for _, cpu in figures])),
            )
        )  # fmt: skip
    return rows


def small_records(root: Path, rounds: int) -> list[dict[str, Any]]:
    """Pixels of CIFAR-10's and ImageNet-64's sizes, warm, with default options."""
    rows = []
    for shape in ((3, 32, 32), (3, 64, 64)):
        directory = make_shards(root / f"pixels{shape[1]}", 8 * PER_SHARD, shape)
        batches = ShardDataSet(directory, threads=THREADS).batches("train", BATCH, seed=0)
        seconds = [wall for wall, _ in take_turns({"native": batches}, rounds)["native"]]
        rate = BATCH / float(np.median(seconds))
        rows.append(
            row(
                "read_batch",
                "native",
                (BATCH, *shape),
                "uint8",
                seconds,
                images_per_s=rate,
                bytes_per_s=rate * int(np.prod(shape)),
            )
        )
    return rows


def drop_cache(directory: Path) -> None:
    for path in directory.glob("*.bin"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def cold(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """The complete data set from disk: sequential, random blocks of 64 records, random records."""

    def sequential() -> None:
        buffer = bytearray(8 << 20)
        for path in sorted(directory.glob("*.bin")):
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def random(block: int) -> None:
        for _ in ShardDataSet(directory, block=block, verify="never").batches(
            "train", BATCH, seed=0, epochs=1
        ):
            pass

    ways: dict[str, Callable[[], None]] = {
        "sequential": sequential,
        "native, random blocks of 64": lambda: random(64),
        "native, random records": lambda: random(1),
    }
    size = sum(p.stat().st_size for p in directory.glob("*.bin"))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            drop_cache(directory)
            begin = time.perf_counter()
            read()
            taken[name].append(time.perf_counter() - begin)
    medians = {name: float(np.median(seconds)) for name, seconds in taken.items()}
    return [
        row(
            "read_cold",
            name,
            LATENT,
            "float16",
            seconds,
            bytes_per_s=size / medians[name],
            fraction_of_sequential=medians["sequential"] / medians[name],
        )
        for name, seconds in taken.items()
    ]


CHILD = """
import json, re, sys, time
import torch
from diffratio_fast.data.shards import ShardDataSet
def peak():
    return 1024 * int(re.search("VmHWM:[^0-9]+([0-9]+)", open("/proc/self/status").read())[1])
directory, epochs = sys.argv[1], int(sys.argv[2])
before, begin = peak(), time.perf_counter()
data = ShardDataSet(directory, verify="never", threads=2)
opened = time.perf_counter() - begin
batches = data.batches("train", 256, seed=0, epochs=epochs or None)
next(batches)
first = time.perf_counter() - begin
for _ in batches if epochs else ():
    pass
print(json.dumps({"opened": opened, "first": first, "resident": peak() - before}))
"""


def in_fresh_process(directory: Path, epochs: int) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(directory), str(epochs)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
    )
    return result


def startup_and_memory(root: Path) -> list[dict[str, Any]]:
    """A data set of ImageNet's size opened in fresh processes; resident memory by size of the data set."""
    large = make_shards(root / "imagenet", IMAGENET, LATENT, sparse=True)
    runs = [in_fresh_process(large, 0) for _ in range(3)]
    rows = [
        row("startup", "native", (IMAGENET, *LATENT), "float16", [r["first"] for r in runs],
            opened_s=float(np.median([r["opened"] for r in runs])))
    ]  # fmt: skip
    for records in (8192, 32768, 131072):
        directory = make_shards(root / f"sparse{records}", records, LATENT, sparse=True)
        run = in_fresh_process(directory, 1)
        rows.append(
            row("resident_memory", "native, one epoch", (records, *LATENT), "float16", [run["first"]],
                peak_bytes=int(run["resident"]), data_bytes=records * 65536)
        )  # fmt: skip
    return rows


def cases(settings: Settings) -> Iterator[Case]:
    """Cases of ``python -m benchmarks``: one epoch of a small data set."""
    from benchmarks.harness import Case

    with tempfile.TemporaryDirectory() as place:
        directory = make_shards(Path(place) / "latents", 16 * BATCH, LATENT)
        source = np.ones((16, BATCH, ShardDataSet(directory).manifest.record_bytes), np.uint8)

        def epoch(**options: Any) -> Callable[[int], None]:
            data = ShardDataSet(directory, threads=THREADS, **options)

            def read(seed: int) -> None:
                for _ in data.batches("train", BATCH, seed=seed, epochs=1):
                    pass

            return read

        copies = memcpy(source)

        def copy(_: int) -> None:
            for _batch in islice(copies, len(source)):
                pass

        def check() -> None:
            data = ShardDataSet(directory, verify="always")
            assert (
                sum(len(labels) for _, labels in data.batches("train", BATCH, seed=0, epochs=1)) == 16 * BATCH
            )

        providers = {
            "native": epoch(verify="never"),
            "native, hashed": epoch(verify="always"),
            "memcpy": copy,
        }
        yield Case(
            "read_epoch", str([16 * BATCH, *LATENT]), "float16", "forward", providers, check, source.nbytes
        )


def environment() -> dict[str, Any]:
    try:
        from nvidia.dali import __version__ as dali
    except ImportError:
        dali = ""
    model = device_name(torch.device("cpu"))
    return {
        "device": f"{model}, {os.cpu_count()} cores", "torch": torch.__version__, "numpy": np.__version__,
        "dali": dali, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0], "batch": BATCH, "threads": THREADS,
    }  # fmt: skip


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """(name, value, target, met) for the performance targets of this project."""
    rate = {
        r["provider"]: r["images_per_s"] for r in rows if r["op"] == "read_batch" and r["dtype"] == "float16"
    }
    figure = {(r["op"], r["provider"]): r for r in rows}
    found = [("native / memcpy", rate["native"] / rate["memcpy, one thread"], ">= 0.6")]
    # EDM2 stores moments as float32; the ZIP of float16 is for comparison.
    found.append(("native / EDM2-style ZIP", rate["native"] / rate["EDM2-style ZIP of float32"], ">= 15"))
    own = [rate[name] for name in rate if name.startswith("DALI's")]
    if own:
        found.append(("best of DALI's readers / DALI here", max(own) / rate["DALI, these shards"], "<= 1.5"))
    blocks = figure["read_cold", "native, random blocks of 64"]["fraction_of_sequential"]
    found.append(("cold blocks of 64 / sequential", blocks, ">= 0.8"))
    found.append(("startup with 1.28 M records, s", figure["startup", "native"]["median_s"], "< 2"))
    memory = [r["peak_bytes"] / 2**20 for r in rows if r["op"] == "resident_memory"]
    found.append(("more resident memory for 8 GiB of data than for 0.5, MiB", memory[-1] - memory[0], "< 16"))

    def met(value: float, target: str) -> bool:
        sign, _, bound = target.partition(" ")
        return {">=": value >= float(bound), "<=": value <= float(bound), "<": value < float(bound)}[sign]

    return [(what, value, target, met(value, target)) for what, value, target in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--directory", type=Path, help="directory for 3 GB of temporary files (default: the system's)"
    )
    parser.add_argument("--records", type=int, default=8192, help="latents in the data set")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        root = Path(place)
        about = environment()
        rows = warm(root, options.records, options.rounds)
        rows += small_records(root, options.rounds)
        rows += cold(root / "latents", options.rounds)
        rows += startup_and_memory(root)
    ceilings = {
        "memcpy_bytes_per_s": next(r["bytes_per_s"] for r in rows if r["provider"].startswith("memcpy")),
        "disk_bytes_per_s": next(r["bytes_per_s"] for r in rows if r["provider"] == "sequential"),
    }
    for r in rows:
        rate = f"{r['images_per_s']:>10,.0f} images/s" if "images_per_s" in r else f"{r['median_s']:>10.3f} s"
        shares = [
            f"{k.replace('_', ' ')} {r[k]:.2f}"
            for k in ("fraction_of_memcpy", "fraction_of_sequential")
            if k in r
        ]
        print(f"{r['op']:<16} {r['provider']:<30} {r['shape']!s:<20} {rate}  {', '.join(shares)}")
    reached = targets(rows)
    for what, value, target, met in reached:
        print(f"{what}: {value:.2f} (target {target}) {'met' if met else 'NOT MET'}")
    if options.json:
        summary = [{"target": w, "value": v, "bound": t, "met": m} for w, v, t, m in reached]
        content = {"environment": about, "ceilings": ceilings, "targets": summary, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
