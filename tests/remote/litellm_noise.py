"""Warnings of litellm's own that no caller can help; everything else stays an error."""

from __future__ import annotations

import pytest

__all__ = ["NOISE"]

NOISE = [
    pytest.mark.filterwarnings(f"ignore:{message}:{category}")
    for message, category in (
        # It asks pydantic's objects for attributes by their names, at the end of each stream.
        ("Accessing the 'model_(computed_)?fields' attribute", "pydantic.warnings.PydanticDeprecatedSince211"),
        # It dumps answers that are not what the openai package says they are.
        ("Pydantic serializer warnings", "UserWarning"),
        # It declares read-only items, which pydantic cannot keep.
        ("Item '.*' on TypedDict class '.*' is using the `ReadOnly` qualifier", "UserWarning"),
    )
]
