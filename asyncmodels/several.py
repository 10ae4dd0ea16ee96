"""Several models as one: a Model that falls back from one to the next, and a Model that chooses among equals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Unpack

from asyncmodels.backend import Backend
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.policies.choice import By
from asyncmodels.policies.endpoint import Price
from asyncmodels.policies.fallback import Errors, Fallback
from asyncmodels.policies.route import Route
from asyncmodels.request import Parameters

__all__ = ["FallbackModel", "RouteModel"]

PolicyLike = Callable[[Backend], Backend]


class FallbackModel(Model):
    """The first model, and where it fails the second, and so on, as one model::

        model = FallbackModel(OpenAIModel("gpt-5"), BedrockModel("anthropic.claude-..."), SmolLMModel())

    Each keeps its whole chain and its defaults. When the next one's turn comes, and what the other settings mean, says
    ``Fallback``; ``policies`` are put around the whole, the outermost first, and ``defaults`` are parameters of every
    call. The model owns the others: closing it closes them, unless ``closes=False``.
    """

    def __init__(
        self,
        first: Backend,
        *others: Backend,
        on: Errors | Callable[[Exception], bool] | None = None,
        also: Errors = (),
        context_lengths: Sequence[int | None] | None = None,
        cooldown: float | None = 30.0,
        cooldown_after: int = 3,
        names: Sequence[str] | None = None,
        closes: bool = True,
        policies: Sequence[PolicyLike] = (),
        clock: Clock = SYSTEM_CLOCK,
        **defaults: Unpack[Parameters],
    ) -> None:
        if not others:
            raise ConfigurationError("FallbackModel needs at least two models: FallbackModel(first, second).")
        fallback = Fallback(
            first,
            to=others,
            on=on,
            also=also,
            context_lengths=context_lengths,
            cooldown=cooldown,
            cooldown_after=cooldown_after,
            names=names,
            closes=closes,
            clock=clock,
        )
        super().__init__(fallback, *policies, defaults=defaults, model_id=" → ".join(fallback.branches()))


class RouteModel(Model):
    """Several endpoints of one model, or several models as good, as one model::

        model = RouteModel(eu, us, asia, by="least_in_flight", sticky="agent")
        model.link(Route).set_weight("us", 0.5)

    Each keeps its whole chain and its defaults. How one is chosen, and what the settings mean, says ``Route``, which
    can be changed while calls are in flight; ``policies`` are put around the whole, the outermost first, and
    ``defaults`` are parameters of every call. The model owns the others: closing it closes them, unless
    ``closes=False``.
    """

    def __init__(
        self,
        *models: Backend,
        by: By = "weights",
        weights: Sequence[float] | None = None,
        prices: Sequence[Price] | None = None,
        sticky: Literal["agent"] | None = None,
        spill: float = 1.25,
        tries: int = 2,
        out_after: int = 3,
        out_first: float = 1.0,
        out_longest: float = 60.0,
        names: Sequence[str] | None = None,
        closes: bool = True,
        policies: Sequence[PolicyLike] = (),
        clock: Clock = SYSTEM_CLOCK,
        **defaults: Unpack[Parameters],
    ) -> None:
        if not models:
            raise ConfigurationError("RouteModel needs at least one model: RouteModel(first, second).")
        route = Route(
            models[0],
            to=models[1:],
            by=by,
            weights=weights,
            prices=prices,
            sticky=sticky,
            spill=spill,
            tries=tries,
            out_after=out_after,
            out_first=out_first,
            out_longest=out_longest,
            names=names,
            closes=closes,
            clock=clock,
        )
        super().__init__(route, *policies, defaults=defaults, model_id=" | ".join(route.branches()))
