"""Images to latent moments and back, with a local ``AutoencoderKL`` of diffusers (extra ``[latents]``)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from diffratio_fast.data.scaling import SD_VAE, Vae
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import one_line, parse_json
from diffratio_fast.storage.writing import sha256_of_file

PUBLISHED = {"a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815": SD_VAE}
"""Names of published VAEs by the sha256 of their ``diffusion_pytorch_model.safetensors``."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DECODE_BATCH = 8
"""Latents decoded per batch; small, because the activations of large images need much memory."""
FLOAT16_MAX = float(np.finfo(np.float16).max)


class _LocalVae:
    """diffusers' ``AutoencoderKL`` from a local directory; ``vae`` is its name and weight hash."""

    def __init__(self, directory: Path, *, name: str | None, precision: str, device: torch.device) -> None:
        weights = next((directory / w for w in WEIGHTS if (directory / w).is_file()), None)
        if weights is None or not (directory / "config.json").is_file():
            raise UserError(
                f"--vae {directory}: not a directory of an AutoencoderKL; expected config.json and "
                f"{WEIGHTS[0]}"
            )
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(
                f"--vae: diffusers is not installed ({error}); install diffratio_fast[latents]"
            ) from None
        sha256 = sha256_of_file(weights)
        if name == SD_VAE and sha256 not in PUBLISHED and weights.name == WEIGHTS[0]:
            raise UserError(f"{weights}: not the published weights of {SD_VAE}; omit --vae-name")
        self.vae = Vae(name or PUBLISHED.get(sha256, directory.resolve().name), sha256)
        self.description = {"precision": precision, "config": _sha256_of_json(directory / "config.json")}
        try:
            model = AutoencoderKL.from_pretrained(
                directory, torch_dtype=PRECISIONS[precision], local_files_only=True
            )
        except Exception as error:  # diffusers raises many exception types for an incomplete model
            raise UserError(f"{directory}: the VAE cannot be loaded ({str(error).splitlines()[0]})") from None
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._dtype = device, PRECISIONS[precision]


class LatentDecoder(_LocalVae):
    """Decodes latents z to images: the inverse of ``LatentEncoder``; [0, 1] is black to white."""

    def __init__(self, directory: Path, *, device: torch.device) -> None:
        super().__init__(directory, name=None, precision="fp32", device=device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents z [N, c, h, w], unscaled, to uint8 images [N, 3, H, W] on the CPU, rounded to nearest.

        Always decodes ``DECODE_BATCH`` latents at a time and pads the last batch: the rounding of a
        convolution depends on the batch size, so an image does not depend on ``N``.
        """
        if latents.shape[1] != self._model.config.latent_channels:
            raise UserError(
                f"the latents have {latents.shape[1]} channels, but the VAE {self.vae.name} decodes "
                f"{self._model.config.latent_channels}"
            )
        images = []
        with torch.inference_mode():
            for block in latents.split(DECODE_BATCH):
                filled = torch.cat([block, block.new_zeros(DECODE_BATCH - len(block), *block.shape[1:])])
                x = self._model.decode(filled.to(self._device, self._dtype)).sample[: len(block)].float()
                images.append((x.clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(images)


class LatentEncoder(_LocalVae):
    """Encodes uint8 images, scaled to [0, 1], to moments: mean and standard deviation of the posterior."""

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the moments of an image of shape ``image_shape`` [3, H, W]."""
        moments = self.encode(np.zeros((1, *image_shape), np.uint8))
        return moments.shape[1], moments.shape[2], moments.shape[3]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] to float32 moments [B, 2c, h, w] = mean ‖ standard deviation."""
        with torch.inference_mode():
            x = torch.from_numpy(images).to(self._device, torch.float32) / 255
            posterior = self._model.encode(x.to(self._dtype)).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).float().cpu().numpy()


def to_float16(moments: np.ndarray) -> np.ndarray:
    """Convert to float16; raises ValueError for a value not finite, too large, or a negative std."""
    if not np.isfinite(moments).all():
        raise ValueError(
            "the latent is not finite; expected finite values: use --precision fp32, or check the source file"
        )
    largest = float(np.abs(moments).max())
    if largest > FLOAT16_MAX:
        raise ValueError(
            f"the latent has magnitude {largest:.4g}, larger than the float16 maximum {FLOAT16_MAX:.0f}"
        )
    if float(moments[moments.shape[0] // 2 :].min()) < 0:
        raise ValueError("the second half of the channels, the standard deviation, is negative")
    return moments.astype("<f2")


def _sha256_of_json(path: Path) -> str:
    try:
        content = json.dumps(parse_json(path.read_text()), sort_keys=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    return hashlib.sha256(content.encode()).hexdigest()
