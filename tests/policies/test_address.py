"""Addresses in which something is mistyped are told from the paths of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.address import is_mistyped_address
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.testing import ScriptedBackend

MISTYPED = [
    "redis//:hunter2@localhost",
    "rediss:/:hunter2@localhost",
    "redis:hunter2@localhost",
    "REDIS:/localhost",
    "redi:/user:hunter2@localhost:6379/0",
    "user:hunter2@localhost",
    "user:hun/ter2@localhost",
    "unix:/tmp/redis.sock?password=hunter2",
    "C:/user:hunter2@localhost",
]


@pytest.mark.parametrize("text", MISTYPED)
def test_what_may_hold_a_password_is_refused_and_not_shown(text: str) -> None:
    """Neither a limit nor a cache takes it for a file, and the error does not repeat it."""
    assert is_mistyped_address(text)
    for make in (
        lambda: RateLimit(ScriptedBackend(), requests_per_minute=5, shared=text),
        lambda: RateLimit(ScriptedBackend(), requests_per_minute=5, shared=Path(text)),
        lambda: Cache(ScriptedBackend(), store=text),
    ):
        with pytest.raises(ConfigurationError, match="path") as failure:
            make()
        assert "hunter2" not in str(failure.value)
        assert "ter2@" not in str(failure.value)


@pytest.mark.parametrize(
    "path",
    [
        "limits.db",
        "redis/limits.db",
        "redis.db",
        "/home/me@work/limits.db",
        r"C:\Users\me@work\limits.db",
        "C:/Users/me@work/limits.db",
        "./12:30.db",
        "a?b.db",
    ],
)
def test_paths_are_paths(path: str) -> None:
    """Odd names of files stay what they are."""
    assert not is_mistyped_address(path)
