"""How one server or model differs from the next: a value of small facts, and how rows of them are put together.

Rows are data (``PROVIDERS`` and ``MODELS`` in ``providers.py``); nothing in the code looks at the name of a model. A
row that is missing or wrong is mended from outside: ``OpenAIModel(..., quirks=Quirks(stop=False))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from asyncmodels.backend import ALL_SAMPLING, Capabilities
from asyncmodels.errors import ConfigurationError
from asyncmodels.types import JSONSchema

__all__ = ["Quirks", "capabilities_of", "row_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quirks:
    """Where a model differs from what OpenAI documents. None leaves a fact as it is known, or else as OpenAI has it.

    A parameter that is False is an UnsupportedError before anything is sent; ``stop`` and ``stream_options`` are the
    exceptions, because their work can be done here::

        OpenAIModel("my-o3-deployment", api_base=..., quirks=Quirks(stop=False, temperature=False))
    """

    max_tokens_field: str | None = None
    """``"max_tokens"``, or ``"max_completion_tokens"`` as OpenAI's newer models want it."""
    seed_field: str | None = None
    """``"seed"``, or another name for it."""
    system_role: str | None = None
    """The role that messages of role system and developer are sent with; None sends each as it was written."""
    reasoning_field: str | None = None
    """The field in which an assistant's turn that called tools wants its reasoning back; None sends none."""
    reasoning_details: bool | None = None
    """Whether messages may hold the ``reasoning_details`` that OpenRouter wants back; False leaves them out."""
    max_stops: int | None = None
    """How many stop sequences the server takes (4); all of them are cut from the answer here in any case."""
    stop: bool | None = None
    """Whether stop sequences are sent at all. The answer, streamed or not, ends before them either way."""
    stream_options: bool | None = None
    """Whether a stream is asked for its usage; servers that refuse the question mostly give it unasked."""
    json_schema: bool | None = None
    """Whether the content can be held to a JSON schema; False leaves ``response_format="json"``."""
    json_object: bool | None = None
    """Whether the content can be held to JSON of any shape."""
    temperature: bool | None = None
    top_p: bool | None = None
    top_k: bool | None = None
    min_p: bool | None = None
    seed: bool | None = None
    frequency_penalty: bool | None = None
    presence_penalty: bool | None = None
    logprobs: bool | None = None
    tools: bool | None = None
    tool_choice: bool | None = None
    """Whether the choice between tools can be steered; False leaves ``"auto"``."""
    tool_choice_none: bool | None = None
    tool_choice_required: bool | None = None
    tool_choice_named: bool | None = None
    images: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = str if field.name in _TEXTS else int if field.name == "max_stops" else bool
            if value is not None and type(value) is not kind:
                raise ConfigurationError(f"Quirks({field.name}=...) must be a {kind.__name__}, not {value!r}.")
        if self.system_role not in (None, "system", "developer", "user"):
            raise ConfigurationError(f"Quirks(system_role=...) is system, developer or user, not {self.system_role!r}.")

    def under(self, over: Quirks | None) -> Quirks:
        """These facts where ``over`` says nothing, and else those of ``over``."""
        if over is None:
            return self
        said = {field.name: value for field in fields(over) if (value := getattr(over, field.name)) is not None}
        return replace(self, **said)


_TEXTS = frozenset({"max_tokens_field", "seed_field", "system_role", "reasoning_field"})


def row_for(model_id: str, rows: Mapping[str, Quirks]) -> Quirks | None:
    """The row of the longest name that ``model_id`` begins with.

    The vendor's path before it (``openai/``) and the mark of a fine-tuned model (``ft:``) do not count, nor does upper
    or lower case.
    """
    name = model_id.rpartition("/")[2].lower().removeprefix("ft:")
    found = max((prefix for prefix in rows if name.startswith(prefix)), key=len, default=None)
    return None if found is None else rows[found]


def capabilities_of(quirks: Quirks, *, sampling: frozenset[str] = ALL_SAMPLING) -> Capabilities:
    """What a chat endpoint with ``quirks`` can do; ``sampling`` is what its API has fields for."""
    choices = {
        "none": quirks.tool_choice_none,
        "required": quirks.tool_choice_required,
        "named": quirks.tool_choice_named,
    }
    steerable = quirks.tool_choice is not False
    json_object, json_schema = quirks.json_object is not False, quirks.json_schema is not False
    return Capabilities(
        sampling=frozenset(name for name in sampling if getattr(quirks, name, None) is not False),
        tools=quirks.tools is not False,
        tool_choice=frozenset({"auto", *(name for name, can in choices.items() if steerable and can is not False)}),
        images=quirks.images is not False,
        provider_parts=True,
        logprobs=quirks.logprobs is not False,
        response_format=json_object or json_schema,
        grammars=frozenset({JSONSchema}) if json_schema else frozenset(),
        extra=True,
    )
