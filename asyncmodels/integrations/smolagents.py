"""smolagents on any model of ours: ``SmolagentsModel(model)`` is a ``smolagents.Model``.

Importing this module registers the class with smolagents, so that agents that were saved with it can be loaded. The
``app.py`` that smolagents writes beside a saved agent imports every model class from smolagents itself; for this one
its import line must be changed to this module.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from asyncmodels.errors import ConfigurationError, MissingExtraError, ResponseFormatError

try:
    from smolagents import models as smolagents_models
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f'SmolagentsModel needs the package {error.name!r}: pip install "asyncmodels[smolagents]"'
    ) from error

from smolagents.models import REMOVE_PARAMETER, ChatMessage, ChatMessageStreamDelta, MessageRole

from asyncmodels.integrations.smolagents_answers import chat_message, stream_deltas
from asyncmodels.integrations.smolagents_calls import ToolCallParsingError, calls_in
from asyncmodels.integrations.smolagents_messages import messages_from
from asyncmodels.integrations.smolagents_parameters import REMOVED, checked, merged, unchecked, unwritten
from asyncmodels.integrations.smolagents_saving import described, writable
from asyncmodels.model import Model
from asyncmodels.registry import load
from asyncmodels.request import normalise
from asyncmodels.roles import checked_conversions
from asyncmodels.types import Message, Response

__all__ = ["SmolagentsModel", "ToolCallParsingError"]

logger = logging.getLogger(__name__)


class SmolagentsModel(smolagents_models.Model):  # type: ignore[misc]  # smolagents is not typed for mypy --strict
    """A model of ours under the agents of smolagents, whose own classes it replaces::

        model = SmolagentsModel(OpenAIModel("gpt-5"), temperature=0.2)
        agent = CodeAgent(tools=[], model=model)

    ``model`` is any Model, or the name of one for ``asyncmodels.load``, which is given ``model_kwargs``. One object
    serves any number of agents in any number of threads: all calls run on the one background loop of ``model.sync``,
    share its connections or its engine, and are retried by the model's own chain. Errors are those of asyncmodels.

    ``kwargs`` are parameters of every call, in our names or in those of OpenAI's API, and, as everywhere in smolagents
    and nowhere else here, they beat those of a call; a value of ``REMOVE_PARAMETER`` takes a parameter back. What no
    parameter is called goes to the provider as it is (``reasoning_effort="low"``). ``tool_choice`` is ``"required"``
    where the model can do that. A model that knows no tools reads about them in the agent's prompt only, and
    ``parse_tool_calls`` finds the calls in what it writes; ``tool_name_key`` and ``tool_arguments_key`` say how they
    are written. ``custom_role_conversions`` renames roles, ``flatten_messages_as_text`` allows for text only.

    Raises ConfigurationError for arguments that can never work, and whatever ``load`` raises for a name.
    """

    def __init__(
        self,
        model: Model | str,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        model_id: str | None = None,
        custom_role_conversions: Mapping[Any, Any] | None = None,
        flatten_messages_as_text: bool = False,
        tool_name_key: str = "name",
        tool_arguments_key: str = "arguments",
        **kwargs: Any,
    ) -> None:
        kwargs = checked(kwargs)
        self.model = _made(model, model_kwargs)
        self._description = (model, dict(model_kwargs or {})) if isinstance(model, str) else None
        self.custom_role_conversions = checked_conversions(custom_role_conversions)
        self._sync = self.model.sync
        super().__init__(
            flatten_messages_as_text=flatten_messages_as_text,
            tool_name_key=tool_name_key,
            tool_arguments_key=tool_arguments_key,
            model_id=model_id if model_id is not None else self.model.model_id,
            **kwargs,
        )

    # -- asking -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        messages: Sequence[ChatMessage | Message | Mapping[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        tools_to_call_from: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> ChatMessage:
        """Answers ``messages`` with a new ChatMessage; ``raw`` is our Response, with its timing and all of its usage.

        Content that does not satisfy ``response_format`` is returned as it is: the agent tells the model about it.
        Raises what ``Model.generate`` raises.
        """
        asked, params, stops = self._prepared(messages, stop_sequences, response_format, tools_to_call_from, kwargs)
        return chat_message(self._answer(asked, params), stops)

    def generate_stream(
        self,
        messages: Sequence[ChatMessage | Message | Mapping[str, Any]],
        stop_sequences: list[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        tools_to_call_from: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Generator[ChatMessageStreamDelta, None, None]:
        """The answer piece by piece; the last piece carries the usage. Closing the generator cancels the request.

        A model that cannot stream answers in one piece. Raises what ``Model.stream`` raises, at the first step.
        """
        asked, params, stops = self._prepared(messages, stop_sequences, response_format, tools_to_call_from, kwargs)
        if not self.model.capabilities.stream:
            yield from stream_deltas([self._answer(asked, params).as_delta()], stops)
            return
        with self._sync.stream(asked, **params) as stream:
            yield from stream_deltas(stream, stops)

    def _answer(self, messages: tuple[Message, ...], params: dict[str, Any]) -> Response:
        try:
            return self._sync.generate(messages, **params)
        except ResponseFormatError as error:  # no content at all; for an agent that is a step that failed, not a run
            if error.response is None:
                raise
            return error.response

    def _prepared(
        self,
        messages: Any,
        stop_sequences: list[str] | None,
        response_format: Any,
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[tuple[Message, ...], dict[str, Any], tuple[str, ...]]:
        """The messages, the parameters for our model, and the stop sequences that are left for us to see to."""
        call = unwritten(kwargs)
        flattened = bool(call.pop("flatten_messages_as_text", self.flatten_messages_as_text))
        asked = messages_from(messages, self.custom_role_conversions, flattened=flattened)
        own: dict[str, Any] = {}
        if stop_sequences:
            own["stop_sequences"] = stop_sequences
        if response_format is not None:
            own["response_format"] = response_format
        if tools:
            own["tools"] = list(tools)
            own["tool_choice"] = self._default_tool_choice()
        params = merged(own, call, self.kwargs)
        if not params.get("tools"):
            params.pop("tool_choice", None)  # providers refuse it alone
        elif not self.model.capabilities.tools:
            logger.debug("%r knows no tools: they are left to the agent's prompt.", self.model)
            params.pop("tools")
            params.pop("tool_choice", None)
        if params.get("response_format") is not None:
            params["response_format"] = unchecked(params["response_format"])
        stops: Sequence[str] = ()
        if "stop_sequences" not in params:
            stops = stop_sequences or ()
        elif not self.supports_stop_parameter:
            stops = params.pop("stop_sequences") or ()
        return asked, params, normalise({"stop_sequences": stops})["stop_sequences"] if stops else ()

    def _default_tool_choice(self) -> str | None:
        choices = self.model.capabilities.tool_choice
        return next((choice for choice in ("required", "auto") if choice in choices), None)

    @property
    def supports_stop_parameter(self) -> bool:
        """Whether stop sequences are sent. Where they are not, the answer is cut here all the same."""
        return self.model.capabilities.stop and bool(super().supports_stop_parameter)

    # -- calls in the text --------------------------------------------------------------------------------------------

    def parse_tool_calls(self, message: ChatMessage) -> ChatMessage:
        """``message`` with the calls that its text holds, and with arguments that are no longer JSON text.

        Unlike smolagents' own it finds several calls, lists of them, and Python dicts. Raises ToolCallParsingError,
        which is a ValueError, where there is no call.
        """
        message.role = MessageRole.ASSISTANT
        if not message.tool_calls:
            if not isinstance(message.content, str):
                raise ToolCallParsingError("Message contains no content and no tool calls.")
            message.tool_calls = [
                smolagents_models.ChatMessageToolCall(
                    function=smolagents_models.ChatMessageToolCallFunction(arguments=call.arguments, name=call.name),
                    # Agents show the results in the order of the ids.
                    id=f"call_{index:03}_{uuid.uuid4().hex}",
                    type="function",
                )
                for index, call in enumerate(calls_in(message.content, self.tool_name_key, self.tool_arguments_key))
            ]
        for call in message.tool_calls:
            call.function.arguments = smolagents_models.parse_json_if_needed(call.function.arguments)
        return message

    # -- saving -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The arguments with which this object can be made again, fit for JSON: agents are saved with them.

        Secrets are never among them, nor what JSON cannot hold (clients, policies, functions): both are named in a
        warning of the logger, and a loaded model takes its key from the environment. Raises ConfigurationError for a
        model that ``asyncmodels.load`` cannot make; give the name of one instead.
        """
        name, parameters = self._description or described(self.model)
        own = {
            "model_kwargs": parameters,
            "custom_role_conversions": self.custom_role_conversions,
            **{name: REMOVED if value is REMOVE_PARAMETER else value for name, value in self.kwargs.items()},
        }
        settings = {
            "flatten_messages_as_text": self.flatten_messages_as_text,
            "tool_name_key": self.tool_name_key,
            "tool_arguments_key": self.tool_arguments_key,
        }
        changed = {name: value for name, value in settings.items() if value != _DEFAULTS[name]}
        kept = {name: value for name, value in writable(own).items() if value != {}}
        return {"model": name, "model_id": self.model_id, **kept, **changed}

    @classmethod
    def from_dict(cls, model_dictionary: dict[str, Any]) -> Self:
        """The model that ``to_dict`` described."""
        return cls(**model_dictionary)

    # -- ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the model inside, for everybody who uses it."""
        self._sync.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.model!r}>"


_DEFAULTS = {"flatten_messages_as_text": False, "tool_name_key": "name", "tool_arguments_key": "arguments"}


def _made(model: Model | str, model_kwargs: Mapping[str, Any] | None) -> Model:
    if isinstance(model, str):
        return load(model, **(model_kwargs or {}))
    if not isinstance(model, Model):
        raise ConfigurationError(
            f"SmolagentsModel takes a Model of asyncmodels or the name of one, not {type(model).__name__}."
        )
    if model_kwargs:
        raise ConfigurationError("model_kwargs are for a model that is given by its name; this one is made already.")
    return model


smolagents_models.MODEL_REGISTRY[SmolagentsModel.__name__] = SmolagentsModel
