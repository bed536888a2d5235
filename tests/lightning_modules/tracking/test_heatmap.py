"""Tests for ``lightning_modules/tracking/heatmap.py``: a matrix of one entry fills the middle of the picture."""

import numpy as np
import pytest

from lightning_modules.tracking.heatmap import heatmap_image
from lightning_modules.tracking.records import interval_labels

COLUMNS = ["000", "125", "250", "375", "500", "625", "750", "875"]


def middle(value, **options):
    """Colours around the middle of the only cell."""
    image = heatmap_image(np.array([[value]], dtype=float), ["a"], title="t", **options)
    row, column = image.shape[0] * 2 // 5, image.shape[1] // 2  # the foot is white
    return image[row - 20 : row + 20, column - 20 : column + 20].astype(int).reshape(-1, 3)


def test_zero_is_white_and_signs_are_orange_and_blue():
    assert (middle(0.0) == 255).all()
    red, _, blue = middle(-1.0)[0]
    assert red > blue + 80
    red, _, blue = middle(1.0)[0]
    assert blue > red + 80


def test_zero_stays_white_in_a_lopsided_range():
    assert (middle(0.0, vmin=-0.2, vmax=1.0) == 255).all()
    assert (middle(-0.2, vmin=-0.2, vmax=1.0) == middle(-0.2)).all()


def test_nan_is_hatched_grey_and_not_zero():
    colors = middle(np.nan)
    assert (colors.max(axis=1) == colors.min(axis=1)).all()
    assert len(np.unique(colors)) == 2
    assert colors.max() < 230


def test_beyond_the_range_is_its_end():
    assert (middle(np.inf) == middle(1.0)).all()
    assert (middle(-7.0) == middle(-1.0)).all()


def test_magnitudes_darken_evenly():
    shades = [middle(value, vmin=0, vmax=1, colors="sequential")[0].sum() for value in np.linspace(0, 1, 9)]
    assert (np.diff(shades) < -20).all()


def test_first_row_is_at_the_top_and_first_column_at_the_left():
    image = heatmap_image(np.array([[-1.0, 0.0], [0.0, 1.0]]), ["a", "b"], title="t", column_labels=["c", "d"]).astype(
        int
    )
    warmth = image[..., 0] - image[..., 2]
    inner = warmth[:, : int(image.shape[1] * 0.85)]  # without the colour bar
    hot, cold = np.argwhere(inner > 80).mean(axis=0), np.argwhere(inner < -80).mean(axis=0)
    assert hot[0] < cold[0]
    assert hot[1] < cold[1]


@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 1, 192), (8, 8, 512), (3, 200, 300), (1000, 1000, 512)])
def test_any_shape_and_label_length_fits(rows, columns, size):
    labels = [f"blocks.{row}.a_very_long_name_of_a_layer" for row in range(rows)]
    image = heatmap_image(np.zeros((rows, columns)), labels, title="w" * 200, column_labels=["t"] * columns, size=size)
    assert image.shape == (size, size, 3)
    assert (image[round(0.8 * size) :] == 255).all(), "MLflow's card of images cuts the foot off"
    assert image.dtype == np.uint8


def test_labels_do_not_touch_each_other_when_there_are_many():
    image = heatmap_image(np.full((64, 64), np.nan), [f"t{i:02d}" for i in range(64)], title="")
    strip = image[50:330, 6:40].min(axis=(1, 2)) < 128  # rows of pixels that hold ink of row labels
    blocks = np.flatnonzero(np.diff(strip.astype(int)) == 1).size
    assert 8 <= blocks <= 20


def test_columns_of_intervals_go_by_their_start_and_stand_upright_while_there_is_room():
    few, many = (interval_labels([round(n * 1000 / k) for n in range(k + 1)]) for k in (8, 40))
    upright = heatmap_image(np.full((8, 8), np.nan), few, title="")
    assert (upright == heatmap_image(np.full((8, 8), np.nan), few, title="", column_labels=COLUMNS)).all()
    turned = heatmap_image(np.full((40, 40), np.nan), many, title="")
    # The hatched matrix ends higher where labels of three digits stand on end.
    ends = [np.flatnonzero(np.isin(image[:, 256, 0], (0xC4, 0xA0)))[-1] for image in (upright, turned)]
    assert ends[0] > 350
    assert ends[1] < ends[0]


@pytest.mark.parametrize(
    ("matrix", "options", "culprit"),
    [
        (np.zeros((2, 2)), {}, "2, 2"),
        (np.zeros((1, 1)), {"vmin": 1.0, "vmax": 1.0}, "range"),
        (np.zeros((1, 1)), {"size": 64}, "size"),
        (np.zeros((1, 1)), {"colors": "rainbow"}, "rainbow"),
    ],
)
def test_bad_input_is_named(matrix, options, culprit):
    with pytest.raises(ValueError, match=culprit):
        heatmap_image(matrix, ["a"], title="t", **options)
