"""Tests for `experiments/sweeping/settings.py`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweeping.settings import differences, digest, flattened, merged, nested
from lightning_modules.errors import UserInputError

KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers() | st.none() | st.lists(st.integers(), max_size=2), min_size=1, max_size=3),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(TREES)
def test_nesting_undoes_flattening(tree):
    assert nested(flattened(tree)) == tree


def test_dotted_and_nested_keys_are_the_same():
    assert flattened({"a.b": {"c": 1}, "d": {}}) == flattened({"a": {"b.c": 1}, "d": {}}) == {"a.b.c": 1, "d": {}}


@pytest.mark.parametrize("settings", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}])
def test_a_key_cannot_be_a_value_and_a_group(settings):
    with pytest.raises(UserInputError, match=r"a is set as a value|a\.b is set, and so is"):
        nested(settings)


def test_later_layers_win_over_whole_groups():
    assert merged({"a.b": 1, "a.c": 2, "d": 3}, {"a.b": 5}, {"d.e": 4}) == {"a.b": 5, "a.c": 2, "d.e": 4}
    assert merged({"a.b": 1, "ab": 2}, {"a": None}) == {"a": None, "ab": 2}


@given(TREES)
def test_the_digest_does_not_depend_on_the_order(tree):
    assert digest(tree) == digest(dict(reversed(tree.items())))
    assert digest(tree) != digest({**tree, "new": 1})


def test_differences_name_settings_in_words():
    before, now = {"a": {"b": 1, "c": "x"}, "d": 2}, {"a": {"b": 1, "c": "y"}, "e": None}
    assert differences(before, now) == 'a.c was "x", is "y"; d was 2, is not set; e was not set, is null'
    assert differences(before, before) == ""
    many = differences({}, {str(i): i for i in range(9)})
    assert many.startswith("0 was not set, is 0; ")
    assert many.endswith("; and 5 more")
