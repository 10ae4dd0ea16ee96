"""The journal that a command is given, and what is often taken for one."""

from __future__ import annotations

import os
import re

from asyncmodels.commands.terminal import UsageError

__all__ = ["check_journal"]

_ANSWERS = re.compile(
    rb'PAR1|"?id"?[^\w"]"?content"?[^\w"]|\{"id": (?:"(?:[^"\\]|\\.)*"), "(?:content|custom_id)": ', re.DOTALL
)
"""How the outputs of batch begin: Parquet, a header of CSV, JSON lines of ours and of OpenAI."""


def check_journal(path: str) -> None:
    """Raises UsageError for the output of a run, and says where its journal is."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            begin = file.read(65_536)
    except OSError:
        return  # which is said by whoever reads it
    if not _ANSWERS.match(begin):
        return
    journal = f"{path}.sqlite"
    where = (
        "lies beside it" if os.path.isfile(os.path.expanduser(journal)) else "batch keeps beside it unless told not to"
    )
    raise UsageError(f"{path} holds the answers of a run and is not its journal, which {where}: {journal}.")
