"""What a model thinks of a given continuation: the log-probability of each of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from asyncmodels.errors import InvalidResponseError
from asyncmodels.types import Response, TokenLogprob

__all__ = ["Scored"]


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of a continuation. Logarithms are natural ones."""

    logprob: float
    """Of the whole continuation: the sum over its tokens."""
    greedy: bool
    """Whether greedy decoding would say the same, as far as the continuation goes."""
    tokens: tuple[TokenLogprob, ...]
    """Its tokens, each with the most likely one at its place as the first of ``top``."""
    response: Response = field(repr=False, compare=False)
    """What the model answered: usage, timing, attempts."""

    @classmethod
    def of(cls, response: Response) -> Self:
        """The score in the answer to a request with ``score``, as ``map`` gives it.

        Raises InvalidResponseError for an answer that has none.
        """
        tokens = response.logprobs
        if not tokens or not all(token.top for token in tokens):
            raise InvalidResponseError("The answer holds no log-probabilities of a continuation.")
        best = [max(logprob for _, logprob in token.top) for token in tokens]
        return cls(
            logprob=sum(token.logprob for token in tokens),
            # Both come from the same numbers, so that the best token is as likely as itself to the last bit.
            greedy=all(token.logprob >= most for token, most in zip(tokens, best, strict=True)),
            tokens=tokens,
            response=response,
        )
