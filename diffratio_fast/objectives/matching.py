"""Matched pairs: the generated images of a batch permuted within a class, close to their real partners.

For a permutation that depends on the clean images only, every generated image keeps its law given its label,
so the ratio loss keeps its expectation. Near partners share more of their noised neighborhood: the gradient
has less variance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SWEEPS = 2


@torch.no_grad()
def matched(real: Tensor, fake: Tensor, labels: Tensor, *, sweeps: int = SWEEPS) -> Tensor:
    """A permutation int64 [B]: ``fake[permutation]`` has close partners in ``real``, within each label.

    ``real`` and ``fake`` [B, C, H, W], ``labels`` int64 [B]. Two images are swapped if that reduces the sum
    of squared distances, by all pairs of a round-robin tournament, ``sweeps`` times over. It needs no host
    synchronization. An optimal assignment is at most slightly closer.
    """
    count = len(labels)
    odd = count % 2  # then a last image without label, that is never swapped
    x, y = real.flatten(1).float(), fake.flatten(1).float()
    distance = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T  # [real, fake]
    distance, owner = pad(distance, (0, odd, 0, odd)), pad(labels, (0, odd), value=-1)
    order = torch.arange(count + odd, device=real.device)
    for first, second in _rounds(count + odd, real.device) * sweeps:
        mine, theirs = order[first], order[second]
        gain = distance[first, mine] + distance[second, theirs]
        gain = gain - distance[first, theirs] - distance[second, mine]
        swap = (gain > 0) & (owner[first] == owner[second])
        order = order.index_copy(0, first, torch.where(swap, theirs, mine))
        order = order.index_copy(0, second, torch.where(swap, mine, theirs))
    return order[:count]


def _rounds(count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Rounds of disjoint pairs, int64 [count/2] each, in which all of an even count meet (circle method)."""
    seat, zero = torch.arange(count - 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    rounds = []
    for turn in range(count - 1):
        circle = torch.cat((zero, 1 + (seat - turn) % (count - 1)))
        first, second = circle.chunk(2)
        rounds.append((first, second.flip(0)))
    return rounds
