"""What is made of a request before it is queued, off the event loop: token ids by the model's chat template, the
grammar of the answer, and who reads the answer.

Every worker thread has its own copy of the tokenizer, because a tokenizer may not be used by two threads at once
("Already borrowed"), and nothing is ever padded or truncated in it.

A template that refuses messages gets them a second time with neighbours of one role merged, and a third time with the
system prompt in front of the first user message; what it refuses then is an InvalidRequestError with its own words.
A model without a chat template takes a single message, whose text is the prompt as it is; a conversation is an
InvalidRequestError, because nobody knows how such a model would like to read it.

Tools are rendered by the template where it knows them and the model's calls can be read, else described in the system
message. A call that is demanded, and a response format beside tools, are held to our own notation by a grammar. Where
a grammar holds an answer and the prompt has opened the model's reasoning, the prompt closes it, too.

A model that is shown images gets the content of messages as a list of texts and images, as templates of such models
want it, and the special tokens that its tokenizer puts around a prompt, unless the template has done that. Images are
read on threads of their own, because they take a hundred times as long as texts.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.local.answer_parser import AnswerParser
from asyncmodels.local.deep_threads import DeepThreads
from asyncmodels.local.notation import Keys, Native, notation_of
from asyncmodels.local.runner import ReadsImages
from asyncmodels.local.score_prompt import checked_tokens, score_tokens
from asyncmodels.local.template_messages import Messages, in_parts, is_pictured, template_messages
from asyncmodels.local.tool_grammar import call_grammar
from asyncmodels.local.tool_prompt import described, tool_shapes, written_out
from asyncmodels.types import Grammar, ImagePart, JSONSchema, Message, Request, Score, Tool, evolve

__all__ = ["Prepared", "PromptEncoder", "prompt_tokens", "template_fault", "template_kwargs"]

# What apply_chat_template is told by us, and what would have it return anything but a text.
_RESERVED = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


_ANY_JSON: Mapping[str, Any] = {"type": ["object", "array"]}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the owner thread wants it."""

    prompt: tuple[int, ...]
    constraint: Any = None
    """What the runtime made of the grammar; None where anything may be said."""
    parser: AnswerParser | None = None
    """Reads the answer; None where all of it is content."""
    demanded: bool = False
    """Whether the answer is a call and nothing else, in which no stop sequence is looked for."""
    images: Any = None
    """What the runtime made of the images; None where there are none."""
    scored: tuple[int, ...] = ()
    """What is to be scored behind the prompt; empty where something is to be answered."""


@dataclass(frozen=True, slots=True)
class _Written:
    """What was made of a request but for the grammar, which is compiled elsewhere."""

    prompt: tuple[int, ...]
    grammar: Grammar | None
    parser: AnswerParser | None
    demanded: bool = False
    images: Any = None
    scored: tuple[int, ...] = ()


class PromptEncoder:
    """Prepares requests for one model. ``close`` ends its threads.

    ``template_kwargs`` go to the chat template of every request; ``extra["chat_template_kwargs"]`` of a request wins.
    ``compile_grammar`` is the runtime's own, and called on threads that are fit for it; None where it has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        compile_grammar: Callable[[Grammar], Any] | None = None,
        native: Native | None = None,
        images: ReadsImages | None = None,
        blind: str = "This model does not support images.",
        keys: Keys | None = None,
        threads: int = 2,
        name: str = "model",
    ) -> None:
        self._template_kwargs = dict(template_kwargs or {})
        self._compile = compile_grammar
        self._keys = keys or Keys()
        self._notation = notation_of(tokenizer, native)
        self._images = images
        self._blind = blind
        # Stands for an image in the text of a message; nobody can have written it there.
        self._picture = None if images is None else f"\x02{uuid.uuid4().hex}\x03"
        # Copied here, where the model is loaded: a copy takes a tenth of a second, in which no event loop gets to run.
        self._spare = queue.SimpleQueue[Any]()
        for _ in range(threads if images is None else 2 * threads):
            self._spare.put(copy.deepcopy((tokenizer, images)))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"asyncmodels-prompt-{name}")
        self._looking = ThreadPoolExecutor(threads, thread_name_prefix=f"asyncmodels-image-{name}")
        self._deep = DeepThreads(name)

    async def prepare(self, request: Request, *, streaming: bool = True) -> Prepared:
        """``streaming`` says whether anybody looks at the answer before it has ended.

        Raises InvalidRequestError where the chat template cannot take the messages, the tokenizer their text, or the
        grammar is wrong, or an image cannot be read; UnsupportedError, MissingExtraError where there are no means for
        it.
        """
        pool = self._pool
        if any(map(is_pictured, request.messages)):
            if self._images is None:
                raise UnsupportedError(self._blind)
            request = evolve(request, messages=await self._images.fetched(request.messages))
            pool = self._looking
        written = await asyncio.get_running_loop().run_in_executor(pool, self._write, request, streaming)
        constraint = None
        if written.grammar is not None:
            if self._compile is None:
                raise UnsupportedError("This model's runtime cannot hold an answer to a grammar.")
            constraint = await asyncio.wrap_future(self._deep.submit(partial(self._compile, written.grammar)))
        return Prepared(
            written.prompt, constraint, written.parser, written.demanded, written.images, scored=written.scored
        )

    def _write(self, request: Request, streaming: bool) -> _Written:
        tokenizer, reader = self._own_tokenizer()
        tokenize = partial(_tokenize, tokenizer)
        if request.score is not None and request.score.prompt is not None:
            prompt, scored = score_tokens(tokenizer, tokenize, request.score)
            return _Written(prompt, None, None, scored=scored)
        ids = prompt_tokens(request)
        if ids:
            written = _Written(checked_tokens(tokenizer, ids), _content_grammar(request), None)
        else:
            written = self._write_messages(tokenizer, reader, request, streaming)
        if request.score is None:
            return written
        if written.images is not None:
            raise UnsupportedError("What continues a prompt with images cannot be scored here.")
        _, scored = score_tokens(tokenizer, tokenize, Score(request.score.continuation, written.prompt))
        return _Written(written.prompt, None, None, scored=scored)

    def _write_messages(
        self, tokenizer: Any, reader: ReadsImages | None, request: Request, streaming: bool
    ) -> _Written:
        kwargs = {**self._template_kwargs, **template_kwargs(request)}
        tools = () if request.tool_choice == "none" else request.tools
        if not getattr(tokenizer, "chat_template", None) and "chat_template" not in kwargs:
            if len(request.messages) != 1:
                raise InvalidRequestError(
                    "This model has no chat template: it takes one message, whose text is the prompt."
                )
            if tools:
                raise UnsupportedError("This model has no chat template: it cannot be told of tools.")
            if is_pictured(request.messages[0]):
                raise UnsupportedError("This model has no chat template: it cannot be shown images.")
            prompt = _tokenize(tokenizer, request.messages[0].text, special=True)
            return _Written(prompt, _content_grammar(request), None)
        notation, shapes = self._notation, tool_shapes(tools)
        render = partial(_render, tokenizer, kwargs, self._picture)
        messages = template_messages(request.messages, self._picture)
        text = _render_native(render, messages, shapes) if tools and notation.calls else None
        native = text is not None
        keys = Keys() if native else self._keys
        if text is None:
            text = _render_own(render, messages, shapes, keys)
        demanded = bool(tools) and request.tool_choice in {"required", *(tool.name for tool in tools)}
        grammar = _grammar(request, tools, keys, demanded=demanded)
        if grammar is not None and notation.opened(text):
            text = f"{text.rstrip()}\n{notation.thought.close}\n\n" if notation.thought else text
        prompt, images = _encoded(tokenizer, reader, text, request.messages)
        runtimes = notation.runtimes(prompt=prompt, template_kwargs=kwargs, streaming=streaming)
        parser: AnswerParser | None = None
        if grammar is not None:
            if tools and grammar is not request.grammar:
                parser = notation.own_parser(tokenizer, text, keys, frozenset())
        elif native:
            parser = notation.native_parser(tokenizer, text, shapes, runtimes)
        elif tools:
            parser = notation.own_parser(tokenizer, text, keys, frozenset(tool.name for tool in tools))
        else:
            parser = notation.plain_parser(tokenizer, text, runtimes)
        return _Written(prompt, grammar, parser, demanded, images)

    def close(self) -> None:
        # Prompts that are under way are finished: a cancelled future would look as if its caller had been cancelled.
        self._pool.shutdown(wait=False)
        self._looking.shutdown(wait=False)
        self._deep.close()

    def _own_tokenizer(self) -> tuple[Any, ReadsImages | None]:
        own: tuple[Any, ReadsImages | None] | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = self._spare.get_nowait()
        return own


def template_kwargs(request: Request) -> Mapping[str, Any]:
    """What ``request`` has for the chat template. Raises InvalidRequestError where it cannot have that."""
    kwargs = request.extra.get("chat_template_kwargs")
    fault = template_fault(kwargs)
    if fault is not None:
        raise InvalidRequestError(f"chat_template_kwargs {fault}.")
    return kwargs or {}


def prompt_tokens(request: Request) -> tuple[int, ...]:
    """The token ids that ``request`` has in place of its messages. Raises InvalidRequestError for what are none."""
    ids = request.extra.get("prompt_token_ids")
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise InvalidRequestError(
            "prompt_token_ids must be a list of token ids, whole numbers from 0 on, at least one."
        )
    return tuple(ids)


def template_fault(kwargs: object) -> str | None:
    """What is wrong with ``kwargs`` as keyword arguments for a chat template: the end of a sentence about them."""
    if kwargs is None:
        return None
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        return f"must be a mapping from names to values, not {kwargs!r}"
    reserved = sorted(_RESERVED & kwargs.keys())
    return f"cannot set {', '.join(reserved)}: that is the engine's own" if reserved else None


def _encoded(
    tokenizer: Any, reader: ReadsImages | None, text: str, messages: tuple[Message, ...]
) -> tuple[tuple[int, ...], Any]:
    """The tokens of a prompt, with the images of ``messages`` in their places, and what the runtime makes of these."""
    if reader is None:
        return _tokenize(tokenizer, text, special=False), None
    begin = getattr(tokenizer, "bos_token", None)
    special = not begin or not text.startswith(begin)
    images = [
        (f"messages[{index}].content[{place}]", part.data or b"")
        for index, message in enumerate(messages)
        if not isinstance(message.content, str | None)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    if not images:
        return _tokenize(tokenizer, text, special=special), None
    around = text.split(reader.mark)
    if any(reader.mark in message.text for message in messages):
        raise InvalidRequestError(f"The messages hold {reader.mark!r}, which this model takes for an image.")
    if len(around) != len(images) + 1:
        raise UnsupportedError(
            f"The model's chat template shows {len(around) - 1} of the {len(images)} images of these messages."
        )
    texts, pieces = reader.written(images)
    whole = "".join(piece for pair in zip(around, texts, strict=False) for piece in pair) + around[-1]
    return reader.pictured(_tokenize(tokenizer, whole, special=special), pieces)


def _tokenize(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    try:
        ids = tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except (TypeError, UnicodeError) as error:
        half = _half_character(text)
        if half is None:
            raise
        raise InvalidRequestError(
            f"The messages hold {half}, half of a surrogate pair, which no tokenizer can encode."
        ) from error
    if not ids:
        raise InvalidRequestError("The prompt is empty: it has no tokens.")
    return ids


def _half_character(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


# -- grammars ---------------------------------------------------------------------------------------------------------


def _content_grammar(request: Request) -> Grammar | None:
    if request.grammar is not None or request.response_format is None:
        return request.grammar
    return JSONSchema(request.response_format.schema or _ANY_JSON)


def _grammar(request: Request, tools: tuple[Tool, ...], keys: Keys, *, demanded: bool) -> Grammar | None:
    if demanded:
        return call_grammar([tool for tool in tools if request.tool_choice in ("required", tool.name)], keys)
    if tools and request.response_format is not None and request.grammar is None:
        return call_grammar(tools, keys, content=request.response_format.schema or _ANY_JSON)
    return _content_grammar(request)


# -- chat templates ---------------------------------------------------------------------------------------------------

_Render: TypeAlias = Callable[[Messages, list[dict[str, Any]] | None], str]


def _render_native(render: _Render, messages: Messages, shapes: list[dict[str, Any]]) -> str | None:
    """The prompt with tools as the template itself shows them; None where it refuses them or leaves them out."""
    try:
        text = render(messages, shapes)
        return text if text != render(messages, None) else None
    except InvalidRequestError:
        return None


def _render_own(render: _Render, messages: Messages, shapes: list[dict[str, Any]], keys: Keys) -> str:
    """The prompt with tools in our words, and with calls and results in our words where the template has none."""
    if shapes:
        return render(described(written_out(messages, keys), shapes, keys), None)
    without_calls = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    without_results = [message for message in messages if message["role"] != "tool"]
    if messages == without_calls == without_results:
        return render(messages, None)
    try:
        text = render(messages, None)
        if all(other == messages or text != render(other, None) for other in (without_calls, without_results)):
            return text
    except InvalidRequestError:
        pass
    return render(written_out(messages, keys), None)


def _render(
    tokenizer: Any,
    kwargs: Mapping[str, Any],
    picture: str | None,
    messages: Messages,
    shapes: list[dict[str, Any]] | None,
) -> str:
    settings = {"add_generation_prompt": True, **kwargs}
    if shapes:
        settings["tools"] = shapes
    refusal: Exception | None = None
    for attempt in (messages, _merged(messages), _without_system(_merged(messages))):
        try:
            shaped = attempt if picture is None else in_parts(attempt, picture)
            text: str = tokenizer.apply_chat_template(shaped, tokenize=False, **settings)
        except Exception as error:  # templates are programs of the model's authors: they may raise anything
            refusal = refusal or error
        else:
            return text
    raise InvalidRequestError(f"The model's chat template refuses these messages: {refusal}") from refusal


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == message["role"] != "tool" and "tool_calls" not in last | message:
            merged[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = "\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [message for message in messages if message["role"] != "system"]
    if not system or not rest or rest[0]["role"] != "user":
        return messages
    return _merged([{"role": "user", "content": system}, *rest])
