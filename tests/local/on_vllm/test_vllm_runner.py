"""The vLLM runner by itself: what is said to vLLM, and what its failures become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from asyncmodels.errors import AsyncModelsError, EngineError, InvalidRequestError, QueueFullError
from asyncmodels.local.runner import Ended, Failed, Sampled
from asyncmodels.local.sequence import Sampling, Sequence
from tests.local.on_vllm.kept import kept_runner


@pytest.fixture
def runner() -> Iterator[Any]:
    runner = kept_runner()
    runner.load()
    yield runner
    runner.close()
    assert not any(runner.books.values())


def sequence(name: str, prompt: tuple[int, ...] = (5, 6, 7), **fields: Any) -> Sequence:
    return Sequence(id=name, prompt=prompt, max_tokens=fields.pop("max_tokens", 4), **fields)


def follow(runner: Any, *sequences: Sequence) -> dict[str, list[Any]]:
    """What comes of ``sequences``, to the end of each."""
    runner.insert(sequences)
    outputs: dict[str, list[Any]] = {one.id: [] for one in sequences}
    while not all(seen and isinstance(seen[-1], Ended | Failed) for seen in outputs.values()):
        for output in runner.step():
            outputs[output.sequence.id].append(output)
    return outputs


def test_a_sequence_to_its_end(runner: Any) -> None:
    """Each token comes, then why there are no more."""
    (outputs,) = follow(runner, sequence("one", ignore_eos=True)).values()
    assert [type(output) for output in outputs] == [Sampled] * 4 + [Ended]
    assert outputs[-1].reason == "length"


def test_prefixes_are_shared_among_those_of_one_salt(runner: Any) -> None:
    """Sequences of another salt know nothing of a cached prefix."""
    prompt = tuple(40 + n % 50 for n in range(150))
    asked = {}
    for name, salt in (("first", "a"), ("same", "a"), ("other", "b"), ("none", None)):
        asked[name] = sequence(name, prompt, cache_salt=salt)
        follow(runner, asked[name])
    assert [one.cached for one in asked.values()] == [0, 128, 0, 0]


def test_a_wake_ends_the_wait_once(runner: Any) -> None:
    """A wake is not lost when nobody waits yet, and does not count twice."""
    runner.wake()
    runner.wake()
    assert runner.step() == []
    (outputs,) = follow(runner, sequence("after", ignore_eos=True)).values()
    assert len(outputs) == 5


def test_ours_to_vllms(runner: Any) -> None:
    """All that a sequence says of sampling is said to vLLM, which is always told a limit and never decodes."""
    from vllm.sampling_params import RequestOutputKind

    from asyncmodels.local.vllm_sampling import priority, sampling_params

    sampling = Sampling(
        temperature=0.7,
        top_k=10**30,
        top_p=0.9,
        min_p=0.1,
        seed=-1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logprobs=2,
    )
    constraint = {"regex": "a+"}
    one = sequence("x", sampling=sampling, constraint=constraint, ignore_eos=True, priority=3, max_tokens=77)
    params = sampling_params(one, vocabulary=300)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 300, 0.9, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.logprobs) == (0.5, -0.5, 2)
    assert params.seed == 2**63 - 1
    assert (params.max_tokens, params.ignore_eos, params.detokenize) == (77, True, False)
    assert params.output_kind is RequestOutputKind.DELTA
    assert params.structured_outputs.regex == "a+"
    assert sampling_params(one, vocabulary=300).structured_outputs is not params.structured_outputs
    assert [priority(sequence("p", priority=value)) for value in (3, -2, 10**30)] == [-3, 2, -(2**63 - 1)]


def test_vllms_failures_are_ours() -> None:
    """Each kind of failure of one request is an error of the kind that its cure is."""
    from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, RetryableRequestError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    from asyncmodels.local.vllm_runner import _translated

    wrapped = EngineGenerateError()
    wrapped.__cause__ = ValueError("bad prompt")
    broken = EngineGenerateError()
    broken.__cause__ = OSError("pipe")
    kinds: list[tuple[Exception, type[AsyncModelsError]]] = [
        (QueueOverflowError(), QueueFullError),
        (MaxQueuedTokensError(), QueueFullError),
        (VLLMValidationError("no", parameter="x", value=1), InvalidRequestError),
        (wrapped, InvalidRequestError),
        (broken, EngineError),
        (RetryableRequestError(), EngineError),
    ]
    for error, kind in kinds:
        ours = _translated(error)
        assert type(ours) is kind
        assert ours.__cause__ is not None
        assert str(ours).endswith(".")
        assert "\n" not in str(ours)


def test_a_full_queue_of_vllms_own_is_a_queue_full_error(runner: Any) -> None:
    """Where vLLM is told to bound its queue, who does not fit in gets a QueueFullError, and nothing is left."""
    scheduler = runner._engine.scheduler_config
    before = scheduler.max_num_queued_reqs
    scheduler.max_num_queued_reqs = 1
    try:
        outputs = follow(runner, sequence("in"), sequence("out"))
    finally:
        scheduler.max_num_queued_reqs = before
    (refused,) = outputs["out"]
    assert isinstance(refused.error, QueueFullError)
    assert isinstance(outputs["in"][-1], Ended)
