"""What happens to a request: the links of a chain, from the outermost to the backend, with their settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from asyncmodels.backend import Backend, Branching, Identified
from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.recipe import Reproducible, constructor_arguments

__all__ = ["Explanation", "explain"]

LONGEST = 60
"""Characters of one setting that are shown."""
UNSHOWN = ("backend", "clock", "random", "to", "names")
"""Settings that say nothing to a reader, or that are drawn as branches."""
SECRETS = ("key", "password", "secret", "token")
"""Whatever text is called so is not shown."""


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """One link of a chain: its class (behind the name of its branch, where it begins one), its ``settings`` as text,
    what it ``does`` to a request, and what comes next, which is several where the chain branches.

    As text, and where an interpreter shows it, it is the whole tree, a line a link.
    """

    name: str
    settings: str
    does: str
    next: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self._lines("", ""))

    def __repr__(self) -> str:
        return str(self)

    def _lines(self, mark: str, indent: str) -> Iterator[str]:
        does = f": {self.does}" if self.does else ""
        yield f"{mark}{self.name}{f'({self.settings})' if self.settings else ''}{does}"
        if len(self.next) == 1:
            yield from self.next[0]._lines(f"{indent}→ ", indent)
        for number, branch in enumerate(self.next if len(self.next) > 1 else (), 1):
            last = number == len(self.next)
            yield from branch._lines(f"{indent}{'└' if last else '├'}─ ", f"{indent}{'   ' if last else '│  '}")


def explain(model: Backend) -> Explanation:
    """The chain of ``model`` link by link, each with its settings and what it does: ``print(explain(model))``.

    Links are shown as they were made, without secrets; a setting that was changed since shows both values.
    """
    if not isinstance(model, Backend):
        raise ConfigurationError(f"explain() takes a Model or another Backend, not {type(model).__name__}.")
    return _explained(model, "")


def _explained(link: Backend, branch: str) -> Explanation:
    name = f"{branch}: {type(link).__name__}" if branch else type(link).__name__
    if isinstance(link, Branching):
        after = tuple(_explained(other, label) for label, other in link.branches().items())
        return Explanation(name, _settings(link), _does(link), after)
    if isinstance(link, Model):
        model_id = repr(link.model_id) if link.model_id else ""
        defaults = [f"{key}={_shown(value)}" for key, value in link._defaults.items()]
        return Explanation(name, ", ".join(filter(None, [model_id, *defaults])), "", (_explained(link._chain, ""),))
    inner = getattr(link, "backend", None)
    if isinstance(inner, Backend):
        return Explanation(name, _settings(link), _does(link), (_explained(inner, ""),))
    return Explanation(name, _identity(link), "")


# -- one link ---------------------------------------------------------------------------------------------------------


def _does(link: Backend) -> str:
    """The first sentence of its class's own documentation."""
    text = inspect.cleandoc(vars(type(link)).get("__doc__") or "").partition("\n\n")[0]
    text = " ".join(text.replace("``", "").split()).removesuffix("::")
    return text.partition(". ")[0].removesuffix(".").removesuffix(":")


def _settings(link: Backend) -> str:
    if not isinstance(link, Reproducible):
        return ""
    given = constructor_arguments(link)
    said = []
    for name, parameter in inspect.signature(type(link).__init__).parameters.items():
        if name in UNSHOWN or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        value = given.get(name, parameter.default)
        if name == "self" or value is parameter.empty or isinstance(value, Backend) or _is_nothing(value):
            continue
        secret = isinstance(value, str) and any(word in name.lower() for word in SECRETS)
        text = f"{name}={'***' if secret else _shown(value)}"
        if isinstance(getattr(type(link), name, None), property) and (now := getattr(link, name)) != value:
            text += f" (now {_shown(now)})"
        said.append(text)
    return ", ".join(said)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | tuple | list | Mapping) and not value)


def _identity(backend: Backend) -> str:
    """What a backend says of itself; that holds no secret."""
    said = (backend.identity() if isinstance(backend, Identified) else None) or {}
    # What is long there is written for caches, not for readers.
    readable = {name: value for name, value in said.items() if name != "dialect" and len(str(value)) <= LONGEST}
    return ", ".join(f"{name}={_shown(value)}" for name, value in readable.items())


def _shown(value: Any) -> str:
    """A setting as text. What may hold a secret is shown by its class, or by its names only."""
    if isinstance(value, str):
        text = _without_secrets(value)
    elif value is None or isinstance(value, bool | int | float):
        text = f"{value:g}" if isinstance(value, float) else repr(value)
    elif isinstance(value, type):
        text = value.__name__
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(map(str, value))}}}"
    elif isinstance(value, tuple | list | set | frozenset):
        shown = [_shown(item) for item in value]
        text = f"[{', '.join(sorted(shown) if isinstance(value, set | frozenset) else shown)}]"
    elif type(value).__module__.partition(".")[0] == "asyncmodels":
        text = repr(value)
    else:
        text = getattr(value, "__name__", type(value).__name__)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _without_secrets(text: str) -> str:
    """An address without what may be a password in it, or a key behind its question mark; other texts as they are."""
    if "://" not in text:
        return repr(text)
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return "'...'"
    return repr(f"{parts.scheme}://{host}{port}{parts.path}")
