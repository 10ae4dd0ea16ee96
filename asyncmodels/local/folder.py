"""Whether the name of a model can be one: a look at the disk, before anything expensive is imported or loaded."""

from __future__ import annotations

import os
from pathlib import Path

from asyncmodels.errors import ModelLoadError

__all__ = ["model_source"]


def model_source(model_id: str) -> str:
    """What to load for ``model_id``: a folder with a model, or what may be the name of a repository.

    Raises ModelLoadError for a path that leads to no model.
    """
    path = Path(model_id).expanduser()
    looks_like_path = path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"The folder {model_id!r} is not a model: it has no config.json.")
        return str(path)
    if path.exists():
        raise ModelLoadError(f"{model_id!r} is a file; a model is a folder or the name of a repository.")
    if looks_like_path or (os.sep != "/" and os.sep in model_id):
        raise ModelLoadError(f"There is no folder {model_id!r}.")
    return model_id
