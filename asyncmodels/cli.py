"""The command line: ``asyncmodels ask``, ``asyncmodels models`` and the others of ``asyncmodels.commands``.

Only the standard library is imported until a command runs, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from asyncmodels.commands import ask, batch, bench, journals, models, report
from asyncmodels.commands.parser import Parser
from asyncmodels.commands.terminal import EXIT_CODES, UsageError, one_line

__all__ = ["main"]

_COMMANDS = (ask, batch, bench, models, report, journals)


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
    except UsageError as error:
        print(f"asyncmodels: {one_line(error)}", file=sys.stderr)
        return 2
    except AsyncModelsError as error:
        print(f"asyncmodels: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UnknownSchemeError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered must go somewhere, or the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="asyncmodels",
        description="One command for every language model: remote providers, and local ones in this process.",
        epilog=ask.EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from asyncmodels import __version__

        print(f"asyncmodels {__version__}")
        parser.exit()
