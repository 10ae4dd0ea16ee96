"""smolagents' agents on a model that is shown images, through our engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from smolagents import ToolCallingAgent
from smolagents.agents import EMPTY_PROMPT_TEMPLATES
from smolagents.models import ChatMessage, MessageRole

from asyncmodels.errors import UnsupportedError
from asyncmodels.integrations.smolagents import SmolagentsModel
from asyncmodels.local.transformers import TransformersModel

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


RED, BLUE = (Image.new("RGB", (40, 24), color) for color in ("red", "blue"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.local.on_torch.tiny_vision import build_vision_model

    return build_vision_model(tmp_path_factory.mktemp("smolvlm"), "smolvlm")


@pytest.fixture
def model(folder: Path) -> Iterator[SmolagentsModel]:
    with SmolagentsModel(TransformersModel(str(folder), torch_dtype="float32", max_tokens=24)) as made:
        yield made


def test_a_message_with_an_image(model: SmolagentsModel) -> None:
    """An image in a message of smolagents is seen: another one makes another answer, and its tokens count."""
    asked = [
        [
            ChatMessage(
                MessageRole.USER, [{"type": "text", "text": "what?"}, *({"type": "image", "image": i} for i in each)]
            )
        ]
        for each in ([], [RED], [BLUE])
    ]
    answers = [model.generate(messages) for messages in asked]
    assert len({answer.content for answer in answers}) == 3
    tokens = [answer.token_usage.input_tokens for answer in answers if answer.token_usage]
    assert tokens[0] + 20 < tokens[1] == tokens[2]


def test_an_agent_that_is_given_images(model: SmolagentsModel) -> None:
    """What an agent is given to look at reaches the model with its task."""
    templates = copy.deepcopy(EMPTY_PROMPT_TEMPLATES)
    templates["system_prompt"] = "Be brief."
    used: list[int] = []
    for images in (None, [RED], [RED, BLUE]):
        agent: Any = ToolCallingAgent([], model, prompt_templates=templates, max_steps=1, verbosity_level=-1)
        agent.run("what?", images=images)
        used.append(agent.memory.steps[1].token_usage.input_tokens)
    assert used[0] < used[1] < used[2]


def test_text_only(model: SmolagentsModel) -> None:
    """An agent's model that is told to flatten messages refuses images, as it does for every model."""
    message = ChatMessage(MessageRole.USER, [{"type": "image", "image": RED}])
    with pytest.raises(UnsupportedError):
        model.generate([message], flatten_messages_as_text=True)
