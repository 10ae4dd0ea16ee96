"""``asyncmodels ask``: one question and its answer."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from asyncmodels.commands.terminal import EXIT_CODES, Commands, add_model, dumps, quiet_logs

if TYPE_CHECKING:
    from asyncmodels.model import Model
    from asyncmodels.types import Delta, Message, Response

__all__ = ["EXAMPLES", "add_to"]

EXAMPLES = """\
examples:
  asyncmodels ask "What is the capital of France?"
  asyncmodels ask "Tell me a story." --stream --max-tokens 200
  asyncmodels ask "Name three rivers." -m openai:gpt-5 --json
  git diff | asyncmodels ask --system "Write a commit message for this diff."
  asyncmodels ask "What is in this picture?" -m openai:gpt-5 --image cat.png
  OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none asyncmodels ask "Hello" -m openai:my-model

"""


def add_to(commands: Commands) -> None:
    ask = commands.add_parser(
        "ask",
        help="ask a model one question",
        description="Asks a model one question and prints its answer.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.set_defaults(run=_ask)
    ask.add_argument("prompt", nargs="?", help='what to ask; "-", or nothing at all, reads it from a pipe')
    add_model(ask)
    ask.add_argument("--stream", action="store_true", help="print the answer while it comes")
    ask.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: content, finish_reason, usage, model, timing; with --stream one for each piece",
    )
    ask.add_argument("--system", metavar="TEXT", help="a system message that goes before the question")
    ask.add_argument("--image", metavar="PATH", action="append", default=[], help="an image file or URL; repeatable")
    ask.add_argument("--max-tokens", metavar="N", type=int, help="the longest answer, in tokens")
    ask.add_argument("--temperature", metavar="T", type=float, help="0 for the likeliest answer, higher for variety")
    ask.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    ask.add_argument("--timeout", metavar="SECONDS", type=float, help="give up after this long, retries included")


def _ask(options: argparse.Namespace) -> int:
    import asyncio

    prompt = _prompt(options.prompt)
    if prompt is None:
        print('asyncmodels ask: nothing to ask; try: asyncmodels ask "What is the capital of France?"', file=sys.stderr)
        return 2
    quiet_logs()
    asyncio.run(_answer(options, _messages(options, prompt)))
    return 0


def _prompt(argument: str | None) -> str | None:
    if argument is None and sys.stdin.isatty():
        return None
    if argument is None or argument == "-":
        # Decoded as UTF-8 whatever the locale says: what is piped here are files.
        argument = sys.stdin.buffer.read().decode("utf-8", "replace")
    return argument if argument.strip() else None


def _messages(options: argparse.Namespace, prompt: str) -> list[Message]:
    from asyncmodels.images import as_image
    from asyncmodels.types import Message, TextPart

    messages = [Message("system", options.system)] if options.system is not None else []
    if not options.image:
        return [*messages, Message("user", prompt)]
    images = [as_image(image, "--image") for image in options.image]
    return [*messages, Message("user", (TextPart(prompt), *images))]


async def _answer(options: argparse.Namespace, messages: list[Message]) -> None:
    import asyncmodels

    given = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "timeout": options.timeout,
        "stop_sequences": options.stop or None,
    }
    params = {name: value for name, value in given.items() if value is not None}
    async with asyncmodels.load(options.model) as model:
        if options.stream:
            await _stream(model, messages, params, as_json=options.json)
        else:
            response = await model.generate(messages, **params)
            print(dumps(_described(response)) if options.json else response)


async def _stream(model: Model, messages: list[Message], params: dict[str, Any], *, as_json: bool) -> None:
    begun = False
    try:
        async with model.stream(messages, **params) as stream:
            async for delta in stream:
                if as_json:
                    print(dumps(_described(delta)), flush=True)
                elif delta.content:
                    begun = True
                    print(delta.content, end="", flush=True)
    finally:
        # Also after an error or Ctrl-C: what comes next begins on a line of its own.
        if begun:
            print(flush=True)


def _described(answer: Response | Delta) -> dict[str, Any]:
    from dataclasses import asdict

    from asyncmodels.types import Response

    described: dict[str, Any] = {
        "content": answer.content,
        "reasoning": answer.reasoning or None,
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage) if answer.usage else None,
        "model": answer.model,
        "timing": asdict(answer.timing) if answer.timing else None,
    }
    if isinstance(answer, Response):
        return described
    return {name: value for name, value in described.items() if value is not None}
