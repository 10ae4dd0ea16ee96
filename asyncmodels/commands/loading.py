"""The model that a command line describes: its name, its settings, and the limits that hold for it."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from asyncmodels.commands.pricing import amounts, as_price
from asyncmodels.commands.terminal import UsageError, add_model

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["add_limits", "add_model_options", "concurrency", "load_model", "settings", "whole"]


def add_model_options(parser: argparse._ArgumentGroup) -> None:
    add_model(parser)
    parser.add_argument(
        "--model-arg",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the model's class, such as api_base=http://localhost:8000/v1 or max_batch_size=64; "
        "the value is JSON, or else a text; repeatable",
    )


def add_limits(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--rpm", metavar="N", type=_positive, help="at most so many requests a minute")
    parser.add_argument("--tpm", metavar="N", type=_positive, help="at most so many tokens a minute, in and out")
    parser.add_argument(
        "--budget",
        metavar="DOLLARS",
        type=_positive,
        help="refuse what could cost more (by --price, or by the list of the extra `prices`); each start counts anew, "
        "so that a run that goes on with --resume has the whole budget again",
    )
    parser.add_argument(
        "--price",
        metavar="IN,OUT",
        type=amounts,
        help="dollars for a million tokens of input and of output; a third is for input that the provider has cached",
    )


def load_model(options: argparse.Namespace, calls: int | Literal["auto"], **chain: Any) -> Model:
    """The model of ``options``, which lets ``calls`` in at once; ``chain`` is for the default chain of remote models.

    Raises UsageError, and what ``load`` does.
    """
    from asyncmodels import load
    from asyncmodels.model import Model
    from asyncmodels.policies.budget import Budget
    from asyncmodels.policies.rate_limit import RateLimit

    name, given = options.model, settings("--model-arg", options.model_arg)
    rpm, tpm, dollars, price = (getattr(options, name, None) for name in ("rpm", "tpm", "budget", "price"))
    budget = None if price is None else partial(Budget, spending=dollars, prices=as_price(price))
    if _is_remote(name):
        if dollars is None and price is not None and "budget" in given:
            raise UsageError("--price and --model-arg budget=... cannot be given together; use --budget.")
        limits = {
            "requests_per_minute": rpm,
            "tokens_per_minute": tpm,
            "budget": dollars if budget is None else budget,
        }
        limits = {name: value for name, value in limits.items() if value is not None}
        for twice in limits.keys() & given:
            raise UsageError(f"{twice} is given twice: by an option of its own, and by --model-arg.")
        if given.get("policies") is None:  # which have no place for limits, and say so
            given = {"max_concurrency": calls, **chain, **given}
        return load(name, **limits, **given)
    model = load(name, **given)
    policies: list[Any] = []
    if dollars is not None or budget is not None:
        policies.append(budget or partial(Budget, spending=dollars))
    if rpm is not None or tpm is not None:
        policies.append(partial(RateLimit, requests_per_minute=rpm, tokens_per_minute=tpm))
    return Model(model, *policies) if policies else model


def _is_remote(name: str) -> bool:
    """Whether the model's class takes what all remote models share."""
    from asyncmodels.registry import schemes

    scheme = name.partition(":")[0]
    return any(row.scheme == scheme and row.target.startswith("asyncmodels.remote.") for row in schemes())


def settings(option: str, pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as given several times; a value is JSON where it can be read as such. Raises UsageError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip().isidentifier():
            raise UsageError(f"{option} needs NAME=VALUE, not {pair.partition('=')[0]!r}.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def concurrency(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return whole(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f'"auto" or a whole number of at least 1 is needed, not {text!r}') from error


def whole(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text!r}")
    return value
