"""Token ids to text, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.local.detokenizer import Detokenizer


class Plain:
    """A tokenizer that is not of the tokenizers library: it can only decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer.decode(*args, **kwargs)


@pytest.fixture(params=["tokenizers", "plain"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tokenizer if request.param == "tokenizers" else Plain(tokenizer)


def test_a_character_comes_whole(tokenizer: Any, any_tokenizer: Any) -> None:
    """The four bytes of an emoji give nothing, nothing, nothing, and the emoji."""
    detokenizer = Detokenizer(any_tokenizer)
    ids = tokenizer("a😀é", add_special_tokens=False)["input_ids"]
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.finish() == ""


def test_half_a_character_shows_at_the_end_only(tokenizer: Any, any_tokenizer: Any) -> None:
    """A text that is cut inside of a character ends with U+FFFD, as decoding all at once does."""
    detokenizer = Detokenizer(any_tokenizer)
    ids = tokenizer("a😀", add_special_tokens=False)["input_ids"][:-1]
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", ""]
    assert detokenizer.finish() == tokenizer.decode(ids)[1:]
    assert "\ufffd" in tokenizer.decode(ids)


def test_special_tokens_have_no_text(tokenizer: Any, any_tokenizer: Any) -> None:
    """Special tokens are part of the answer and not of its text."""
    detokenizer = Detokenizer(any_tokenizer)
    assert "".join(detokenizer.push(token) for token in (0, *tokenizer("hi")["input_ids"], 1)) == "hi"


@settings(deadline=None)
@given(text=st.text(max_size=30), cut=st.integers(0, 60))
def test_pieces_add_up_to_the_whole(tokenizer: Any, text: str, cut: int) -> None:
    """Whatever the text and wherever it stops, the pieces together are what decoding all at once gives."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:cut]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
