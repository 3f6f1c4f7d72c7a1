"""Boxes against the grid of image tokens, and against each other."""

import pytest
import torch

from florence2 import Florence2
from florence2.answers.answer import Box
from florence2.errors import OptionError
from florence2.inspect.regions import box_iou, cells_in, coverage, image_cells, mean_iou

SIZE = (40, 20)


def test_how_much_of_each_cell_is_in_a_box() -> None:
    found = coverage((5, 0, 30, 10), SIZE, (2, 4))  # cells of 10 x 10 pixels
    assert found.tolist() == [[0.5, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.allclose(coverage((0, 0, 40, 20), SIZE, (3, 7)), torch.ones(3, 7, dtype=torch.float64))
    assert float(coverage((3, 2, 29, 17), SIZE, (5, 3)).mean()) == pytest.approx(26 * 15 / 800)
    assert coverage((-9, -9, 10, 10), SIZE, (2, 4)).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_cells_of_a_box() -> None:
    assert cells_in((5, 0, 30, 20), SIZE, (2, 4)) == [0, 1, 2, 4, 5, 6]
    assert cells_in((5, 0, 30, 20), SIZE, (2, 4), least=0.6) == [1, 2, 5, 6]
    assert cells_in((31, 11, 33, 12), SIZE, (2, 4)) == [7]  # the cell that it fills most


@pytest.mark.parametrize("box", [(50, 0, 60, 10), (5, 5, 5, 10)])
def test_a_box_without_area(box: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="no area in the image of 40 x 20 pixels"):
        coverage(box, SIZE, (2, 4))


def test_the_cells_are_where_the_projection_puts_them(small: Florence2) -> None:
    """Of a value for each grid position, the tokens of the cells are those, after the mean of all."""
    grid, cells = image_cells(small)
    values = torch.arange(grid[0] * grid[1] * small.model.config.vision.dim_embed[-1]).float()
    values = values.view(1, *grid, -1)
    with small.trace("vision_tower", "multi_modal_projector.pooled") as t:
        small.encode_image(torch.zeros(160, 224, 3).byte().numpy())
    assert t["vision_tower"].shape[:2] == grid
    assert t["multi_modal_projector.pooled"].shape[0] == cells.stop
    assert cells.stop - cells.start == grid[0] * grid[1] and cells.start == 1


def test_overlap_of_boxes() -> None:
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10), SIZE) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 10, 10), (10, 0, 15, 10), SIZE) == 0
    assert box_iou((3, 3, 3, 3), (3, 3, 3, 3), SIZE) == 1  # corners in one bin


def test_the_nearest_box_counts() -> None:
    found = [Box((0, 0, 10, 10)), Box((20, 0, 30, 10))]
    assert mean_iou([(20, 0, 30, 10), (0, 0, 10, 5)], found, SIZE) == pytest.approx(0.75)
    assert mean_iou([(0, 0, 10, 10)], [], SIZE) == 0
