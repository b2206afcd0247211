"""Grids of images: positions of cells, white gaps, labels beside the rows."""

import numpy as np
import torch

from diffratio_fast.data.pictures import grid


def test_cells_lie_row_by_row_between_white_gaps() -> None:
    images = torch.arange(6, dtype=torch.uint8).mul(40)[:, None, None, None].expand(6, 1, 48, 48)
    picture = grid(images, 3)
    assert picture.shape == (2 * 49 + 1, 3 * 49 + 1, 3)
    for i in range(6):
        top, left = 1 + i // 3 * 49, 1 + i % 3 * 49
        assert (picture[top : top + 48, left : left + 48] == 40 * i).all()
    assert (picture[[0, 49, 98]] == 255).all() and (picture[:, [0, 49, 98, 147]] == 255).all()


def test_labels_stand_before_their_rows_and_move_nothing_else() -> None:
    images = torch.zeros(4, 3, 48, 48, dtype=torch.uint8)
    plain, labeled = grid(images, 2), grid(images, 2, labels=["cat", "a very long name of a class"])
    margin = labeled.shape[1] - plain.shape[1]
    assert margin > 0
    np.testing.assert_array_equal(labeled[:, margin:], plain)
    for row in (0, 1):
        band = labeled[1 + row * 49 : 49 + row * 49, :margin]
        assert (band < 128).any() and (band[:, 0] == 255).all()
