"""The token ids of a continuation and of what it continues, where a request has its own prompt for it."""

from __future__ import annotations

from typing import Any, Protocol

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import Score

__all__ = ["Tokenize", "checked_tokens", "score_tokens"]


class Tokenize(Protocol):
    """Turns text into token ids, with the special tokens around it that the model begins a document with, or not."""

    def __call__(self, text: str, /, *, special: bool) -> tuple[int, ...]: ...


def score_tokens(tokenizer: Any, tokenize: Tokenize, score: Score) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of ``score``'s own prompt and of its continuation. Raises InvalidRequestError.

    Two texts are tokenised together, because that is how a model has learned them, and the continuation is what comes
    after as many tokens as the prompt has alone; spaces at the end of the prompt go to the continuation. An empty
    prompt becomes the token that a document begins with, or the one that ends it.
    """
    prompt, continuation = score.prompt, score.continuation
    assert prompt is not None  # noqa: S101  # or the messages would be the prompt
    if prompt and isinstance(prompt, str) and isinstance(continuation, str):
        bare = prompt.rstrip()
        if bare:
            bos = _begins_with_bos(tokenizer, bare)
            before = tokenize(bare, special=not bos)
            both = tokenize(prompt + continuation, special=not bos)
            cut = min(len(before), len(both) - 1)
            return both[:cut], both[cut:]
        continuation = prompt + continuation
        prompt = ""
    if isinstance(prompt, str):
        before = tokenize(prompt, special=not _begins_with_bos(tokenizer, prompt)) if prompt else ()
    else:
        before = checked_tokens(tokenizer, prompt)
    if isinstance(continuation, str):
        scored = tokenize(continuation, special=False)
    else:
        scored = checked_tokens(tokenizer, continuation)
    if before:
        return before, scored
    first = _first_token(tokenizer)
    if scored[0] == first and len(scored) > 1:
        return scored[:1], scored[1:]
    return (first,), scored


def checked_tokens(tokenizer: Any, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """``tokens``; raises InvalidRequestError for one that the model does not have, which could end its engine."""
    size = len(tokenizer)
    if tokens and max(tokens) >= size:
        raise InvalidRequestError(f"There is no token {max(tokens)}: the model has those from 0 to {size - 1}.")
    return tokens


def _begins_with_bos(tokenizer: Any, text: str) -> bool:
    bos = getattr(tokenizer, "bos_token", None)
    return isinstance(bos, str) and bool(bos) and text.startswith(bos)


def _first_token(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise InvalidRequestError(
        "The prompt is empty, and this model has no token that a document begins with: nothing comes before the first "
        "token that is to be scored."
    )
