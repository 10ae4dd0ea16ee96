"""The command line: ``asyncmodels ask`` and ``asyncmodels models``.

Only the standard library is imported until a command runs, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncmodels.model import Model
    from asyncmodels.registry import Scheme
    from asyncmodels.types import Delta, Message, Response

__all__ = ["main"]

_EPILOG = """\
exit codes:
  0    answered
  1    the call failed; one line on stderr says how
  2    the command line is wrong: an unknown option or scheme, nothing to ask
  130  interrupted by Ctrl-C
  141  whoever read the output has closed it
"""

_EXAMPLES = """\
examples:
  asyncmodels ask "What is the capital of France?"
  asyncmodels ask "Tell me a story." --stream --max-tokens 200
  asyncmodels ask "Name three rivers." -m openai:gpt-5 --json
  git diff | asyncmodels ask --system "Write a commit message for this diff."
  asyncmodels ask "What is in this picture?" -m openai:gpt-5 --image cat.png
  OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none asyncmodels ask "Hello" -m openai:my-model

"""

_DEFAULT_MODEL = "smollm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that ``arguments`` (``sys.argv`` without its first) name, and returns its exit code."""
    from asyncmodels.errors import AsyncModelsError, UnknownSchemeError

    try:
        options = _parser().parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show a character shows a question mark, and the rest of the answer.
            sys.stdout.reconfigure(errors="replace")
        code: int = options.run(options)
        # A pipe that was closed shows itself here at the latest, not in the interpreter's last flush.
        sys.stdout.flush()
    except AsyncModelsError as error:
        _say(error)
        return 2 if isinstance(error, UnknownSchemeError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered must go somewhere, or the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _say(error: Exception) -> None:
    # Servers' messages come with line breaks, and may come with anything.
    text = "".join(character if character.isprintable() else " " for character in str(error))
    print(f"asyncmodels: {type(error).__name__}: {' '.join(text.split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncmodels",
        description="One command for every language model: remote providers, and local ones in this process.",
        epilog=_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ask = commands.add_parser(
        "ask",
        help="ask a model one question",
        description="Asks a model one question and prints its answer.",
        epilog=_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.set_defaults(run=_ask)
    ask.add_argument("prompt", nargs="?", help='what to ask; "-", or nothing at all, reads it from a pipe')
    ask.add_argument(
        "-m",
        "--model",
        metavar="SCHEME:NAME",
        default=os.environ.get("ASYNCMODELS_MODEL") or _DEFAULT_MODEL,
        help="which model; `asyncmodels models` lists the schemes (default: $ASYNCMODELS_MODEL, here %(default)s)",
    )
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

    models = commands.add_parser(
        "models",
        help="list the schemes of models, and what to install for them",
        description="Lists the schemes that -m understands, the class behind each, and what to install for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from asyncmodels import __version__

        print(f"asyncmodels {__version__}")
        parser.exit()


# -- ask --------------------------------------------------------------------------------------------------------------


def _ask(options: argparse.Namespace) -> int:
    import asyncio
    import logging

    prompt = _prompt(options.prompt)
    if prompt is None:
        print('asyncmodels ask: nothing to ask; try: asyncmodels ask "What is the capital of France?"', file=sys.stderr)
        return 2
    # A first question may download a model; whoever sits before a terminal wants to know why it takes so long.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if sys.stderr.isatty():
        logging.getLogger("asyncmodels").setLevel(logging.INFO)
    else:
        # Transformers draws a bar while it loads weights, whoever reads it.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
            print(_dumps(_described(response)) if options.json else response)


async def _stream(model: Model, messages: list[Message], params: dict[str, Any], *, as_json: bool) -> None:
    begun = False
    try:
        async with model.stream(messages, **params) as stream:
            async for delta in stream:
                if as_json:
                    print(_dumps(_described(delta)), flush=True)
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


def _dumps(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


# -- models -----------------------------------------------------------------------------------------------------------


def _models(options: argparse.Namespace) -> int:
    from asyncmodels.registry import schemes

    rows = schemes()
    if options.json:
        print(_dumps([_row(row) for row in rows]))
        return 0
    table = [("SCHEME", "CLASS", "EXTRA", "STATUS")]
    for described in map(_row, rows):
        status = described["install"] or ("installed" if described["installed"] else "unknown")
        table.append((described["use"], described["class"], described["extra"] or "-", status))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]))
    return 0


def _row(row: Scheme) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError

    installed: bool | None
    try:
        installed = row.extra is None or not _missing(row.extra)
    except PackageNotFoundError:
        # Run from a folder without being installed: nobody wrote down what the extras are.
        installed = None
    return {
        "scheme": row.scheme,
        "use": f"{row.scheme}:NAME" if row.named else row.scheme,
        "class": row.target.partition(":")[2],
        "description": row.description,
        "extra": row.extra,
        "installed": installed,
        "install": None if installed is not False else f'pip install "asyncmodels[{row.extra}]"',
    }


def _missing(extra: str) -> list[str]:
    """The packages of ``extra`` that are not installed, by our own metadata: importing them would take seconds.

    Only requirements without a further condition count; the others are there to make things faster where they can.
    """
    import re
    from importlib import metadata

    missing = []
    for requirement in metadata.requires("asyncmodels") or []:
        name, _, condition = requirement.partition(";")
        if not re.fullmatch(rf"""\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*""", condition):
            continue
        package, inner = re.findall(r"^\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", name)[0]
        if package == "asyncmodels":
            missing += [found for part in inner.split(",") for found in _missing(part.strip())]
            continue
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return missing
