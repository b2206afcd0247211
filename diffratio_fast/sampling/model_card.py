"""A folder for the Hugging Face Hub: generator weights, metrics and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffratio_fast.networks import SavedNetwork
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import DAMAGE, parse_json, read_text
from diffratio_fast.storage.writing import make_directory, replace_file

CARD = """---
library_name: diffratio_fast
tags: [one-step-generation, density-ratio, image-generation]
---

# {name}

A one-step image generator, trained by DiffRatio (arXiv 2502.08005) with
[diffratio_fast](https://arxiv.org/abs/2502.08005).

```python
import diffratio_fast

images = diffratio_fast.load_generator("generator.safetensors").sample(16)  # {output}
```

| | |
|---|---|
| data set | {data}, {classes} classes |
| x0 | {shape} |
| architecture | {architecture} |
| training | {step:,} steps, {images:,} images |
| sha256 of the weights | `{sha256}` |
{metrics}{provenance}
## Limits

Metrics are of this run, on the splits named in them. The images follow the training data, with their biases.
"""


def metrics_of(run: RunPaths) -> dict[str, Any]:
    """The numbers of summary.json; empty if there are none."""
    try:
        summary = parse_json(read_text(run.summary))
    except DAMAGE:
        return {}
    return {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}


def write_card(folder: Path, source: Path, weights: Path, sha256: str, about: SavedNetwork) -> list[Path]:
    """Write a card and the weights of ``source`` (run directory or file) to ``folder``; return the paths."""
    make_directory(folder)
    run = RunPaths(source if source.is_dir() else source.parent)
    files = [(weights, "generator.safetensors")]
    if source.is_dir():
        kept = (run.ratio, run.refitted, run.summary, run.config)
        files += [(path, path.name) for path in kept if path.exists()]
    written = []
    for path, name in files:
        shutil.copyfile(path, folder / name)
        written.append(folder / name)
    values = metrics_of(run) if source.is_dir() else {}
    table = "".join(f"| {name} | {_number(value)} |\n" for name, value in values.items())
    training = about.training
    text = CARD.format(
        name=f"{about.data.get('name', 'images')}: one-step generator",
        output="latents: name the VAE with vae=" if about.data.get("vae") else "uint8 [16, H, W, C]",
        data=about.data.get("name", "unknown"),
        classes=len(about.data.get("class_names", [])),
        shape=" x ".join(map(str, about.arguments.get("shape", []))),
        architecture=about.architecture
        + (f" ({about.arguments['backbone']})" if "backbone" in about.arguments else ""),
        step=int(training.get("step", 0)),
        images=int(training.get("images", 0)),
        sha256=sha256,
        metrics=f"\n## Metrics\n\n| metric | value |\n|---|---|\n{table}" if table else "",
        provenance="\nThe options, versions and device of the run are in config.yaml.\n" if values else "",
    )
    replace_file(folder / "README.md", text)
    replace_file(folder / "metrics.json", json.dumps(values, indent=1) + "\n")
    return [*written, folder / "README.md", folder / "metrics.json"]


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
