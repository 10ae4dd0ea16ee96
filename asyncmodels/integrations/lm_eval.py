"""lm-eval on any model: ``--model asyncmodels --model_args model=transformers:...``, or ``AsyncModelsLM(model)``.

Importing this module registers the model with lm-eval. Releases of lm-eval from 0.4.14 on find it by themselves, as an
entry point; for those before, this module is the command line of lm-eval that knows it::

    python -m asyncmodels.integrations.lm_eval run --model asyncmodels --model_args model=smollm --tasks arc_easy

lm-eval's own ``--use_cache`` does not tell models apart: give each model a path of its own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import closing
from typing import Any, Literal, TypeVar

from asyncmodels.errors import ConfigurationError, MissingExtraError, ModelLoadError, UnsupportedError

try:
    import lm_eval.models  # noqa: F401  # lm-eval looks for its own models only while none is registered
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f'AsyncModelsLM needs the package {error.name!r}: pip install "asyncmodels[lm-eval]"'
    ) from error

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from asyncmodels.backend import links
from asyncmodels.integrations.lm_eval_requests import Conversation, Tokens, generation, whole
from asyncmodels.local.backend import EngineBackend
from asyncmodels.model import Model
from asyncmodels.registry import load
from asyncmodels.remote.completions import CompletionsBackend
from asyncmodels.scored import Scored
from asyncmodels.sync import blocking
from asyncmodels.types import Message, Request, Response, Score

__all__ = ["AsyncModelsLM"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DEFAULT_LENGTH = 2048
"""Tokens, where neither the model nor the caller says how long its context is; lm-eval's own default."""


@register_model("asyncmodels")
class AsyncModelsLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed for mypy --strict
    """A model of ours for lm-eval::

        simple_evaluate(model=AsyncModelsLM("transformers:HuggingFaceTB/SmolLM2-135M-Instruct"), tasks=["arc_easy"])

    ``model`` is any Model, which stays the caller's, or a name for ``asyncmodels.load``, which is given ``kwargs``.
    A local engine is asked in the tokens of its own tokenizer, exactly as lm-eval's ``hf`` model does it, prompts that
    are too long cut on the left included. Other models are sent texts; with ``tokenizer``, a folder or the name of a
    repository, those that read plain prompts (``api="completions"``) are asked in tokens, too. Log-likelihoods need a
    local engine or a completions endpoint that echoes log-probabilities; any model can generate. Chat templates are
    applied here where there is a tokenizer, and by the provider where there is none.

    All requests of a task are with the model at once, the longest first, at most ``concurrency`` of them in flight. It
    works in a notebook, whose event loop is running, too.

    ``on_error="raise"`` ends the evaluation with the first request that fails for good, after the model's own retries;
    what was answered until then is in lm-eval's cache, if it has one. ``"wrong"`` takes a request that fails for one
    that is answered wrongly ("" or minus infinity), and says in the log how many there were. Errors are those of
    asyncmodels.

    ``max_length`` is the context in tokens, ``max_gen_toks`` how many to generate where a task does not say,
    ``prefix_token_id`` stands before a text that has nothing before it, ``add_bos_token`` puts the tokenizer's special
    tokens before each text or leaves them out. ``batch_size`` and ``max_batch_size`` are lm-eval's words for how many
    rows a local engine that is loaded here works off together, ``device`` for where a Transformers model runs.
    """

    def __init__(
        self,
        model: str | Model,
        *,
        tokenizer: str | None = None,
        concurrency: int | str = 1000,
        on_error: Literal["raise", "wrong"] = "raise",
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        prefix_token_id: int | str | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "wrong"):
            raise ConfigurationError(f'on_error must be "raise" or "wrong", not {on_error!r}.')
        if not isinstance(add_bos_token, bool | None):
            raise ConfigurationError(f"add_bos_token must be True or False, not {add_bos_token!r}.")
        self._on_error = on_error
        self._concurrency = whole("concurrency", concurrency, least=1)
        self._max_gen_toks = whole("max_gen_toks", max_gen_toks, least=1)
        self._prefix_token_id = None if prefix_token_id is None else whole("prefix_token_id", prefix_token_id)
        self._max_length = None if max_length is None else whole("max_length", max_length, least=2)
        self._add_bos_token = add_bos_token
        self.model = _model(model, batch_size, max_batch_size, device, kwargs)
        self._engine = next((link for link in links(self.model) if isinstance(link, EngineBackend)), None)
        self._plain = any(isinstance(link, CompletionsBackend) for link in links(self.model))
        if self._engine is not None and tokenizer is not None:
            raise ConfigurationError("A local model has its own tokenizer; leave tokenizer out.")
        if tokenizer is not None and not self.model.capabilities.scores:
            raise ConfigurationError(
                "tokenizer is for models that read plain prompts, such as those of a completions endpoint "
                f'(api="completions"); {self.model!r} applies a chat template of its own.'
            )
        self._tokenizer_id = tokenizer
        self._tokenizer: Any = None

    # -- what lm-eval asks of the model -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """This object's own tokenizer, in the shape of Hugging Face's; None where the model has none here."""
        if self._tokenizer is None:
            if self._engine is not None:
                self._tokenizer = copy.deepcopy(self._info().tokenizer)
            elif self._tokenizer_id is not None:
                self._tokenizer = _tokenizer(self._tokenizer_id)
        return self._tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer_id or self.model.model_id or type(self.model.backend).__name__).replace("/", "__")

    @property
    def max_length(self) -> int:
        """How many tokens the model can read."""
        if self._max_length is None:
            self._max_length = _DEFAULT_LENGTH if self._engine is None else int(self._info().context_length)
        return self._max_length

    @property
    def _readable(self) -> int:
        """How many tokens can be read for a score: some servers read the last one, too, and want to generate one."""
        if self._engine is None:
            return max(1, self.max_length - 2)
        info = self._info()
        return min(self.max_length, max(1, int(info.context_length) - int(info.scored_room)))

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return int(self._needed_tokenizer().eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self._needed_tokenizer().bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm-eval's ``hf`` model: with the special tokens of the tokenizer, unless ``string`` begins with one."""
        tokenizer = self._needed_tokenizer()
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(tokenizer.decode([self.prefix_token_id])):
            special = False
        settings = {} if special is None else {"add_special_tokens": special}
        tokens: list[int] = tokenizer(string, verbose=False, **settings)["input_ids"]
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer is None and not self._plain:
            return Conversation.of(chat_history)
        from jinja2.exceptions import TemplateError

        settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text: str = self._needed_tokenizer().apply_chat_template(chat_history, tokenize=False, **settings)
        except TemplateError:
            logger.warning("The chat template refuses the messages as they are; the system message is left out.")
            rest = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(rest, tokenize=False, **settings)
        return text

    # -- its three kinds of requests ----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._check_scores()
        if self.tokenizer is not None:
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return scores
        asked = []
        for request in requests:
            context, continuation = request.args
            messages = context.messages if isinstance(context, Conversation) else ()
            prompt = None if messages else context
            asked.append(Request(messages=messages, score=Score(continuation, prompt)))
        order = sorted(range(len(asked)), key=lambda index: (-len(requests[index].args[0]), requests[index].args[0]))
        return self._ask(
            asked,
            order,
            "loglikelihood",
            lambda index, answer: self._keep("loglikelihood", requests[index].args, _pair(answer)),
            disable_tqdm,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = [self._score(context, continuation) for _, context, continuation in requests]

        def keep(index: int, answer: Response | None) -> tuple[float, bool]:
            key = requests[index][0]
            return _pair(answer) if key is None else self._keep("loglikelihood", key, _pair(answer))

        # What continues the same context stays together, so that an engine reads that once.
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index][1]), requests[index][1]))
        return self._ask(asked, order, "loglikelihood", keep, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._check_scores()
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [pair for each in windows for pair in each]
        found = iter(self._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=disable_tqdm))
        return [
            self._keep("loglikelihood_rolling", request.args, sum(next(found)[0] for _ in each))
            for request, each in zip(requests, windows, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._generation(*_two(request.args)) for request in requests]
        order = sorted(range(len(asked)), key=lambda index: (-len(requests[index].args[0]), requests[index].args[0]))

        def keep(index: int, answer: Response | None) -> str:
            text = "" if answer is None else answer.content or ""
            return self._keep("generate_until", requests[index].args, text)

        return self._ask(asked, order, "generate_until", keep, disable_tqdm)

    def close(self) -> None:
        """Closes the model; for one that came as an object, that is the caller's to do."""
        self.model.sync.close()

    # -- asking -------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        requests: Rows[Request],
        order: list[int],
        kind: str,
        keep: Callable[[int, Response | None], T],
        disable_tqdm: bool,
    ) -> list[T]:
        """Asks all of them in this order, and gives what ``keep`` makes of the answers, or of None for a failure."""
        if self._on_error == "wrong" and getattr(self.cache_hook, "dbdict", None) is not None:
            raise ConfigurationError(
                'on_error="wrong" and lm-eval\'s cache do not go together: what failed once would be kept as a wrong '
                'answer for good. Use on_error="raise" with the cache: what has been answered is not asked again.'
            )
        results: dict[int, T] = {}
        failures: list[Exception] = []
        inputs = [requests[index] for index in order]
        run = self.model.sync.map(
            inputs, concurrency=self._concurrency, schedule="input", on_error=self._errors(), progress=False
        )
        bar = tqdm(total=len(inputs), desc=f"Running {kind} requests", disable=disable_tqdm)
        with closing(run), closing(bar):
            for item in run:
                if item.error is not None:
                    failures.append(item.error)
                results[order[item.index]] = keep(order[item.index], item.response)
                bar.update()
        if failures:
            logger.warning(
                "%d of %d %s requests failed and count as wrong; the last error is %s: %s",
                len(failures),
                len(inputs),
                kind,
                type(failures[-1]).__name__,
                failures[-1],
            )
        return [results[index] for index in range(len(requests))]

    def _errors(self) -> str:
        return "raise" if self._on_error == "raise" else "yield"

    def _keep(self, kind: str, key: Any, result: T) -> T:
        """Puts a result into lm-eval's cache, if it has one."""
        self.cache_hook.add_partial(kind, key, result)
        return result

    def _check_scores(self) -> None:
        if not self.model.capabilities.scores:
            raise UnsupportedError(
                f"{self.model!r} does not tell the log-probability of a given continuation, which loglikelihood tasks "
                'ask for: use a local engine ("transformers:...", "vllm:..."), a completions endpoint '
                '(OpenAIModel(..., api="completions")), or tasks that generate.'
            )

    def _score(self, context: list[int], continuation: list[int]) -> Request:
        if not continuation:
            raise ConfigurationError("A task asks for the log-likelihood of a continuation that has no tokens.")
        # One more than is read: nobody asks what comes after the last one.
        room = max(1, self._readable + 1 - len(continuation))
        if len(context) > room:
            logger.warning("A context of %d tokens is cut to its last %d.", len(context), room)
        return Request(messages=(), score=Score(tuple(continuation), tuple(context[-room:])))

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows: Iterator[tuple[list[int], list[int]]] = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._readable,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _generation(self, context: str, gen_kwargs: Mapping[str, Any]) -> Request:
        params = generation(gen_kwargs, self._max_gen_toks)
        if params.get("temperature") == 0.0 and "temperature" not in self.model.capabilities.sampling:
            # Tasks ask for greedy answers as a matter of course; some models have no such choice.
            logger.warning("%r takes no temperature: its answers are not greedy.", self.model)
            del params["temperature"]
        if isinstance(context, Conversation):
            return self.model.request(list(context.messages), **params)
        if self._engine is not None:
            room = self.max_length - params["max_tokens"]
            if room < 1:
                raise ConfigurationError(
                    f"A task asks for {params['max_tokens']} tokens, and the model's context has {self.max_length}."
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if len(tokens) > room:
                logger.warning("A prompt of %d tokens is cut to its last %d.", len(tokens), room)
            extra: Tokens = {"prompt_token_ids": tokens[-room:]}
            params["extra"] = {**params.get("extra", {}), **extra}
        return self.model.request([Message("user", context)], **params)

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ConfigurationError(
                f"{self.model!r} has no tokenizer here, and this task needs one: give its folder or repository, "
                "as in --model_args model=...,tokenizer=HuggingFaceTB/SmolLM2-135M."
            )
        return self.tokenizer

    def _info(self) -> Any:
        assert self._engine is not None  # noqa: S101  # callers look
        if self._engine.engine.info is None:
            blocking(self._engine.load)
        return self._engine.engine.info


def _pair(answer: Response | None) -> tuple[float, bool]:
    if answer is None:
        return float("-inf"), False
    scored = Scored.of(answer)
    return scored.logprob, scored.greedy


def _two(args: tuple[Any, ...]) -> tuple[str, Mapping[str, Any]]:
    if len(args) != 2:
        raise UnsupportedError("Tasks with images or sound are not supported: AsyncModelsLM reads texts.")
    context, gen_kwargs = args
    if not isinstance(gen_kwargs, Mapping):
        raise ConfigurationError(f"A task's generation_kwargs must be a mapping, not {gen_kwargs!r}.")
    return context, gen_kwargs


def _model(
    model: str | Model,
    batch_size: int | str | None,
    max_batch_size: int | str | None,
    device: str | None,
    kwargs: dict[str, Any],
) -> Model:
    if isinstance(model, Model):
        if kwargs:
            raise ConfigurationError(f"A model that was made already takes no {', '.join(sorted(kwargs))}.")
        return model
    if not isinstance(model, str) or not model:
        raise ConfigurationError(
            f"AsyncModelsLM needs a Model or the name of one, as in --model_args model=transformers:..., not {model!r}."
        )
    scheme = model.partition(":")[0]
    if scheme in ("transformers", "smollm", "vllm", "mlx"):
        rows = next((size for size in (max_batch_size, batch_size) if size not in (None, "auto", 1, "1")), None)
        if rows is not None:
            kwargs.setdefault("max_batch_size", whole("batch_size", str(rows).partition(":")[0], least=1))
    if device is not None and scheme in ("transformers", "smollm"):
        kwargs.setdefault("device_map", device)
    return load(model, **kwargs)


def _tokenizer(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError("tokenizer needs the package 'transformers': pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a tokenizer's files can bring about
        line = str(error).strip().partition("\n")[0]
        raise ModelLoadError(f"The tokenizer {source!r} could not be loaded: {line}") from error


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
