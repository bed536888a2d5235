import numpy as np

from analysis.reading.row_buffer import RowBuffer


def filled(most, *parts):
    rows = RowBuffer(most, 3)
    for part in parts:
        rows.append(np.asarray(part, dtype=float))
    return rows


def test_rows_in_order_are_not_copied():
    rows = filled(9, [[0, 1, 2]], [[3, 4, 5], [6, 7, 8]])
    got = rows.arranged(np.arange(3), 3)
    np.testing.assert_array_equal(got, np.arange(9).reshape(3, 3))
    assert got.dtype == np.float32
    assert np.shares_memory(got, rows.arranged(np.arange(3), 3))


def test_rows_go_to_their_places_and_the_later_of_two_counts():
    rows = filled(4, [[0, 0, 0], [1, 1, 1]], [[2, 2, 2], [3, 3, 3]])
    got = rows.arranged(np.array([4, 0, 4, 2]), 5)
    np.testing.assert_array_equal(got[:, 0], [1, np.nan, 3, np.nan, 2])


def test_what_a_short_row_lacks_is_unknown():
    rows = filled(2, [[7, 8, 9]], [[1, 2]])
    np.testing.assert_array_equal(rows.arranged(np.arange(2), 2), [[7, 8, 9], [1, 2, np.nan]])
