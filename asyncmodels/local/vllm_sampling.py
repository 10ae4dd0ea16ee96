"""One sequence in vLLM's words: how to sample it, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from asyncmodels.local.grammar import validate
from asyncmodels.local.runner import Sampled, Scores
from asyncmodels.local.sequence import Sequence
from asyncmodels.types import Choice, Grammar, JSONSchema, Regex

__all__ = ["priority", "sampled", "sampling_params", "scores", "scoring_params", "structured_outputs"]

_LARGEST = 2**63 - 1
"""Whole numbers travel to the engine's process in 64 bits."""


def priority(sequence: Sequence) -> int:
    """vLLM's lowest goes first."""
    return -max(-_LARGEST, min(sequence.priority, _LARGEST))


def sampling_params(sequence: Sequence, *, vocabulary: int) -> SamplingParams:
    """How vLLM is to sample ``sequence``. Raises VLLMValidationError for what it cannot do."""
    sampling = sequence.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=min(sampling.top_k or 0, vocabulary),
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        min_p=sampling.min_p or 0.0,
        # -1 would mean none, and a larger seed does not travel.
        seed=None if sampling.seed is None else sampling.seed & _LARGEST,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logprobs=sampling.logprobs,
        max_tokens=sequence.max_tokens,
        ignore_eos=sequence.ignore_eos,
        # vLLM writes into it, so each request has its own.
        structured_outputs=None if sequence.constraint is None else StructuredOutputsParams(**sequence.constraint),
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
        skip_clone=True,
    )


def scoring_params(sequence: Sequence) -> SamplingParams:
    """How vLLM is to score ``sequence``, with its last token behind the prompt: all of the prompt has its
    log-probabilities taken, for which vLLM uses nothing of its prefix cache, and one token is generated for nothing.
    """
    return SamplingParams(
        temperature=0.0,
        prompt_logprobs=sequence.sampling.logprobs or 1,
        max_tokens=1,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
        skip_clone=True,
    )


def structured_outputs(grammar: Grammar) -> Mapping[str, Any]:
    """``grammar`` in vLLM's words. Raises InvalidRequestError and UnsupportedError as ``validate`` does."""
    normal = validate(grammar)
    if isinstance(normal, JSONSchema):
        return {"json": dict(normal.schema)}
    if isinstance(normal, Regex):
        return {"regex": normal.pattern}
    if isinstance(normal, Choice):
        return {"choice": list(normal.options)}
    return {"grammar": normal.grammar}


def sampled(sequence: Sequence, completion: Any) -> Iterator[Sampled]:
    """The tokens of one of vLLM's outputs, often one, several when it was faster than its reader."""
    if completion.logprobs is None:
        for token in completion.token_ids:
            yield Sampled(sequence, token)
        return
    count = sequence.sampling.logprobs or 0
    for token, places in zip(completion.token_ids, completion.logprobs, strict=True):
        # The chosen token is among them, whatever its rank.
        best = sorted((entry.rank, other, entry.logprob) for other, entry in places.items() if entry.rank <= count)
        top = tuple((other, logprob) for _, other, logprob in best)
        yield Sampled(sequence, token, places[token].logprob, top)


def scores(sequence: Sequence, prompt_logprobs: Any) -> Scores:
    """What vLLM says of the tokens of its prompt, of which the last are those that are scored."""
    count = sequence.sampling.logprobs or 1
    places = []
    for token, place in zip(sequence.scored, prompt_logprobs[-len(sequence.scored) :], strict=True):
        best = sorted((entry.rank, other, entry.logprob) for other, entry in place.items() if entry.rank <= count)
        places.append((place[token].logprob, tuple((other, logprob) for _, other, logprob in best)))
    return Scores(sequence, tuple(places))
