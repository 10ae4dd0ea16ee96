"""The roles that callers rename, checked when a model is made: it would otherwise refuse them at its first call."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest

from asyncmodels import ConfigurationError
from asyncmodels.roles import checked_conversions


class Role(StrEnum):
    SYSTEM = "system"
    TOOL_CALL = "tool-call"


@pytest.mark.parametrize(
    ("conversions", "checked"),
    [
        (None, {}),
        ({}, {}),
        (
            {"system": "user", "tool": "user", "developer": "system"},
            {"system": "user", "tool": "user", "developer": "system"},
        ),
        ({"tool-call": "assistant", "tool-response": "user"}, {"tool-call": "assistant", "tool-response": "user"}),
        ({"tool-response": "tool", "tool": "tool"}, {"tool-response": "tool", "tool": "tool"}),
        ({Role.SYSTEM: Role.TOOL_CALL}, {"system": "tool-call"}),
    ],
)
def test_conversions_that_can_work(conversions: Any, checked: dict[str, str]) -> None:
    """Roles of ours and of smolagents, as text or as members of an enumeration; what comes back is plain text."""
    found = checked_conversions(conversions)
    assert found == checked
    assert {type(role) for role in (*found, *found.values())} <= {str}


@pytest.mark.parametrize(
    ("conversions", "words"),
    [
        ({"sytem": "user"}, "unknown role 'sytem': did you mean 'system'"),
        ({"user": "martian"}, "unknown role 'martian': the roles are system, "),
        ({"user": 5}, "unknown role 5"),
        ({None: "user"}, "unknown role None"),
        ({"user": ["a"]}, "unknown role"),
        ({"user": "tool"}, "'user' 'tool'"),
        ([("user", "system")], "dict of roles"),
    ],
)
def test_conversions_that_cannot_work(conversions: Any, words: str) -> None:
    """Are a ConfigurationError in one sentence."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        checked_conversions(conversions)
    assert "\n" not in str(caught.value)
