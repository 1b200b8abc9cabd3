"""Contracts in canonical form, whichever way it is written."""

from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from esper.contracts import canonical_json

LARGEST = 2**53 - 1
STRINGS = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | STRINGS
NUMBERS = SCALARS | st.floats(allow_nan=False, allow_infinity=False)


def documents(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
        max_leaves=12,
    )


@given(documents(SCALARS) | documents(NUMBERS))
@example({"b": [1, None, True], "a": {'\x1f\x7f\b"\\/': -LARGEST}})
@example({"\ufb33": 1, "\U0001f600": 2, "z": 3})  # in the order of UTF-16, not of code points
@example([1.0, 1e21, 5e-324])
def test_it_is_that_of_rfc_8785(document: Any) -> None:
    assert canonical_json(document) == rfc8785.dumps(document)


@pytest.mark.parametrize("value", [LARGEST + 2, {1: 2}, {"a": {2}}, "\ud800"])
def test_what_has_no_such_form_is_refused(value: Any) -> None:
    with pytest.raises(rfc8785.CanonicalizationError):
        canonical_json(value)
