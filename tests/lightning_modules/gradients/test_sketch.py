"""Tests for `lightning_modules/gradients/sketch.py`: against the dense matrix it stands for, and its law of error."""

import numpy as np
import pytest
import torch

from lightning_modules.errors import UserInputError
from lightning_modules.gradients.sketch import CountSketch, SketchCollector, SketchSums, Unprojected

WIDTH = 16
SIZES = [5, 16, 700]  # below, at and far above the width


def sketch(rows: list[torch.Tensor], projection, pieces: int = 1) -> torch.Tensor:
    """Sketch of gradients given per parameter, each handed over in so many pieces."""
    collector = SketchCollector(projection, len(rows[0]))
    for index, whole in enumerate(rows):
        start = 0
        for piece in whole.tensor_split(pieces, dim=1):
            collector.collect(index, start, piece)
            start += piece.shape[1]
    return collector.table


def gradients(groups: int, sizes=SIZES, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(groups, size, generator=generator) for size in sizes]


def dense_matrix(projection: CountSketch, sizes=SIZES) -> np.ndarray:
    """The projection as a matrix (D, sum of sizes), entry by entry from its definition."""
    columns = []
    for index, size in enumerate(sizes):
        signs = projection.signs(index, 0, size)
        shifts = projection.shifts(index, 0, size // projection.width + 1)
        for j in range(size):
            column = np.zeros(projection.width)
            column[(j % projection.width + shifts[j // projection.width]) % projection.width] = signs[j]
            columns.append(column)
    return np.stack(columns, axis=1)


def test_a_sketch_is_multiplication_by_a_matrix_with_one_sign_in_each_column():
    projection = CountSketch(WIDTH, seed=3)
    rows = gradients(4)
    expected = torch.cat(rows, 1).double().numpy() @ dense_matrix(projection).T
    np.testing.assert_allclose(sketch(rows, projection).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pieces", [2, 3, 11])
def test_the_cut_into_pieces_does_not_matter(pieces, monkeypatch):
    projection = CountSketch(WIDTH, seed=3)
    whole = sketch(gradients(4), projection)
    monkeypatch.setattr("lightning_modules.gradients.sketch._SLAB", 300)
    torch.testing.assert_close(sketch(gradients(4), projection, pieces), whole, rtol=0, atol=1e-5)


def test_signs_and_shifts_can_be_asked_for_from_anywhere():
    projection = CountSketch(WIDTH, seed=3)
    signs, shifts = projection.signs(1, 0, 2000), projection.shifts(1, 0, 500)
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / np.sqrt(2000)
    assert set(shifts) == set(range(WIDTH))
    for start, end in ((0, 1), (255, 257), (256, 512), (777, 1999)):
        np.testing.assert_array_equal(projection.signs(1, start, end), signs[start:end])
    for start, end in ((0, 1), (3, 5), (4, 8), (17, 49)):
        np.testing.assert_array_equal(projection.shifts(1, start, end), shifts[start:end])
    assert (CountSketch(WIDTH, seed=4).signs(1, 0, 2000) != signs).any()
    assert (projection.signs(2, 0, 2000) != signs).any()


def test_inner_products_are_unbiased_and_err_by_the_stated_variance():
    rows = gradients(2)
    x, y = torch.cat(rows, 1).double()
    exact = torch.stack([x @ x, y @ y, x @ y])
    tables = torch.stack([sketch(rows, CountSketch(WIDTH, seed)) for seed in range(3000)]).double()
    found = torch.stack(
        [tables[:, 0].square().sum(1), tables[:, 1].square().sum(1), (tables[:, 0] * tables[:, 1]).sum(1)], dim=1
    )
    bound = torch.stack([2 * exact[0] ** 2, 2 * exact[1] ** 2, exact[0] * exact[1] + exact[2] ** 2]) / WIDTH
    standard_error = (bound / len(found)).sqrt()
    assert ((found.mean(0) - exact).abs() < 4 * standard_error).all()
    ratio = found.var(0) / bound
    # The bound is nearly reached: only pairs within one of the 46 tiles, which cannot collide, are missing from it.
    assert (ratio < 1.15).all()
    assert (ratio > 0.85).all()


def test_columns_that_lie_a_width_apart_collide_no_more_than_others():
    # The rows of a weight matrix as wide as the sketch: its first input dominates. Without shifts all would collide.
    x = torch.zeros(2, 64 * WIDTH)
    x[:, ::WIDTH] = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    exact = float(x[0] @ x[1])
    tables = torch.stack([sketch([x], CountSketch(WIDTH, seed)) for seed in range(1000)])
    variance = float((tables[:, 0] * tables[:, 1]).sum(1).var())
    bound = (float(x[0] @ x[0]) * float(x[1] @ x[1]) + exact**2) / WIDTH
    assert variance < 1.3 * bound


def test_the_error_falls_with_the_square_root_of_the_width():
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(1, 40_000, generator=generator)
    x = common + torch.randn(24, 40_000, generator=generator)  # cosines near 0.5
    exact = torch.corrcoef(x)
    above = torch.triu_indices(24, 24, 1)
    scaled = []
    for width in (64, 256, 1024, 4096):
        errors = []
        for seed in range(20):  # all pairs share what is common, so one sketch is one draw of its error
            values = sketch([x], CountSketch(width, seed))
            unit = values / values.norm(dim=1, keepdim=True)
            errors.append((unit @ unit.T - exact)[above[0], above[1]])
        scaled.append(float(torch.stack(errors).square().mean().sqrt()) * width**0.5)
    # The law: (1 - cosine^2) / sqrt(D).
    assert scaled == pytest.approx([0.75] * 4, rel=0.2)


def test_the_end_of_a_measurement_scales_each_group():
    collector = SketchCollector(CountSketch(WIDTH, seed=3), 4)
    for index, whole in enumerate(gradients(4)):
        collector.collect(index, 0, whole)
    before, factors = collector.table.clone(), torch.tensor([1.0, 2.0, 0.0, 0.5])
    collector.finish(factors)
    torch.testing.assert_close(collector.table, before * factors[:, None])


def test_sums_over_batches_are_means_over_samples():
    rows = gradients(5)
    exact = torch.cat(rows, 1)
    projection = Unprojected(SIZES)
    sums = SketchSums(halves=2, tasks=3, width=projection.width)
    table = sketch(rows, projection, pieces=3)
    torch.testing.assert_close(table, exact)
    half, task, counts = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 1]), torch.tensor([1, 2, 4, 3, 5])
    sums.add(table[:3], half[:3], task[:3], counts[:3])
    sums.add(table[3:], half[3:], task[3:], counts[3:])
    means = sums.means()
    torch.testing.assert_close(means[0, 0], (exact[0] + 3 * exact[3]) / 4)
    torch.testing.assert_close(means[1, 1], exact[4])
    assert means[:, 2].isnan().all()
    assert sums.counts.tolist() == [[4, 2, 0], [4, 5, 0]]


def test_memory_does_not_grow_with_the_model():
    stored = []
    for size in (1_000, 100_000):
        collector, sums = SketchCollector(CountSketch(WIDTH, 0), 4), SketchSums(2, 10, WIDTH)
        collector.collect(0, 0, torch.ones(4, size))
        tensors = [*vars(collector).values(), *vars(sums).values(), *vars(collector.projection).values()]
        stored.append(sum(value.numel() for value in tensors if isinstance(value, torch.Tensor)))
    assert stored == [4 * WIDTH + 2 * 10 * WIDTH + 2 * 10] * 2


@pytest.mark.parametrize(("width", "seed"), [(0, 0), (4, -1)])
def test_bad_settings_are_refused(width, seed):
    with pytest.raises(UserInputError, match="sketch"):
        CountSketch(width, seed)
