"""The roles by which callers rename others: ours, and the two of smolagents' that turns with tools have there."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from enum import Enum
from typing import get_args

from asyncmodels.errors import ConfigurationError
from asyncmodels.types import Role

__all__ = ["checked_conversions"]

# As smolagents calls the turns with calls and results; other names of its are ours.
_RESULTS = ("tool", "tool-response")
_ROLES = (*get_args(Role), "tool-call", "tool-response")


def checked_conversions(conversions: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of ``custom_role_conversions``, from the role that callers write to the one that is sent.

    Raises ConfigurationError for a role that does not exist, and where something would become a tool's result.
    """
    if not isinstance(conversions, Mapping | None):
        raise ConfigurationError("custom_role_conversions must be a dict of roles.")
    table: dict[str, str] = {}
    for key, value in (conversions or {}).items():
        source, target = _known_role(key), _known_role(value)
        if target == "tool" and source not in _RESULTS:
            raise ConfigurationError(
                f"custom_role_conversions cannot make role {source!r} 'tool': what it says is not the result of a call."
            )
        table[source] = target
    return table


def _known_role(value: object) -> str:
    role = value.value if isinstance(value, Enum) else value
    if isinstance(role, str) and role in _ROLES:
        return role
    close = difflib.get_close_matches(role, _ROLES, n=1) if isinstance(role, str) else ()
    hint = f"did you mean {close[0]!r}?" if close else f"the roles are {', '.join(_ROLES)}."
    raise ConfigurationError(f"custom_role_conversions has an unknown role {role!r}: {hint}")
