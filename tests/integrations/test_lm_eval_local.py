"""lm-eval on our Transformers engine: the numbers and words of lm-eval's own ``hf`` model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from asyncmodels.errors import ConfigurationError, ContextLengthError
from asyncmodels.integrations.lm_eval import AsyncModelsLM
from asyncmodels.local.smollm import SmolLMModel, smollm_path
from asyncmodels.local.transformers import TransformersModel
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from tests.integrations.lm_eval_tasks import DOCS, evaluate, write_tasks
from tests.local.on_torch.tiny_llama import tiny_model_folder

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

# lm-eval's own model, and what it asks of transformers, is not ours to mend.
theirs = pytest.mark.filterwarnings("default")

Pair = tuple[str, str]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(tiny_model_folder())


@pytest.fixture(scope="module")
def hf(folder: str) -> Any:
    return HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4, max_length=256)


@pytest.fixture(scope="module")
def lm(folder: str) -> Iterator[AsyncModelsLM]:
    made = AsyncModelsLM(f"transformers:{folder}", torch_dtype="float32", max_length="256", max_gen_toks=32)
    yield made
    made.close()


def asking(kind: str, *args: Any) -> Instance:
    return Instance(kind, {}, args, 0)


def some_text(chance: random.Random, length: int) -> str:
    words = " ".join(chance.choice(["sea", "glass", "bread", "a", "über", "bees ", "\n12"]) for _ in range(length))
    return words[:length].strip() or "x"


def pairs() -> list[Pair]:
    """Contexts of all lengths, some too long, some empty, some that end in spaces, with several continuations each."""
    chance = random.Random(0)
    found: list[Pair] = [("", "abc"), ("", "a"), ("x ", "y"), ("same  ", " same")]
    for length in (1, 5, 30, 60, 200, 250, 300, 400):
        context = some_text(chance, length)
        found += [(context, f" {some_text(chance, count)}") for count in (1, 2, 9, 40)]
    return found


@theirs
def test_loglikelihoods(lm: AsyncModelsLM, hf: Any) -> None:
    """Sums and what is greedy are those of hf, for contexts that are cut on the left, too."""
    requests = [asking("loglikelihood", *pair) for pair in pairs()]
    ours, wanted = (each.loglikelihood(requests, disable_tqdm=True) for each in (lm, hf))

    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in wanted]


@theirs
def test_greedy_is_what_it_says(lm: AsyncModelsLM) -> None:
    """The first token that the model generates is greedy, and another one is not."""
    (text,) = lm.generate_until([asking("generate_until", "tell me", {"max_gen_toks": 1})], disable_tqdm=True)
    requests = [asking("loglikelihood", "tell me", each) for each in (text, "~" if text != "~" else "!")]
    assert [greedy for _, greedy in lm.loglikelihood(requests, disable_tqdm=True)] == [text.isascii(), False]


@theirs
def test_rolling_loglikelihoods(lm: AsyncModelsLM, hf: Any) -> None:
    """Texts of several windows have the sum that hf finds, and each goes into the cache once."""
    chance = random.Random(1)
    kept: list[Any] = []
    requests = [asking("loglikelihood_rolling", some_text(chance, length)) for length in (1, 20, 255, 256, 257, 900)]
    wanted = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    lm.set_cache_hook(type("Hook", (), {"add_partial": lambda _, *args: kept.append(args)})())
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    lm.set_cache_hook(AsyncModelsLM("openai:x", api_key="k").cache_hook)

    assert ours == pytest.approx(wanted, abs=1e-2, rel=1e-5)
    assert kept == [
        ("loglikelihood_rolling", request.args, value) for request, value in zip(requests, ours, strict=True)
    ]


@theirs
def test_plain_prompts_are_generated_from(lm: AsyncModelsLM, hf: Any) -> None:
    """Without --apply_chat_template the model reads the text as it is, as with hf, and too long ones are cut."""
    chance = random.Random(2)
    kwargs = {"until": ["Q"], "max_gen_toks": 20, "do_sample": False}
    requests = [asking("generate_until", some_text(chance, length), kwargs) for length in (3, 50, 90, 230)]
    (nothing,) = lm.generate_until([asking("generate_until", "", kwargs)], disable_tqdm=True)
    assert nothing == lm.generate_until([asking("generate_until", "<|start|>", kwargs)], disable_tqdm=True)[0]
    requests.append(asking("generate_until", some_text(chance, 300), {**kwargs, "max_gen_toks": 30}))

    assert [len(lm.tok_encode(request.args[0])) > 226 for request in requests] == [False, False, False, True, True]
    # One at a time, because hf pads what it batches.
    wanted = [hf.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert lm.generate_until(requests, disable_tqdm=True) == wanted


@theirs
def test_chat_templates(lm: AsyncModelsLM, hf: Any, tmp_path: Path) -> None:
    """The model's own template makes the same prompts as hf's, for answers and for scores."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for begun in (True, False):
        assert lm.apply_chat_template(chat, begun) == hf.apply_chat_template(chat, begun)
    assert lm.chat_template(True) == hf.chat_template(True)
    write_tasks(tmp_path)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True, "log_samples": True}
    ours, wanted = (evaluate(each, tmp_path, "am_choice", "am_generate", **settings) for each in (lm, hf))
    assert ours["results"]["am_choice"] == wanted["results"]["am_choice"]
    texts = [[sample["resps"] for sample in found["samples"]["am_generate"]] for found in (ours, wanted)]
    assert texts[0] == texts[1]


@theirs
def test_the_evaluator_with_names_alone(folder: str, hf: Any, tmp_path: Path) -> None:
    """As the command line does it: the model by its name, its arguments as one text, and all kinds of tasks."""
    write_tasks(tmp_path)
    tasks = ("am_choice", "am_rolling")
    args = f"model=transformers:{folder},torch_dtype=float32,max_length=256"
    ours = evaluate("asyncmodels", tmp_path, *tasks, model_args=args, batch_size=16, device="cpu")
    wanted = evaluate(hf, tmp_path, *tasks)

    for task, metric in (("am_choice", "acc_norm,none"), ("am_rolling", "word_perplexity,none")):
        assert ours["results"][task][metric] == pytest.approx(wanted["results"][task][metric], rel=1e-3)


def test_the_same_at_concurrency_1_and_256(folder: str) -> None:
    """How many requests are in flight changes no number beyond its rounding."""
    requests = [asking("loglikelihood", *pair) for pair in pairs()]
    found = []
    for concurrency in (1, 256):
        made = AsyncModelsLM(f"transformers:{folder}", torch_dtype="float32", max_length=256, concurrency=concurrency)
        found.append(made.loglikelihood(requests, disable_tqdm=True))
        made.close()
    one, many = found
    assert [logprob for logprob, _ in one] == pytest.approx([logprob for logprob, _ in many], abs=1e-3)
    assert [greedy for _, greedy in one] == [greedy for _, greedy in many]


async def test_a_model_that_is_there_already(folder: str) -> None:
    """A model in use is used, through its policies and inside of a running loop, and stays open."""
    async with TransformersModel(folder, torch_dtype="float32") as model:
        lm = AsyncModelsLM(Model(model, partial(Concurrency, limit=8)))
        request = asking("loglikelihood", "one", " two")
        (here,) = lm.loglikelihood([request], disable_tqdm=True)
        direct = await model.score("one", " two")
        (there,), _ = await asyncio.gather(asyncio.to_thread(lm.loglikelihood, [request]), model.generate("Hi"))
        assert lm.max_length == 1024

    for logprob, greedy in (here, there):
        assert logprob == pytest.approx(direct.logprob, abs=1e-4)
        assert greedy == direct.greedy


def test_one_request_that_does_not_fit(folder: str) -> None:
    """A context is cut, whatever max_length says; a continuation that no context holds is an error of its request."""
    cut, short = asking("loglikelihood", "x" * 1100, " y"), asking("loglikelihood", "x", " y")
    long = asking("loglikelihood", "x", " y" * 600)
    made = AsyncModelsLM(f"transformers:{folder}", max_length=5000)
    with pytest.raises(ContextLengthError):
        made.loglikelihood([short, long], disable_tqdm=True)
    made.close()
    made = AsyncModelsLM(f"transformers:{folder}", max_length=5000, on_error="wrong")
    scores = [logprob for logprob, _ in made.loglikelihood([short, long, cut], disable_tqdm=True)]
    made.close()
    assert scores[1] == float("-inf") < min(scores[0], scores[2])


def test_a_tokenizer_for_what_has_one(folder: str) -> None:
    """A local model's own tokenizer is the one that counts."""
    with pytest.raises(ConfigurationError, match="has its own tokenizer"):
        AsyncModelsLM(f"transformers:{folder}", tokenizer=folder)


@theirs
def test_smollm2(tmp_path: Path) -> None:
    """With real weights, log-likelihoods are those of hf to a thousandth."""
    write_tasks(tmp_path, DOCS * 2)
    hf = HFLM(pretrained=str(smollm_path()), dtype="float32", device="cpu", batch_size=4)
    lm = AsyncModelsLM(SmolLMModel(torch_dtype="float32"))
    found = [evaluate(each, tmp_path, "am_choice", log_samples=True) for each in (lm, hf)]
    lm.close()

    ours, wanted = (
        [float(pair[0]) for sample in each["samples"]["am_choice"] for pair in sample["filtered_resps"]]
        for each in found
    )
    assert ours == pytest.approx(wanted, abs=1e-3)
    assert found[0]["results"]["am_choice"] == found[1]["results"]["am_choice"]
