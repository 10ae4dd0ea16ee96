"""Token ids to text, one at a time: never half a character, and in the end exactly what decoding all at once gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers.decoders import DecodeStream

from asyncmodels.local.runner import MakesDetokenizers

__all__ = ["Detokenizer", "make_detokenizer"]

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one sequence. ``push`` returns the text that a token completes, ``finish`` what is left of it.

    Special tokens have no text, unless ``special_tokens`` says so. Bytes that never became a character show as U+FFFD,
    at the end only.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = not special_tokens
        self._ids: list[int] = []
        self._length = 0
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._step: Callable[[int], str | None]
        if backend is None:
            self._start = self._end = 0
            self._step = self._decode_window
        else:
            stream = DecodeStream(skip_special_tokens=self._skip)
            self._step = lambda token: stream.step(backend, token)

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._step(token) or ""
        self._length += len(text)
        return text

    def finish(self) -> str:
        """What the tokens so far hold beyond the text that ``push`` gave out."""
        whole: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return whole[self._length :]

    def _decode_window(self, _token: int) -> str | None:
        # For tokenizers that are not of the tokenizers library. A token's text can depend on the one before it, so
        # each new text is the difference of two decodings of the last few tokens.
        before = self._decode(self._ids[self._start : self._end])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return None
        self._start, self._end = self._end, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text


def make_detokenizer(tokenizer: Any) -> MakesDetokenizers:
    """A maker of detokenizers over ``tokenizer``, which must belong to the calling thread."""
    return partial(Detokenizer, tokenizer)
