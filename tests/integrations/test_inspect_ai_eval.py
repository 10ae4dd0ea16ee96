"""Whole evaluations of inspect_ai on models of ours: against a real server, in one loop after the other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from inspect_ai._util import registry
from inspect_ai.hooks import ApiKeyOverride, Hooks, hooks
from inspect_ai.model import ChatMessageUser, GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import Tool, tool
from inspect_ai.util._concurrency import adaptive_controllers

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError, EventLoopError, InvalidRequestError, RateLimitError
from asyncmodels.integrations.inspect_ai import inspect_model
from asyncmodels.integrations.inspect_ai_sample import SetupError
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.testing import EVERYTHING, ScriptedBackend
from asyncmodels.types import Request, Response, ToolCall
from tests.integrations.evaluating import api_of, at_place, evaluated, events_of, over, samples, scripted, task_of
from tests.server.handle import Server
from tests.server.script import Answer

CONTEXT = Answer(
    status=400,
    body='{"error": {"code": "context_length_exceeded", "message": "maximum context length is 10 tokens, 99 given"}}',
)


@tool
def add() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: One.
            y: The other.
        """
        if x == 0:
            raise ValueError("no zero, please")
        return x + y

    return execute


class Adder(Backend):
    """Asks for sums until it has been told them, then says what it was told."""

    capabilities = EVERYTHING

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def generate(self, request: Request, /) -> Response:
        self.requests.append(request)
        results = [message.text for message in request.messages if message.role == "tool"]
        if results:
            return Response(content=f"Hello {' '.join(results)}", finish_reason="stop")
        calls = (ToolCall("1", "add", '{"x": 1, "y": 2}'), ToolCall("2", "add", '{"x": 3, "y": 4}'))
        return Response(tool_calls=calls, finish_reason="tool_calls")

    def stream(self, request: Request, /) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


def test_an_evaluation_runs_and_a_second_one_in_another_loop(server: Server, tmp_path: Path) -> None:
    """get_model remembers the model, eval makes a loop each time: the second evaluation is as good as the first."""
    place = server.script(Answer())
    model = get_model("asyncmodels/openai/test-model", base_url=f"{place.url}/v1", api_key="k-12345678")
    again = get_model("asyncmodels/openai/test-model", base_url=f"{place.url}/v1", api_key="k-12345678")
    assert model is again
    for _ in range(2):
        log = evaluated(task_of(20), model, tmp_path)
        assert (log.status, len(samples(log))) == ("success", 20)
        assert log.results is not None
        assert log.results.scores[0].metrics["accuracy"].value == 1.0
    assert log.eval.model == "asyncmodels/openai/test-model"
    assert len(place.seen().requests) == 40
    assert log.stats.model_usage["asyncmodels/openai/test-model"].total_tokens == 20 * 12


def test_many_models_at_once(server: Server, tmp_path: Path) -> None:
    """A model that grades another runs beside it, each with a limit of its own."""
    place, grading = server.script(Answer(content="Hello")), server.script(Answer(content="fine"))
    grader = at_place(grading)

    @solver
    def graded() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            state = await generate(state)
            verdict = await grader.generate(state.output.completion)
            assert verdict.completion == "fine"
            return state

        return solve

    model = at_place(place)
    assert evaluated(task_of(10, solver=graded()), model, tmp_path).status == "success"
    assert (len(place.seen().requests), len(grading.seen().requests)) == (10, 10)
    assert model.api.connection_key() == grader.api.connection_key().replace(grading.key, place.key)
    assert model.api.connection_key() != grader.api.connection_key()


def test_tools_run_in_a_loop(tmp_path: Path) -> None:
    """The model's calls are run by inspect_ai, both of them, and their results come back to it."""
    backend = Adder()
    log = evaluated(task_of(3, solver=[use_tools(add()), generate()]), over(backend), tmp_path)
    assert [sample.output.completion for sample in samples(log)] == ["Hello 3 7"] * 3
    assert [[tool.name for tool in request.tools] for request in backend.requests] == [["add"]] * 6


# -- who waits, and for how long --------------------------------------------------------------------------------------


class Slow(ScriptedBackend):
    """Holds every call until a number of them is there."""

    def __init__(self, together: int) -> None:
        super().__init__("Hello")
        self._together = together
        self._here = 0
        self._all: asyncio.Event | None = None

    async def generate(self, request: Request, /) -> Response:
        self._all = self._all or asyncio.Event()
        self._here += 1
        if self._here == self._together:
            self._all.set()
        await self._all.wait()
        return Response(content="Hello", finish_reason="stop")


def test_inspects_limit_is_no_second_throttle(tmp_path: Path) -> None:
    """Without a word about connections as many calls are in flight as there are samples, more than its 20 and 100."""
    log = evaluated(task_of(150), over(Slow(150)), tmp_path, time_limit=60)
    assert (log.status, len(samples(log))) == ("success", 150)
    assert all(sample.limit is None for sample in samples(log))


@pytest.mark.parametrize("settings", [{"max_connections": 3}, {"adaptive_connections": 3}])
def test_a_limit_that_is_asked_for_holds(settings: dict[str, int], server: Server, tmp_path: Path) -> None:
    """What the user says about connections goes before."""
    place = server.script(Answer(delay=0.05))
    evaluated(task_of(20), at_place(place), tmp_path, **settings)
    assert place.seen().peak <= 3


def test_a_limit_that_is_changed_in_the_middle_stays(tmp_path: Path) -> None:
    """What ``inspect ctl`` does to the limit of a running evaluation is not undone by the next call."""
    limits: list[int] = []

    @solver
    def throttled() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            for _ in range(2):
                state = await generate(state)
                [controller] = adaptive_controllers()
                limits.append(controller.concurrency)
                controller.set_max(5)
            return state

        return solve

    evaluated(task_of(1, solver=throttled()), scripted("Hello", "Hello")[1], tmp_path)
    assert limits == [1000, 5]


def test_a_model_with_a_limit_of_its_own_tells_inspect() -> None:
    """More calls in flight than the model lets through would only wait in another line."""
    assert inspect_model(Model(ScriptedBackend("x"))).api.max_connections() == 1000
    limited = Model(ScriptedBackend("x"), lambda backend: Concurrency(backend, limit=7))
    assert inspect_model(limited).api.max_connections() == 7


def test_the_time_of_an_answer_is_the_time_for_which_it_was_served(server: Server, tmp_path: Path) -> None:
    """Of a call that waited for a slot and for a retry only the attempt that succeeded counts as work."""
    place = server.script(Answer(status=429, headers=[("retry-after", "0.5")]), Answer(delay=0.1))
    model = at_place(place, max_concurrency=1)
    log = evaluated(task_of(3), model, tmp_path)
    events = events_of(log)
    for event in events:
        assert event.call is not None
        assert event.call.time is not None
        assert 0.1 <= event.call.time < 0.45
        assert event.output.time == event.call.time
    attempts = [(event.output.metadata or {}).get("attempts", 1) for event in events]
    assert sum(attempts) == len(place.seen().requests) == 4
    slowest = max(samples(log), key=lambda sample: sample.total_time or 0)
    assert (slowest.total_time or 0) - (slowest.working_time or 0) > 0.4


def test_samples_are_told_apart(tmp_path: Path) -> None:
    """Each sample is an agent of its own where calls wait in line, and each epoch a question of its own for a cache."""
    backend, model = scripted(*["Hello"] * 6)
    evaluated(task_of(3), model, tmp_path, epochs=2)
    assert len({request.agent for request in backend.requests}) == 6
    assert sorted(request.metadata["epoch"] for request in backend.requests) == [1, 1, 1, 2, 2, 2]


# -- who tries again --------------------------------------------------------------------------------------------------


def test_our_own_retries(server: Server, tmp_path: Path) -> None:
    """A server that stumbles costs no sample, and inspect_ai hears of nothing to retry."""
    place = server.script(Answer(status=503), Answer(status=429, headers=[("retry-after", "0.1")]), Answer())
    log = evaluated(task_of(1), at_place(place), tmp_path)
    assert log.status == "success"
    [event] = events_of(log)
    assert (event.retries, (event.output.metadata or {})["attempts"]) == (None, 3)


def test_max_retries_is_how_often_the_chain_tries_again(server: Server, tmp_path: Path) -> None:
    """--max-retries of the command line reaches our chain, and the error is ours."""
    place = server.script(Answer(status=500))
    model = at_place(place, config=GenerateConfig(max_retries=1))
    log = evaluated(task_of(1), model, tmp_path)
    assert log.status == "error"
    assert log.error is not None
    assert "The provider answered 500" in log.error.message
    assert len(place.seen().requests) == 2


def test_inspects_retries(server: Server, tmp_path: Path) -> None:
    """With retries=inspect our chain tries once, and inspect_ai again, no sooner than the server said."""
    place = server.script(Answer(status=429, headers=[("retry-after", "0.2")]), Answer())
    model = at_place(place, retries="inspect")
    log = evaluated(task_of(1), model, tmp_path)
    assert log.status == "success"
    assert len(events_of(log)) == 2
    assert api_of(model).model.statistics().links.keys().isdisjoint({"Retry"})


def test_what_inspect_is_told_about_an_error() -> None:
    """It learns what kind of error it was and when the server wants to hear of it again, where it has to retry."""
    own = at_model("own")
    theirs = at_model("inspect")
    busy = RateLimitError("busy", retry_after=7.0)
    assert not own.should_retry(busy).retry
    told = theirs.should_retry(busy)
    assert (told.retry, told.kind, told.retry_after) == (True, "rate_limit", 7.0)
    assert not theirs.should_retry(InvalidRequestError("bad")).retry
    assert not theirs.should_retry(ValueError("what")).retry


def at_model(retries: str) -> Any:
    return get_model("asyncmodels/openai/m", api_key="k", memoize=False, retries=retries).api


class Keys(Hooks):
    """Gives out one key after the other."""

    def __init__(self) -> None:
        self._keys = iter(["first-key", "second-key"])

    def override_api_key(self, data: ApiKeyOverride) -> str | None:
        return next(self._keys)


def no_pause() -> Any:
    return lambda _state: 0.0


def test_a_key_that_was_replaced_is_used_from_the_next_attempt_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks of inspect_ai may bring a new key after a 401; the model, with all that it has learned, stays the same."""
    place = server.script(Answer(status=401), Answer())
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))  # the hook is gone after the test
    hooks(name="keys", description="Keys for a test.")(Keys)
    model = at_place(place)
    ours = api_of(model).model
    monkeypatch.setattr(api_of(model), "retry_wait", no_pause)
    log = evaluated(task_of(1), model, tmp_path)
    assert log.status == "success"
    sent = [request.header("authorization") for request in place.seen().requests]
    assert sent == ["Bearer first-key", "Bearer second-key"]
    assert api_of(model).model is ours


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_ends_the_sample_not_the_evaluation(server: Server, tmp_path: Path) -> None:
    """It is an answer with the stop reason model_length, and the log shows what was sent and what was said."""
    log = evaluated(task_of(1), at_place(server.script(CONTEXT)), tmp_path)
    assert log.status == "success"
    [event] = events_of(log)
    assert event.output.stop_reason == "model_length"
    assert event.call is not None
    assert event.call.request["messages"] == [{"role": "user", "content": "Question 0"}]
    assert event.call.response is not None
    assert "maximum context length" in str(event.call.response["error"])
    assert event.call.error


def test_a_prompt_that_is_refused_is_a_content_filter(server: Server, tmp_path: Path) -> None:
    """The provider's policy speaks in the stop reason, as an answer would."""
    refused = Answer(status=400, body='{"error": {"code": "content_filter", "message": "not this"}}')
    log = evaluated(task_of(1), at_place(server.script(refused)), tmp_path)
    assert [event.output.stop_reason for event in events_of(log)] == ["content_filter"]


def test_a_bad_request_is_logged_with_what_was_sent(server: Server, tmp_path: Path) -> None:
    """A request that can never work is not tried again; the sample's error says why, its log what it was."""
    place = server.script(Answer(status=422, body='{"error": {"message": "no such field"}}'))
    log = evaluated(task_of(1), at_place(place), tmp_path)
    assert log.status == "error"
    assert log.error is not None
    assert "no such field" in log.error.message
    assert len(place.seen().requests) == 1
    [event] = events_of(log)
    assert event.call is not None
    assert event.call.request["model"] == "test-model"


def test_secrets_are_in_no_log(server: Server, tmp_path: Path) -> None:
    """The key stands in no file of an evaluation, not even of one whose server repeats it."""
    place = server.script(Answer(status=401, body='{"error": {"message": "bad key k-12345678"}}'))
    log = evaluated(task_of(1), at_place(place), tmp_path, log_format="json")
    assert log.status == "error"
    assert "k-12345678" not in Path(log.location).read_text("utf-8")
    assert "***" in str(log.error)


def test_attempts_that_hang_are_ended_by_our_own_parameter(server: Server, tmp_path: Path) -> None:
    """-M attempt_timeout bounds one attempt, and our chain makes the next one."""
    place = server.script(Answer(fault="hang"), Answer())
    log = evaluated(task_of(1), at_place(place, attempt_timeout=0.3), tmp_path)
    assert log.status == "success"
    assert len(events_of(log)) == 1


def test_inspects_attempt_timeout_cancels_and_gives_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--attempt-timeout ends a whole call of ours, whose connection is closed, and begins another."""
    place = server.script(Answer(fault="hang"), Answer())
    model = at_place(place, retries="inspect")
    monkeypatch.setattr(api_of(model), "retry_wait", no_pause)
    log = evaluated(task_of(1), model, tmp_path, attempt_timeout=1)
    assert log.status == "success"
    assert len(events_of(log)) == 2
    assert place.seen().closed_early == 1
    assert api_of(model).model.statistics().running == 0


async def test_a_cancelled_call_gives_everything_back(server: Server) -> None:
    """Limits of inspect_ai cancel calls in the middle: the connection ends at once, and nothing is left behind."""
    place = server.script(Answer(fault="hang"))
    async with at_place(place) as model:
        call = asyncio.create_task(model.generate("Hi"))
        await place.until(in_progress=1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await place.until(closed_early=1)
        assert api_of(model).model.statistics().running == 0


async def test_a_call_has_a_deadline_even_when_the_server_hangs(server: Server) -> None:
    """--timeout ends an attempt in the middle, where inspect_ai would look at it between attempts only."""
    async with at_place(server.script(Answer(fault="hang"))) as model:
        with pytest.raises(TimeoutError, match="timeout"):
            await model.generate("Hi", config=GenerateConfig(timeout=1))


async def test_several_choices_fail_as_one(server: Server) -> None:
    """The first choice that fails ends the others, and its error is the call's."""
    bad, hanging = Answer(status=404, body='{"error": {"message": "gone"}}'), Answer(fault="hang")
    place = server.script(bad, hanging)
    async with at_place(place) as model:
        with pytest.raises(RuntimeError, match="gone"):
            await model.generate("Hi", config=GenerateConfig(num_choices=2))
        assert api_of(model).model.statistics().running == 0


# -- making the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("opnai/gpt-5", {}, "Unknown scheme 'opnai': did you mean 'openai'"),
        ("openai", {"api_key": "k"}, "needs a model name"),
        ("openai/gpt-5", {}, "No API key"),
        ("openai/gpt-5", {"api_key": "k", "retries": "both"}, 'retries must be "own" or "inspect"'),
        ("openai/gpt-5", {"api_key": "k", "max_concurency": 3}, "did you mean 'max_concurrency'"),
        ("smollm", {"base_url": "http://localhost"}, "has no base URL"),
        ("smollm", {"api_key": "k"}, "takes no API key"),
    ],
)
def test_what_is_typed_wrong_is_one_clear_sentence(name: str, settings: dict[str, Any], fault: str) -> None:
    """It is an error of ours and one that inspect_ai's command line shows without a traceback."""
    with pytest.raises(SetupError, match=fault) as caught:
        get_model(f"asyncmodels/{name}", memoize=False, **settings)
    assert isinstance(caught.value, ConfigurationError)


def test_a_missing_extra_keeps_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line prints the sentence as markup, in which brackets mean something else."""
    error = SetupError(ConfigurationError('pip install "asyncmodels[openai]"'))
    assert str(error) == 'pip install "asyncmodels[openai]"'
    assert error.message == 'ERROR: pip install "asyncmodels\\[openai]"'


def test_names_of_both_kinds() -> None:
    """A slash after the scheme, as inspect_ai has it everywhere, or a colon, as load has it."""
    for name in ("openai/org/model:tag", "openai:org/model:tag"):
        api = api_of(get_model(f"asyncmodels/{name}", api_key="k", memoize=False))
        assert (api.model.model_id, api.canonical_name()) == ("org/model:tag", "openai/org/model:tag")


async def test_headers_of_the_configuration_are_sent(server: Server) -> None:
    """Headers are the model's; those of a single call cannot be had, and are not dropped."""
    place = server.script(Answer())
    config = GenerateConfig(extra_headers={"x-team": "red"})
    async with at_place(place, config=config) as model:
        await model.generate("Hi")
        assert place.seen().requests[0].header("x-team") == "red"
        with pytest.raises(RuntimeError, match="extra_headers belong to the model"):
            await model.generate("Hi", config=GenerateConfig(extra_headers={"x-team": "blue"}))


def test_trio_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect_ai can run on trio, and we cannot: the model is not even made."""
    monkeypatch.setenv("INSPECT_ASYNC_BACKEND", "trio")
    with pytest.raises(SetupError, match="asyncmodels runs on asyncio"):
        get_model("asyncmodels/openai/m", api_key="k", memoize=False)


def test_trio_that_nobody_announced_is_refused_in_the_call() -> None:
    """A call under trio's loop says what is wrong instead of failing somewhere inside."""
    trio = pytest.importorskip("trio")
    _, model = scripted("never")

    async def call() -> ModelOutput | tuple[Any, Any]:
        return await model.api.generate([ChatMessageUser(content="Hi")], [], "none", GenerateConfig())

    with pytest.raises(EventLoopError, match="asyncio"):
        trio.run(call)


def test_a_model_made_in_python_is_named_in_the_log(tmp_path: Path) -> None:
    """inspect_model takes a model that no name stands for, and what is no model it refuses."""
    log = evaluated(task_of(1, scorer=includes()), scripted("Hello")[1], tmp_path)
    assert log.eval.model == "asyncmodels/scripted"
    with pytest.raises(ConfigurationError, match="inspect_model takes a Model of asyncmodels, not str"):
        inspect_model("openai:gpt-5")  # type: ignore[arg-type]  # the mistake


def test_closing_inspects_model_closes_ours() -> None:
    """``async with get_model(...)`` releases what the model holds."""

    async def main() -> None:
        async with inspect_model(Model(ScriptedBackend("Hello"))) as model:
            await model.generate("Hi")
        assert "(closed)" in repr(api_of(model).model)

    asyncio.run(main())
