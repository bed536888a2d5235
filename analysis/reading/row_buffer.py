"""Rows of many shards as one array, in memory that holds them once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class RowBuffer:
    """Takes rows one after the other and puts them where they belong when all are there.

    Args:
        most: Rows there may be; memory is taken as they come.
        width: Numbers in each.
    """

    def __init__(self, most: int, width: int) -> None:
        self._values = np.empty((most, width), dtype=np.float32)
        self._filled = 0

    def append(self, rows: npt.NDArray) -> None:
        """Copies rows (n, at most width); what lacks at their end is NaN."""
        end = self._filled + len(rows)
        self._values[self._filled : end, : rows.shape[1]] = rows
        self._values[self._filled : end, rows.shape[1] :] = np.nan
        self._filled = end

    def arranged(self, place: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
        """The rows at the places given, (size, width), NaN elsewhere; rows that came in order are not copied.

        Args:
            place: (N,) of each row; where two have the same, the later one counts.
            size: Number of places.
        """
        values = self._values[: self._filled]
        if np.array_equal(place, np.arange(size)):
            return values
        arranged = np.full((size, values.shape[1]), np.nan, dtype=np.float32)
        arranged[place] = values
        return arranged
