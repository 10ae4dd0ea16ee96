"""lm-eval, the real package, on models of ours that answer from a script."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from asyncmodels.backend import Capabilities
from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    ConfigurationError,
    InvalidRequestError,
    ModelLoadError,
    ServerError,
    UnsupportedError,
)
from asyncmodels.integrations.lm_eval import AsyncModelsLM
from asyncmodels.integrations.lm_eval_requests import Conversation, generation
from asyncmodels.model import Model
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.testing import EVERYTHING, ScriptedBackend
from asyncmodels.types import Message, Request, Response, TokenLogprob
from tests.integrations.lm_eval_tasks import DOCS, evaluate, write_tasks
from tests.local.tiny import build_tokenizer
from tests.server.handle import Server
from tests.server.plain_completion import logprob_of
from tests.server.script import Answer


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


def reply(request: Request) -> Response:
    """Scores by length, the shortest first, and answers with the prompt's last word."""
    if request.score is None:
        return Response(content=f" {request.messages[-1].text.split()[-1]}", finish_reason="stop")
    continuation = request.score.continuation
    assert isinstance(continuation, str)
    tokens = tuple(
        TokenLogprob(letter, -1.0, ((letter, -1.0),) if letter.isalpha() else (("?", -0.5),)) for letter in continuation
    )
    return Response(logprobs=tokens, finish_reason="stop")


def scripted(**settings: Any) -> AsyncModelsLM:
    return AsyncModelsLM(Model(ScriptedBackend(reply, capabilities=EVERYTHING, repeat=True)), **settings)


def seen(lm: AsyncModelsLM) -> list[Request]:
    backend = lm.model.backend
    assert isinstance(backend, ScriptedBackend)
    return backend.requests


def asking(kind: str, *args: Any) -> Instance:
    return Instance(kind, {}, args, 0)


# -- the three kinds of requests, in the real evaluator ---------------------------------------------------------------


def test_multiple_choice(tasks: Path) -> None:
    """Each choice is scored behind the question, and the most likely one is the answer."""
    lm = scripted()
    found = evaluate(lm, tasks, "am_choice", log_samples=True)

    right = 0
    for question in DOCS:
        choices: list[str] = question["choices"]
        right += min(range(len(choices)), key=lambda index, choices=choices: len(choices[index])) == question["gold"]  # type: ignore[misc]  # bound early
    assert found["results"]["am_choice"]["acc,none"] == right / len(DOCS)
    scores = {(request.score.prompt, request.score.continuation) for request in seen(lm) if request.score}
    assert ("Question: What do bees make?\nAnswer:", " a lot of wool") in scores
    assert len(scores) == len(seen(lm)) == sum(len(question["choices"]) for question in DOCS)


def test_generate_until(tasks: Path) -> None:
    """Prompts are generated from greedily, up to the stops and lengths that the task names."""
    lm = scripted()
    found = evaluate(lm, tasks, "am_generate", log_samples=True)

    samples = found["samples"]["am_generate"]
    assert [sample["resps"] for sample in samples] == [[[" Answer:"]]] * len(DOCS)
    (request, *_) = seen(lm)
    assert (request.stop_sequences, request.max_tokens, request.temperature) == (("\n", "."), 12, 0.0)
    assert request.messages[-1].text.endswith("\nAnswer:")


def test_chat_templates_of_the_provider(tasks: Path) -> None:
    """Where there is no tokenizer, the provider gets messages, for answers and for scores, which caches can write."""
    lm = scripted()
    settings = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    evaluate(lm, tasks, "am_generate", "am_choice", use_cache=str(tasks / "cache"), **settings)

    scores = [request for request in seen(lm) if request.score is not None]
    answers = [request for request in seen(lm) if request.score is None]
    for request in (scores[0], answers[0]):
        assert request.messages[0] == Message("system", "Be brief.")
        assert request.messages[1].role == "user"
        assert request.messages[1].text.startswith("Question: ")
    assert {request.score.prompt for request in scores if request.score} == {None}
    again = scripted()
    evaluate(again, tasks, "am_generate", "am_choice", use_cache=str(tasks / "cache"), **settings)
    assert seen(again) == []


async def test_inside_of_a_running_loop(tasks: Path) -> None:
    """In a notebook, whose loop is running, an evaluation works, on a thread of its own or not."""
    before = scripted().loglikelihood([asking("loglikelihood", "a", " b")], disable_tqdm=True)
    assert before == [(-2.0, False)]
    found = await asyncio.to_thread(evaluate, scripted(), tasks, "am_choice")
    assert found["results"]["am_choice"]["acc,none"] == 0.5


def test_the_longest_goes_first() -> None:
    """What takes longest begins first, and results are in the order of the requests."""
    order: list[int] = []

    async def answer(messages: list[dict[str, Any]], temperature: float, max_tokens: int) -> str:
        order.append(len(messages[-1]["content"]))
        return str(messages[-1]["content"]).upper()

    lm = AsyncModelsLM(CallableModel(answer), concurrency=1)
    prompts = ["a" * (index * 7 % 30 + 1) for index in range(30)]
    found = lm.generate_until([asking("generate_until", prompt, {}) for prompt in prompts], disable_tqdm=True)

    assert found == [prompt.upper() for prompt in prompts]
    assert order == sorted(order, reverse=True)


def test_all_are_in_flight_at_once() -> None:
    """A list is not worked off in groups: as many as may be are with the model at the same time."""
    meeting = asyncio.Barrier(40)

    async def answer(messages: list[dict[str, Any]], temperature: float, max_tokens: int) -> str:
        await meeting.wait()
        return "ok"

    lm = AsyncModelsLM(CallableModel(answer), concurrency="40")
    kwargs = ({"until": ["a"]}, {"until": ["b"], "max_gen_toks": 7})
    found = lm.generate_until([asking("generate_until", "x", kwargs[i % 2]) for i in range(40)], disable_tqdm=True)
    assert found == ["ok"] * 40


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_the_same_at_concurrency_1_and_256(kind: str) -> None:
    """How many are in flight changes no result."""
    args = {"generate_until": {"until": ["z"]}, "loglikelihood": " bc"}[kind]
    requests = [asking(kind, f"prompt {index}", args) for index in range(300)]
    one, many = (getattr(scripted(concurrency=count), kind)(requests, disable_tqdm=True) for count in (1, 256))
    assert one == many


def test_a_completions_endpoint(server: Server, tasks: Path) -> None:
    """Contexts and continuations are sent as texts, and their scores read from what the server echoes."""
    place = server.script(Answer(content=" x"))
    model = OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k", api="completions")
    lm = AsyncModelsLM(model)
    found = evaluate(lm, tasks, "am_choice", "am_generate", log_samples=True)
    lm.close()

    sample = found["samples"]["am_choice"][1]
    assert [float(logprob) for logprob, _ in sample["filtered_resps"]] == [
        sum(logprob_of(f" {word}") for word in choice.split()) for choice in DOCS[1]["choices"]
    ]
    prompts = {request.json()["prompt"] for request in place.seen().requests}
    assert "Question: What do bees make?\nAnswer: honey" in prompts
    assert "Question: What do bees make?\nAnswer:" in prompts


def test_a_completions_endpoint_in_tokens(server: Server, tmp_path: Path) -> None:
    """With a tokenizer, tokens are sent, windows of long texts can be scored, and chat templates are applied here."""
    build_tokenizer().save_pretrained(tmp_path)
    place = server.script(Answer(content=" x"))
    model = OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k", api="completions")
    lm = AsyncModelsLM(model, tokenizer=str(tmp_path), max_length=8)
    ids = lm.tok_encode("ab c")
    scored = lm.loglikelihood([asking("loglikelihood", "ab", " c")], disable_tqdm=True)
    rolled = lm.loglikelihood_rolling([asking("loglikelihood_rolling", "abcdefghijkl")], disable_tqdm=True)
    chat = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    lm.generate_until([asking("generate_until", chat, {})], disable_tqdm=True)
    lm.close()

    assert scored == [(sum(logprob_of(f" {token}") for token in ids[2:]), False)]
    assert rolled == [sum(logprob_of(f" {token}") for token in lm.tok_encode("abcdefghijkl"))]
    prompts = [request.json()["prompt"] for request in place.seen().requests]
    assert prompts[0] == ids
    assert max(len(prompt) for prompt in prompts[1:-1]) == 7  # and one is generated
    assert prompts[-1] == chat == "<|start|>user\nHi<|end|><|start|>assistant\n"


def test_a_completions_endpoint_has_no_template(server: Server) -> None:
    """A chat template cannot be left to a server that has none; the sentence says what is missing."""
    model = OpenAIModel("m", api_base=f"{server.script().url}/v1", api_key="k", api="completions")
    with pytest.raises(ConfigurationError, match="has no tokenizer here"):
        AsyncModelsLM(model).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_tokenizer_beside_the_providers_own() -> None:
    """A chat model applies its own template: prompts that were made of tokens here would be wrapped a second time."""
    backend = ScriptedBackend(reply, capabilities=Capabilities())
    with pytest.raises(ConfigurationError, match="tokenizer is for models that read plain prompts"):
        AsyncModelsLM(Model(backend), tokenizer="somewhere")


# -- caches and errors ------------------------------------------------------------------------------------------------


def test_what_was_answered_is_kept_when_a_run_breaks(tasks: Path) -> None:
    """Each answer goes into lm-eval's cache as it comes, so that an evaluation goes on where it ended."""
    asked: list[str] = []

    def failing(request: Request) -> Response:
        asked.append(request.messages[-1].text)
        if len(asked) > 2:
            raise ServerError("the third is one too many")
        return reply(request)

    cache = str(tasks / "cache")
    broken = AsyncModelsLM(Model(ScriptedBackend(failing, repeat=True)), concurrency=1)
    with pytest.raises(ServerError, match="one too many"):
        evaluate(broken, tasks, "am_generate", use_cache=cache)
    rest = scripted()
    evaluate(rest, tasks, "am_generate", use_cache=cache)

    assert len(seen(rest)) == len(DOCS) - 2
    assert not set(asked[:2]) & {request.messages[-1].text for request in seen(rest)}


def test_the_keys_are_those_that_lm_eval_looks_for(tasks: Path) -> None:
    """A second evaluation of all kinds of tasks asks nothing."""
    cache = str(tasks / "cache")
    first, second = scripted(), scripted()
    results = [evaluate(lm, tasks, "am_choice", "am_generate", use_cache=cache)["results"] for lm in (first, second)]

    assert len(seen(first)) > 0
    assert seen(second) == []
    assert results[0] == results[1]


def test_a_request_that_fails_for_good_ends_the_evaluation() -> None:
    """Unless told otherwise, the first error comes out as it is."""
    lm = AsyncModelsLM(Model(ScriptedBackend(ServerError("no"), repeat=True)))
    with pytest.raises(ServerError, match="no"):
        lm.generate_until([asking("generate_until", "a", {})], disable_tqdm=True)


def test_what_failed_is_not_kept_as_wrong(tasks: Path) -> None:
    """lm-eval's cache would hand it out for good."""
    lm = AsyncModelsLM(Model(ScriptedBackend(reply, repeat=True)), on_error="wrong")
    with pytest.raises(ConfigurationError, match="do not go together"):
        evaluate(lm, tasks, "am_generate", use_cache=str(tasks / "kept"))


def test_a_request_that_fails_for_good_can_count_as_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """With on_error="wrong" the others have their answers, and the log says how many have none."""

    def some(request: Request) -> Response:
        text = request.score.prompt if request.score else request.messages[-1].text
        if "bad" in str(text):
            raise InvalidRequestError("this one never works")
        return reply(request)

    lm = AsyncModelsLM(Model(ScriptedBackend(some, repeat=True)), on_error="wrong")
    with caplog.at_level(logging.WARNING):
        texts = lm.generate_until([asking("generate_until", text, {}) for text in ("bad", "good")], disable_tqdm=True)
        scores = lm.loglikelihood([asking("loglikelihood", text, " a") for text in ("good", "bad")], disable_tqdm=True)

    assert texts == ["", " good"]
    assert scores == [(-2.0, False), (float("-inf"), False)]
    assert "1 of 2 generate_until requests failed and count as wrong" in caplog.text
    assert "this one never works" in caplog.text


def test_the_models_own_retries_come_first() -> None:
    """An error that passes by is retried by the model's chain, and lm-eval never hears of it."""
    backend = ScriptedBackend(ServerError("once"), " yes")
    lm = AsyncModelsLM(Model(backend, Retry))
    assert lm.generate_until([asking("generate_until", "a", {})], disable_tqdm=True) == [" yes"]


def test_no_content_is_an_empty_answer() -> None:
    """A model that says nothing has said nothing, and not None."""
    lm = AsyncModelsLM(Model(ScriptedBackend(Response(content=None, finish_reason="stop"))))
    assert lm.generate_until([asking("generate_until", "a", {})], disable_tqdm=True) == [""]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, 'on_error must be "raise" or "wrong"'),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1"),
        ({"concurrency": "many"}, "concurrency must be a whole number"),
        ({"max_gen_toks": True}, "max_gen_toks must be a whole number"),
        ({"max_length": 1}, "max_length must be a whole number of at least 2"),
        ({"add_bos_token": "yes"}, "add_bos_token must be True or False"),
        ({"temperatur": 1}, "A model that was made already takes no temperatur"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    """Each is refused in one sentence, when the model is made."""
    with pytest.raises(ConfigurationError, match=message):
        scripted(**settings)


@pytest.mark.parametrize("model", ["", None, 3])
def test_a_model_that_is_none(model: Any) -> None:
    """What is no model and no name is refused with an example of one."""
    with pytest.raises(ConfigurationError, match="needs a Model or the name of one, as in --model_args"):
        AsyncModelsLM(model)


def test_a_model_without_scores_says_what_has_them() -> None:
    """A chat model cannot be asked for log-likelihoods, and the sentence names what can."""
    lm = AsyncModelsLM(Model(ScriptedBackend(reply, capabilities=Capabilities())))
    for ask in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(UnsupportedError, match='api="completions"'):
            ask([asking("loglikelihood", "a", " b")])


def test_rolling_needs_tokens() -> None:
    """A text is scored in windows of tokens, for which there must be a tokenizer."""
    with pytest.raises(ConfigurationError, match=r"has no tokenizer here.*tokenizer=HuggingFaceTB"):
        scripted().loglikelihood_rolling([asking("loglikelihood_rolling", "some text")])


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    """A wrong folder is one sentence, when it is first needed."""
    lm = scripted(tokenizer=str(tmp_path / "nothing"))
    with pytest.raises(ModelLoadError, match="nothing' could not be loaded"):
        lm.loglikelihood([asking("loglikelihood", "a", " b")])


def test_images_are_refused() -> None:
    """A task with pictures is not asked as if it had none."""
    with pytest.raises(UnsupportedError, match="images or sound"):
        scripted().generate_until([asking("generate_until", "a", {}, {"visual": []})])


# -- translations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({}, {"stop_sequences": [], "max_tokens": 256, "temperature": 0.0}),
        ({"until": "a", "max_gen_toks": "7"}, {"stop_sequences": ["a"], "max_tokens": 7, "temperature": 0.0}),
        (
            {"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9},
            {"stop_sequences": ["a"], "max_tokens": 256, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"do_sample": False, "temperature": 0.7}, {"stop_sequences": [], "max_tokens": 256, "temperature": 0.0}),
        ({"temperature": 0.7}, {"stop_sequences": [], "max_tokens": 256, "temperature": 0.7}),
        ({"do_sample": True}, {"stop_sequences": [], "max_tokens": 256}),
        ({"max_new_tokens": 5, "top_k": 0}, {"stop_sequences": [], "max_tokens": 5, "temperature": 0.0}),
        (
            {"reasoning_effort": "low", "num_beams": 1},
            {"stop_sequences": [], "max_tokens": 256, "temperature": 0.0, "extra": {"reasoning_effort": "low"}},
        ),
    ],
)
def test_generation_arguments(given: dict[str, Any], params: dict[str, Any]) -> None:
    """A task's words become ours, and the task's own dict stays as it was."""
    before = dict(given)
    assert generation(given, 256) == params
    assert given == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"until": 3}, ConfigurationError, "until must be"),
        ({"until": ["a", 3]}, ConfigurationError, "until must be"),
        ({"max_gen_toks": 0}, ConfigurationError, "max_gen_toks must be"),
        ({"max_gen_toks": "ten"}, ConfigurationError, "max_gen_toks must be"),
        ({"num_beams": 4}, UnsupportedError, "Beam search"),
    ],
)
def test_generation_arguments_that_cannot_be(given: dict[str, Any], error: type[Exception], message: str) -> None:
    """What a task asks for and nobody can do is said in one sentence."""
    with pytest.raises(error, match=message):
        generation(given, 256)


def test_a_model_without_a_temperature_is_still_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Tasks ask for greedy answers; a model that has no temperature answers as it pleases, and the log says so."""
    backend = ScriptedBackend("yes", capabilities=Capabilities(sampling=frozenset({"max_tokens"})))
    with caplog.at_level(logging.WARNING):
        assert AsyncModelsLM(Model(backend)).generate_until([asking("generate_until", "a", {})]) == ["yes"]
    assert "takes no temperature" in caplog.text


def test_a_conversation_is_a_string_for_lm_eval() -> None:
    """Its JSON is what caches write, and the messages are what is sent."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}]
    told = Conversation.of(chat)

    assert json.loads(told) == chat
    assert "Grüße" in told
    assert told.messages == (Message("system", "Be brief."), Message("user", "Grüße"))
    assert scripted().apply_chat_template(chat) == told


# -- names ------------------------------------------------------------------------------------------------------------


def test_it_is_registered_beside_lm_evals_own() -> None:
    """The name is known, and so are still those that lm-eval brings."""
    assert get_model("asyncmodels") is AsyncModelsLM
    assert get_model("dummy").__module__ == "lm_eval.models.dummy"


def test_arguments_come_as_texts() -> None:
    """What a command line gives for the model and its settings is understood, lm-eval's own arguments included."""
    args = "model=openai:gpt-5,api_key=k,api_base=http://127.0.0.1:9/v1,concurrency=7,max_gen_toks=9,on_error=wrong"
    lm = AsyncModelsLM.create_from_arg_string(args, {"batch_size": "auto", "max_batch_size": None, "device": "cpu"})

    assert lm.model.model_id == "gpt-5"
    assert (lm.max_gen_toks, lm.tokenizer, lm.tokenizer_name, lm.max_length) == (9, None, "gpt-5", 2048)
    lm.close()


def test_the_module_is_lm_evals_command_line(tasks: Path) -> None:
    """Releases that look for no entry points get the model all the same."""
    words = ["run", "--model", "asyncmodels", "--model_args", "model=nonsense:x", "--tasks", "am_choice"]
    command = [sys.executable, "-m", "asyncmodels.integrations.lm_eval", *words, "--include_path", str(tasks)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert "UnknownSchemeError" in ended.stderr
    assert "nonsense" in ended.stderr
