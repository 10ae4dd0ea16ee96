"""Messages to the content blocks of Bedrock's Converse API. No I/O.

Converse wants the system prompt apart, then turns of user and assistant in alternation, where a tool's result belongs
to the user. Neighbours of the same role therefore become one turn.

A message's ``extra``, and that of its parts, may say:

``cachePoint``
    ``{"type": "default"}``: the prompt is cached up to the end of this message, or of this part. ``cache_control``,
    which is Anthropic's and OpenRouter's name for it, does the same. A tool's ``extra`` takes both, too.
``blocks``
    Content blocks as Converse spells them, put before the message's own: documents, ``guardContent``, signed
    ``reasoningContent``. A message, or a tool call, whose reasoning then begins the turn.
``status``
    ``"success"`` or ``"error"``: how a tool ended. A message of role ``tool`` only.
``bucketOwner``
    the account that owns the bucket of an ``s3://`` image. An image only.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence, Set
from typing import Any
from urllib.parse import unquote_to_bytes

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.types import ImagePart, Message, Part, ProviderPart, TextPart, ToolCall

__all__ = ["BLOCKS", "CACHE_NAMES", "blocks_of", "cache_point", "check_extra", "has_tool_blocks"]

BLOCKS = frozenset(
    {
        "text",
        "image",
        "document",
        "video",
        "toolUse",
        "toolResult",
        "guardContent",
        "cachePoint",
        "reasoningContent",
        "citationsContent",
    }
)
"""The kinds of content that every botocore with Converse knows."""
_IN_SYSTEM = frozenset({"text", "guardContent", "cachePoint"})
CACHE_NAMES = ("cachePoint", "cache_control")
_FORMATS = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/gif": "gif",
    "image/webp": "webp",
}
_INVALID = "INVALID_JSON"
"""The name under which arguments that are no JSON object, and nothing else is taken, go back to who wrote them."""


def has_tool_blocks(messages: Sequence[Message]) -> bool:
    """Whether Converse would demand a ``toolConfig`` for this history."""
    return any(message.role == "tool" or message.tool_calls for message in messages)


def blocks_of(
    messages: Sequence[Message], *, tools_as_text: bool, known: Set[str] = BLOCKS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The blocks of the system prompt, and the turns.

    ``tools_as_text`` writes tool calls and results out in words: Converse refuses their blocks in a request without
    tools. ``known`` are the kinds of content that may go out. Raises InvalidRequestError and UnsupportedError, naming
    the message, for what Converse cannot take.
    """
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check_message(message, where)
        if message.role in ("system", "developer"):
            system.extend(_content(message, where, known & _IN_SYSTEM))
            system.extend(cache_point(message.extra))
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = [*message.extra.get("blocks", ())]
        for place, block in enumerate(blocks):
            _check_block(block, known, f"{where}'s blocks[{place}]")
        if message.role == "tool":
            blocks.append(_tool_result(message, where, known, as_text=tools_as_text))
        elif message.role == "assistant":
            if not any("reasoningContent" in block for block in blocks):
                blocks = [*_reasoning(message), *blocks]
            blocks.extend(_content(message, where, known))
            blocks.extend(_tool_use(call, as_text=tools_as_text) for call in message.tool_calls)
        else:
            blocks.extend(_content(message, where, known))
            if not blocks:
                raise InvalidRequestError(f"{where} is blank, which Converse refuses.")
        blocks.extend(cache_point(message.extra))
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"].extend(blocks)
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _reasoning(message: Message) -> Sequence[Mapping[str, Any]]:
    """The thoughts that led to the tool calls of this turn, which the model that signed them wants to see again."""
    return next((call.extra["blocks"] for call in message.tool_calls if call.extra and "blocks" in call.extra), ())


def _check_message(message: Message, where: str) -> None:
    if message.name is not None and message.role != "tool":
        raise UnsupportedError(f"{where} has a name, and Converse knows no names of participants.")
    if message.extra:
        if message.role != "assistant":  # an assistant's may hold what another provider wanted to have back
            known = ("blocks", "status", *CACHE_NAMES) if message.role == "tool" else ("blocks", *CACHE_NAMES)
            check_extra(message.extra, known, where)
        blocks = message.extra.get("blocks", ())
        if not isinstance(blocks, list | tuple) or not all(isinstance(block, Mapping) for block in blocks):
            raise InvalidRequestError(f"{where}: the blocks must be a list of Converse's content blocks, each a dict.")
        if blocks and message.role in ("system", "developer"):
            raise UnsupportedError(f"{where}: a system prompt takes no blocks.")


def check_extra(extra: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises UnsupportedError for what ``extra`` has beside ``known``."""
    # Histories of other providers carry empty fields ("refusal", "annotations"), which say nothing.
    unknown = [name for name, value in extra.items() if value and name not in known]
    if unknown:
        raise UnsupportedError(f"{where} has {unknown[0]!r}, which Converse does not know ({', '.join(known)}).")


# -- parts ------------------------------------------------------------------------------------------------------------


def _check_block(block: Mapping[str, Any], known: Set[str], where: str) -> None:
    kinds = ", ".join(sorted(known))
    if not block:
        raise UnsupportedError(f"{where} is empty; Converse knows {kinds}.")
    for name in block:
        if name not in known:
            what = f" of {block[name]!r}" if name == "type" and isinstance(block[name], str) else ""
            raise UnsupportedError(f"{where} has a {name!r}{what}, which is no content of Converse's here: {kinds}.")


def _content(message: Message, where: str, known: Set[str]) -> list[dict[str, Any]]:
    content = message.content
    if content is None:
        return []
    if isinstance(content, str):
        # Converse refuses blank text, and it says nothing.
        return [{"text": content}] if content.strip() else []
    blocks: list[dict[str, Any]] = []
    for place, part in enumerate(content):
        made = _part(part, f"{where}.content[{place}]")
        for block in made:
            _check_block(block, known, f"{where}.content[{place}]")
        blocks.extend(made)
        if not isinstance(part, ProviderPart) and part.extra:
            blocks.extend(cache_point(part.extra))
    return blocks


def _part(part: Part, where: str) -> list[dict[str, Any]]:
    if isinstance(part, TextPart):
        if part.extra:
            check_extra(part.extra, CACHE_NAMES, where)
        return [{"text": part.text}] if part.text.strip() else []
    if isinstance(part, ProviderPart):
        return [dict(part.value)]
    if part.extra:
        check_extra(part.extra, ("bucketOwner", *CACHE_NAMES), where)
    return [_image(part, where)]


def _image(part: ImagePart, where: str) -> dict[str, Any]:
    if part.detail not in (None, "auto"):
        raise UnsupportedError(f"{where}: Converse has no 'detail' of images.")
    url, data, media_type = part.url, part.data, part.media_type
    if url is not None and url.startswith("s3://"):
        location = {"uri": url}
        if part.extra.get("bucketOwner"):
            location["bucketOwner"] = part.extra["bucketOwner"]
        ending = url.rpartition(".")[2].lower()
        return _picture(media_type or f"image/{ending}", {"s3Location": location}, where)
    if url is not None and url.startswith("data:"):
        media_type, data = _decoded(url, where)
    elif url is not None:
        raise UnsupportedError(f"{where}: Converse fetches no URL; give the image's bytes, a file, or s3://bucket/key.")
    return _picture(media_type, {"bytes": data}, where)


def _picture(media_type: str | None, source: dict[str, Any], where: str) -> dict[str, Any]:
    form = _FORMATS.get((media_type or "").lower())
    if form is None:
        raise UnsupportedError(
            f"{where}: Converse takes PNG, JPEG, GIF and WebP, not {media_type or 'an unknown type'}."
        )
    return {"image": {"format": form, "source": source}}


def _decoded(url: str, where: str) -> tuple[str, bytes]:
    head, _, body = url[5:].partition(",")
    try:
        data = base64.b64decode(body, validate=True) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    except ValueError as error:
        raise InvalidRequestError(f"{where}: the data: URL is not valid base64: {error}.") from error
    return head.partition(";")[0], data


def cache_point(extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The block for the ``cachePoint`` or ``cache_control`` in ``extra``; none where there is none."""
    given = extra.get("cachePoint") or extra.get("cache_control")
    if not given:
        return []
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f'A cachePoint is {{"type": "default"}}, not {given!r}.')
    point: dict[str, Any] = dict(given) if extra.get("cachePoint") else {"type": "default"}
    if given.get("ttl"):
        point["ttl"] = given["ttl"]
    return [{"cachePoint": point}]


# -- tools ------------------------------------------------------------------------------------------------------------


def _tool_use(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    if as_text:
        return {"text": f'<tool_call id="{call.id}" name="{call.name}">{call.arguments}</tool_call>'}
    try:
        arguments: dict[str, Any] = call.parse_arguments()
    except ValueError:
        arguments = {_INVALID: call.arguments}
    return {"toolUse": {"toolUseId": call.id, "name": call.name, "input": arguments}}


def _tool_result(message: Message, where: str, known: Set[str], *, as_text: bool) -> dict[str, Any]:
    content = message.content
    blocks = (
        _content(message, where, known | {"json"})
        if isinstance(content, tuple)
        else [{"text": content}]
        if content
        else []
    )
    status = message.extra.get("status")
    if status not in (None, "success", "error"):
        raise InvalidRequestError(f"{where}: the status of a tool's result is 'success' or 'error', not {status!r}.")
    if as_text:
        if any("text" not in block for block in blocks):
            raise UnsupportedError(f"{where}: an image in a tool's result needs a request that has tools.")
        text = "\n".join(block["text"] for block in blocks)
        return {"text": f'<tool_result id="{message.tool_call_id}">{text}</tool_result>'}
    result: dict[str, Any] = {"toolUseId": message.tool_call_id, "content": blocks}
    if status is not None:
        result["status"] = status
    return {"toolResult": result}
