"""``asyncmodels models``: the schemes that there are, and what to install for each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from asyncmodels.commands.terminal import EXIT_CODES, Commands, dumps

if TYPE_CHECKING:
    from asyncmodels.registry import Scheme

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    models = commands.add_parser(
        "models",
        help="list the schemes of models, and what to install for them",
        description="Lists the schemes that -m understands, the class behind each, and what to install for it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true", help="print a JSON list")


def _models(options: argparse.Namespace) -> int:
    from asyncmodels.registry import schemes

    rows = schemes()
    if options.json:
        print(dumps([_row(row) for row in rows]))
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
