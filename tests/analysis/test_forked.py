import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from analysis.forked import _work, forked_calls
from lightning_modules.errors import UserInputError

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@only_linux
def test_results_come_in_order_from_other_processes():
    held = np.arange(5)
    calls = [lambda at=at: (int(held[at]) ** 2, os.getpid()) for at in (4, 0, 3)]
    found = forked_calls(calls, processes=2)
    assert [value for value, _ in found] == [16, 0, 9]
    assert os.getpid() not in {process for _, process in found}


def test_one_processor_or_one_call_needs_no_other_process():
    assert forked_calls([os.getpid, os.getpid], processes=1) == [os.getpid(), os.getpid()]
    assert forked_calls([os.getpid], processes=2) == [os.getpid()]
    assert forked_calls([]) == []


@only_linux
def test_errors_are_those_of_the_call():
    def fail(item):
        raise UserInputError(f"not {item}")

    with pytest.raises(UserInputError, match="not 1"):
        forked_calls([partial(fail, 1), partial(fail, 2)], processes=2)
    assert _work == []
    assert forked_calls([partial(str, 1), partial(str, 2)], processes=2) == ["1", "2"]


@only_linux
def test_processes_have_one_thread_each():
    np.ones((2, 2)) @ np.ones((2, 2))
    for pools in forked_calls([threadpool_info, threadpool_info], processes=2):
        assert {pool["num_threads"] for pool in pools} <= {1}


@only_linux
def test_a_killed_process_is_explained():
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserInputError, match="was killed, probably for memory: free some, or compare fewer runs"):
        forked_calls([die, die], processes=2)
    assert _work == []
