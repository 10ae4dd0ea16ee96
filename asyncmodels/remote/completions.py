"""The old completions API over the pool: a prompt as it is, without messages, at servers of base models (vLLM, SGLang).

Those of them that echo a prompt with its log-probabilities can score a given continuation. Where both are token ids it
is known which of the echoed tokens are the continuation; where both are texts, they are found by their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from asyncmodels.backend import Capabilities
from asyncmodels.errors import InvalidRequestError, InvalidResponseError, UnsupportedError
from asyncmodels.remote.answer import Read
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.fields import shape
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.wire import ChunkReader, request_body, response_from
from asyncmodels.types import Delta, Request, Response, Score, TextPart, TokenLogprob, evolve

__all__ = ["CompletionsBackend", "completions_capabilities"]


def completions_capabilities(quirks: Quirks) -> Capabilities:
    """What a completions endpoint with ``quirks`` can do."""
    return replace(
        capabilities_of(quirks),
        tools=False,
        tool_choice=frozenset({"auto", "none"}),
        images=False,
        provider_parts=False,
        response_format=False,
        grammars=frozenset(),
        scores=True,
    )


def completion_from(data: Any, *, request_id: str | None, service: float | None) -> Response:
    """The Response of a whole completion. Raises as ``response_from`` does."""
    return evolve(response_from(_as_chat(data, "message"), request_id=request_id, service=service), raw=data)


class CompletionReader(ChunkReader):
    """Turns the pieces of a streamed completion into Deltas."""

    def read(self, chunk: Any) -> Delta | None:
        return super().read(_as_chat(chunk, "delta"))


class CompletionsBackend(ChatBackend):
    """One endpoint that speaks the completions API, one model, no policy. A request has one message: the prompt."""

    capabilities = completions_capabilities(Quirks())
    _read: Read = staticmethod(completion_from)
    _reader = CompletionReader

    async def generate(self, request: Request, /) -> Response:
        response = await super().generate(request)
        return response if request.score is None else _scored(request, response)

    def _fields(self, request: Request, *, stream: bool) -> dict[str, Any]:
        if request.score is not None:
            return self._score_fields(request, request.score)
        dialect = replace(self._dialect, max_tokens_field="max_tokens")
        body = request_body(request, self.model_id, dialect, stream=stream)
        del body["messages"]
        body["prompt"] = _text(request)
        if request.logprobs is not None:
            body.pop("top_logprobs", None)
            body["logprobs"] = request.logprobs
        return body

    def _score_fields(self, request: Request, score: Score) -> dict[str, Any]:
        prompt = _text(request) if score.prompt is None else score.prompt
        text: Any
        if isinstance(prompt, str) and isinstance(score.continuation, str):
            text = prompt + score.continuation
        elif isinstance(prompt, tuple) and isinstance(score.continuation, tuple):
            text = [*prompt, *score.continuation]
        else:
            raise UnsupportedError("A completions endpoint scores texts or token ids, not one behind the other.")
        if not prompt:
            raise UnsupportedError(
                "A completions endpoint does not tell the log-probability of a text's first token: give a prompt, such "
                "as the token that a document begins with."
            )
        return {
            "model": self.model_id,
            "prompt": text,
            "echo": True,
            "logprobs": request.logprobs or 1,
            # Not all servers take 0.
            "max_tokens": 1,
            "temperature": 0,
            **request.extra,
        }


def _text(request: Request) -> str:
    """The one message of ``request`` as the prompt that it is."""
    if len(request.messages) != 1:
        raise InvalidRequestError(
            "A completions endpoint takes one message, whose text is the prompt: it has no chat template."
        )
    content = request.messages[0].content
    if content is not None and not isinstance(content, str) and not all(isinstance(part, TextPart) for part in content):
        raise UnsupportedError("A completions endpoint takes text only.")
    return request.messages[0].text


# -- back -------------------------------------------------------------------------------------------------------------


def _as_chat(data: Any, name: str) -> Any:
    """A completion, or a piece of one, in the shape of a chat completion. Raises InvalidResponseError."""
    if not isinstance(data, Mapping) or not isinstance(data.get("choices"), list):
        return data
    try:
        return {**data, "choices": [_choice(choice, name) for choice in data["choices"]]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidResponseError(f"The answer is JSON but no completion: {shape(data)}.") from error


def _choice(choice: Any, name: str) -> Any:
    if not isinstance(choice, Mapping) or "text" not in choice:
        return choice
    shaped = {key: value for key, value in choice.items() if key not in ("text", "logprobs")}
    shaped[name] = {"content": choice["text"]}
    entries = _entries(choice.get("logprobs"))
    if entries and all(logprob is not None for _, logprob, _ in entries):
        shaped["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": logprob,
                    "top_logprobs": [{"token": other, "logprob": value} for other, value in top],
                }
                for token, logprob, top in entries
            ]
        }
    return shaped


def _entries(logprobs: Any) -> list[tuple[str, float | None, tuple[tuple[str, float], ...]]]:
    """The tokens of a completion, their log-probabilities, which the first of a prompt does not have, and the best."""
    if not isinstance(logprobs, Mapping):
        return []
    tokens, values = logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return [
        (token, value, tuple(sorted((top or {}).items(), key=lambda entry: -entry[1])))
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _scored(request: Request, response: Response) -> Response:
    """``response`` with the log-probabilities of what was to be scored. Raises InvalidResponseError."""
    score = request.score
    assert score is not None  # noqa: S101  # the caller looks
    try:
        choice = response.raw["choices"][0]
        entries = _entries(choice.get("logprobs"))
        if isinstance(score.continuation, tuple):
            read = len(score.prompt or ()) + len(score.continuation)
            begin = read - len(score.continuation)
        else:
            prompt = _text(request) if score.prompt is None else str(score.prompt)
            read = len(entries) - _generated(response, choice["text"], prompt + score.continuation, entries)
            begin = _begin([token for token, _, _ in entries[:read]], prompt, score.continuation)
        found = entries[begin:read]
        if len(entries) < read or not found:
            raise ValueError("there are too few of them")
        logprobs = []
        for token, value, top in found:
            if value is None or not top:
                raise ValueError("some have none")
            logprobs.append(TokenLogprob(token, float(value), tuple((other, float(each)) for other, each in top)))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InvalidResponseError(
            "The server did not echo the prompt with the log-probabilities of its tokens (echo, logprobs), as scoring "
            f"needs it: {error}."
        ) from error
    return evolve(response, content=None, logprobs=tuple(logprobs), finish_reason="stop")


def _generated(response: Response, text: str, whole: str, entries: list[Any]) -> int:
    """How many of the tokens at the end were generated."""
    if response.usage is not None:
        return response.usage.output_tokens
    return int(text != whole or (bool(entries) and entries[-1][0] == ""))


def _begin(tokens: list[str], prompt: str, continuation: str) -> int:
    """Where the tokens of ``continuation`` begin, with those of the spaces before it.

    A token that is of both belongs to it. Raises ValueError where the tokens at the end are not its own.
    """
    wanted = prompt[len(prompt.rstrip()) :] + continuation
    found = ""
    begin = len(tokens)
    while begin and len(found) < len(wanted):
        begin -= 1
        found = tokens[begin] + found
    if not found.endswith(wanted):
        raise ValueError("the tokens at its end are not those of the continuation")
    return begin
