"""inspect_ai on any model of ours: ``inspect eval task.py --model asyncmodels/openai/gpt-5``.

inspect_ai imports this module by its entry point whenever it looks for a provider, so nothing heavy is imported here.
``AsyncModelsAPI`` says how names are read and what arguments there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from asyncmodels.errors import ConfigurationError, MissingExtraError

try:
    from inspect_ai.model import GenerateConfig, Model, ModelAPI, modelapi
except ModuleNotFoundError as error:
    missing = (error.name or "inspect_ai").partition(".")[0]
    raise MissingExtraError(
        f'The provider for inspect_ai needs the package {missing!r}: pip install "asyncmodels[inspect]"'
    ) from error

if TYPE_CHECKING:
    from asyncmodels.model import Model as OurModel

__all__ = ["inspect_model", "provider"]


@modelapi(name="asyncmodels")
def provider() -> type[ModelAPI]:
    """What inspect_ai calls to get the class, by the name that the decorator gives it."""
    from asyncmodels.integrations.inspect_ai_provider import AsyncModelsAPI

    return AsyncModelsAPI


def inspect_model(model: OurModel, *, name: str | None = None, config: GenerateConfig | None = None) -> Model:
    """A model of ours, made in Python, as one of inspect_ai's: ``eval(task, model=inspect_model(my_model))``.

    Logs call it ``asyncmodels/<name>``, by its ``model_id`` where no name is given. Closing it closes ``model``.
    Raises ConfigurationError for what is no Model.
    """
    from asyncmodels.model import Model as OurModel  # not needed where nothing of ours is used

    if not isinstance(model, OurModel):
        raise ConfigurationError(f"inspect_model takes a Model of asyncmodels, not {type(model).__name__}.")
    config = GenerateConfig() if config is None else config
    make = cast("Any", provider)  # the decorator made of it what makes the provider
    api = make(model_name=name or model.model_id or type(model).__name__, config=config, instance=model)
    made = Model(api, config)
    api.qualified_model_name = str(made)
    return made
