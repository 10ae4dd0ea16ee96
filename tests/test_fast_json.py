"""JSON that is kept: what orjson and the standard library disagree about comes back as it was."""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.fast_json import Encoder, decode


def refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no place in JSON")


encoder = Encoder(default=refuse)
in_order = Encoder(default=refuse, sort_keys=True)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_whatever_is_written_is_read(value: Any) -> None:
    """Infinities, lone surrogates, large integers and nulls, too."""
    assert decode(encoder.encode(value)) == value


def test_a_nan_is_no_null() -> None:
    """A logarithm of nothing is read as what it was, and is not taken for a value that is not there."""
    assert math.isnan(decode(encoder.encode({"a": math.nan}))["a"])
    assert encoder.encode({"a": math.nan}) != encoder.encode({"a": None})


@given(st.dictionaries(st.text(), values, max_size=5))
def test_the_order_of_keys_makes_no_difference(tree: dict[str, Any]) -> None:
    """Two trees that are equal are written as the same bytes, and as JSON that anybody can read."""
    backwards = dict(reversed(tree.items()))
    assert in_order.encode(tree) == in_order.encode(backwards)
    assert json.loads(in_order.encode(tree)) == tree


def test_keys_that_are_numbers_become_text() -> None:
    """As json has it."""
    assert decode(encoder.encode({1: "a"})) == {"1": "a"}


def test_what_json_cannot_hold_is_refused() -> None:
    """An object, or a circle, is an error of whoever wrote it."""

    class Colour(Enum):
        RED = object()

    circle: list[Any] = []
    circle.append(circle)
    for value, error in ((object(), TypeError), (Colour.RED, TypeError), ({1: 2, "1": 3}, TypeError)):
        with pytest.raises(error):
            in_order.encode(value)
    with pytest.raises(RecursionError):
        encoder.encode(circle)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"a": }'])
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    """Half a line of a journal, for one."""
    with pytest.raises(ValueError, match=r"."):
        decode(text)
