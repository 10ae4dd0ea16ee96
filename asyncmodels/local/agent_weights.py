"""How much of an engine an agent may have beside others: 1, unless a mapping or a function says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from asyncmodels.errors import ConfigurationError

__all__ = ["AgentWeights"]


class AgentWeights:
    """The weight of each agent, by ``given``: a mapping from agents to numbers, a function of the agent, or None.

    Raises ConfigurationError for anything else, and for a number that is no weight.
    """

    def __init__(self, given: Mapping[str, float] | Callable[[str | None], float] | None) -> None:
        if isinstance(given, Mapping):
            for agent, weight in given.items():
                if not isinstance(agent, str):
                    raise ConfigurationError(f"agent_weights must name agents by strings, not {agent!r}.")
                _check(agent, weight)
            given = dict(given)
        elif given is not None and not callable(given):
            raise ConfigurationError(
                f"agent_weights must be a mapping from agents to numbers or a function, not {given!r}."
            )
        self._given = given

    def of(self, agent: str | None) -> float:
        """Raises ConfigurationError where the function does not know one, or fails."""
        if self._given is None:
            return 1.0
        if not callable(self._given):
            return 1.0 if agent is None else self._given.get(agent, 1.0)
        try:
            weight = self._given(agent)
        except Exception as error:
            raise ConfigurationError(
                f"The function agent_weights failed for agent {agent!r} ({type(error).__name__}: {error})."
            ) from error
        _check(agent, weight)
        return weight


def _check(agent: object, weight: object) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigurationError(f"The weight of agent {agent!r} must be a number above 0, not {weight!r}.")
