"""What all commands share: how they end, what they say on standard error, and how a model is named."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, TypeAlias

from asyncmodels.commands.parser import Parser

__all__ = ["DONE_CODES", "EXIT_CODES", "Commands", "UsageError", "add_model", "dumps", "one_line", "quiet_logs"]

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a command adds its parser to."""

EXIT_CODES = """\
exit codes:
  0    answered
  1    the call failed; one line on stderr says how
  2    the command line is wrong: an unknown option or scheme, nothing to ask
  130  interrupted by Ctrl-C
  141  whoever read the output has closed it
"""
DONE_CODES = """\
exit codes:
  0    done
  1    it could not be done; one line on stderr says why
  2    the command line is wrong
"""

_DEFAULT_MODEL = "smollm"


class UsageError(Exception):
    """What was typed cannot work, as one sentence; nothing was asked."""


def add_model(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="SCHEME:NAME",
        default=os.environ.get("ASYNCMODELS_MODEL") or _DEFAULT_MODEL,
        help="which model; `asyncmodels models` lists the schemes (default: $ASYNCMODELS_MODEL, here %(default)s)",
    )


def quiet_logs() -> None:
    """A first question may download a model; whoever sits before a terminal wants to know why it takes so long."""
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if sys.stderr.isatty():
        logging.getLogger("asyncmodels").setLevel(logging.INFO)
    else:
        # Transformers draws a bar while it loads weights, whoever reads it.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def one_line(text: object) -> str:
    """Servers' messages come with line breaks, and may come with anything."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def dumps(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
