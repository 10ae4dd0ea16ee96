"""What all tests share: a clean environment, and a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
from collections.abc import Generator, Iterator

import pytest

from tests.server.handle import Server, running

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PREFIXES = (
    "OPENAI_",
    "AZURE_OPENAI_",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_OIDC_",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_",
    "ANTHROPIC_",
    "LITELLM_",
    "OPENROUTER_",
    # the rows of asyncmodels/remote/providers.py
    "CEREBRAS_",
    "CO_API_KEY",
    "COHERE_",
    "DASHSCOPE_",
    "DEEPINFRA_",
    "DEEPSEEK_",
    "FIREWORKS_",
    "GEMINI_",
    "GOOGLE_API_KEY",
    "GROQ_",
    "LLAMA_API_KEY",
    "MISTRAL_",
    "MOONSHOT_",
    "NVIDIA_API_KEY",
    "OLLAMA_",
    "PERPLEXITY_",
    "PPLX_",
    "SAMBANOVA_",
    "TOGETHER_",
    "VLLM_API_KEY",
    "XAI_",
    "ZAI_",
)

_END_WITHIN = 120.0


def pytest_configure() -> None:
    """Lets Ctrl-C reach the programs that tests start: what a shell runs in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """After the last test no timeout holds; a process that then waits for a thread says for which, and ends."""
    faulthandler.dump_traceback_later(_END_WITHIN, exit=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Takes what collecting imports, two thirds of a million objects, out of the garbage collector's sight for good.

    Else it is looked through again at every full collection, which takes each process several seconds of a run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        # While it is imported it asks the collector who holds what others register, so that must come before.
        import hypothesis  # noqa: F401  # for what its import does

        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see, or send, the keys and proxies of whoever runs it."""
    for name in list(os.environ):
        if name.lower() in _PROXIES or name in _CERTIFICATES or name.startswith(_PREFIXES):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The misbehaving server, in a process of its own; ``tests/server/handle.py`` says how to use it."""
    with running(tmp_path_factory.mktemp("server")) as handle:
        yield handle
