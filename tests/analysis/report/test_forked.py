import os
import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from analysis.report.forked import _work, forked_map
from lightning_modules.errors import UserInputError

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@only_linux
def test_results_come_in_order_from_other_processes():
    held = np.arange(5)
    found = forked_map(lambda item: (int(held[item]) ** 2, os.getpid()), [4, 0, 3], processes=2)
    assert [value for value, _ in found] == [16, 0, 9]
    assert os.getpid() not in {process for _, process in found}


def test_one_processor_or_one_item_needs_no_other_process():
    assert forked_map(lambda item: (item, os.getpid()), [1, 2], processes=1) == [(1, os.getpid()), (2, os.getpid())]
    assert forked_map(lambda item: os.getpid(), [1], processes=2) == [os.getpid()]
    assert forked_map(str, []) == []


@only_linux
def test_errors_are_those_of_the_function():
    def fail(item):
        raise UserInputError(f"not {item}")

    with pytest.raises(UserInputError, match="not 1"):
        forked_map(fail, [1, 2], processes=2)
    assert _work == []
    assert forked_map(str, [1, 2], processes=2) == ["1", "2"]


@only_linux
def test_processes_have_one_thread_each():
    np.ones((2, 2)) @ np.ones((2, 2))
    for threads in forked_map(lambda _: [pool["num_threads"] for pool in threadpool_info()], [0, 1], processes=2):
        assert set(threads) <= {1}
