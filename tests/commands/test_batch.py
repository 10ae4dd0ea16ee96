"""``asyncmodels batch``: what goes in, what comes out, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from asyncmodels.batch.reading import read_journal
from asyncmodels.cli import main
from tests.batch.bulk_provider import QUICK
from tests.commands.asking import asked, contents, lines, refused, wrote
from tests.commands.conftest import Provided, Started
from tests.server.batches import running_provider
from tests.server.handle import Place
from tests.server.script import Answer

# -- what goes in -----------------------------------------------------------------------------------------------------


def test_json_lines(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Objects with a prompt or messages, an id and parameters of their own, texts, and lists of messages."""
    path = wrote(
        "in.jsonl",
        {"id": "a", "prompt": "Größe?", "max_tokens": 7},
        {"id": 5, "messages": [{"role": "user", "content": "two"}]},
        "three",
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "four"}],
    )
    assert main(["batch", path, "-o", "out.jsonl", "--max-tokens", "9", "--system", "Be kind."]) == 0
    assert contents("out.jsonl") == {"a": "Größe?", "5": "two", "2": "three", "3": "four"}
    bodies = {body["messages"][-1]["content"]: body for body in asked(place)}
    assert bodies["Größe?"]["max_completion_tokens" if "max_completion_tokens" in bodies["two"] else "max_tokens"] == 7
    assert [body["messages"][0]["content"] for body in bodies.values()].count("Be kind.") == 3
    assert bodies["four"]["messages"][0]["content"] == "Short."
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncmodels batch: 4 of 4 answered in ")
    assert err.endswith("-> out.jsonl\n")
    row = next(row for row in lines("out.jsonl") if row["id"] == "a")
    assert row.keys() >= {"content", "finish_reason", "input_tokens", "output_tokens", "seconds", "attempts", "model"}
    assert "error" not in row


@pytest.mark.usefixtures("place")
def test_plain_lines() -> None:
    """Each line that is not empty is a prompt; the mark of Windows' editors, and its line ends, are none of it."""
    Path("in.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \ntwo\nthree")
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 0
    assert contents("out.jsonl") == {"0": "one", "1": "two", "2": "three"}


@pytest.mark.usefixtures("place")
def test_csv_with_a_template() -> None:
    """Fields are filled into the prompt, also where they have lines of their own; columns that are kept come along."""
    Path("in.csv").write_text('id,question,answer\na,"How\nmany, of ""these""?",3\nb,Why {x}?,no\n')
    command = ["batch", "in.csv", "--template", "Reply: {question} {{}}", "--keep", "answer", "-o", "out.csv"]
    assert main([*command, "--ordered"]) == 0
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["content"], row["answer"]) for row in rows] == [
        ("a", 'Reply: How\nmany, of "these"? {}', "3"),
        ("b", "Reply: Why {x}? {}", "no"),
    ]


@pytest.mark.usefixtures("place")
def test_lists_of_messages(capsys: pytest.CaptureFixture[str]) -> None:
    """A first line that is a list of messages is one; that of an array of everything is not taken for it."""
    assert main(["batch", wrote("in.jsonl", [{"role": "user", "content": "one"}]), "-o", "out.jsonl"]) == 0
    assert contents("out.jsonl") == {"0": "one"}
    capsys.readouterr()
    for text in (
        '[{"prompt": "x"}, {"prompt": "y"}]',
        '[{"prompt": "x"},\n{"prompt": "y"}]',
        "[\n1]",
        '[{\n"prompt": "x"}]',
        "[]",
    ):
        Path("in.json").write_text(text)
        assert main(["batch", "in.json"]) == 2
        assert "in.json is one JSON array" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_halves_of_characters() -> None:
    """JSON can hold what no encoding can: it is asked and written as far as that goes, and the rest goes on."""
    Path("in.jsonl").write_text('{"id": "\\ud800", "prompt": "a \\udfff"}\n{"id": "b", "prompt": "b"}\n')
    assert main(["batch", "in.jsonl", "-o", "out.jsonl"]) in (0, 1)
    assert {row["id"] for row in lines("out.jsonl")} == {"\ud800", "b"}
    assert contents("out.jsonl")["b"] == "b"


@pytest.mark.usefixtures("place")
def test_other_tables() -> None:
    """Tabs by the suffix, any delimiter by its option, columns by theirs, and a template from a file."""
    Path("in.tsv").write_text("name\tprompt\nx\tone\ny\ttwo\n")
    assert main(["batch", "in.tsv", "--id-column", "name", "-o", "a.jsonl"]) == 0
    assert contents("a.jsonl") == {"x": "one", "y": "two"}
    Path("in.data").write_text("frage;id\neins;1\n")
    command = ["batch", "in.data", "--input-format", "csv", "--delimiter", ";", "-o", "b.jsonl"]
    assert main([*command, "--column", "frage"]) == 0
    assert contents("b.jsonl") == {"1": "eins"}
    Path("template.txt").write_text("<{frage}>")
    assert main([*command, "--overwrite", "--template", "@template.txt"]) == 0
    assert contents("b.jsonl") == {"1": "<eins>"}


def test_parquet(place: Place) -> None:
    """Prompts, or whole messages, from a column; nothing else of the file is read, and empty fields are errors."""
    messages = [[{"role": "system", "content": "S", "name": None}, {"role": "user", "content": "hm", "name": None}]]
    parquet.write_table(pyarrow.table({"id": [7], "messages": messages, "blob": [b"\xff"]}), "m.parquet")
    assert main(["batch", "m.parquet", "-o", "m.jsonl"]) == 0
    assert contents("m.jsonl") == {"7": "hm"}
    assert asked(place)[-1]["messages"][0] == {"role": "system", "content": "S"}
    parquet.write_table(pyarrow.table({"prompt": ["one", None, "three"], "n": [1, 2, 3]}), "p.parquet")
    assert main(["batch", "p.parquet", "-o", "out.parquet", "--keep", "n", "--ordered"]) == 1
    rows = parquet.read_table("out.parquet").to_pylist()
    assert [(row["id"], row["content"], row["n"]) for row in rows] == [
        ("0", "one", "1"),
        ("1", None, "2"),
        ("2", "three", "3"),
    ]
    assert rows[1]["error_text"] == "p.parquet, row 2: its field 'prompt' is empty."


def test_json_rows_as_data(place: Place) -> None:
    """With a template the fields of an object are data, whatever their names; what is no text is written as JSON."""
    path = wrote("in.jsonl", {"id": 1, "model": "T", "list": [1, "é"], "temperature": "hot"})
    assert main(["batch", path, "-o", "out.jsonl", "--template", "{model} {list} {temperature}"]) == 0
    assert contents("out.jsonl") == {"1": 'T [1, "é"] hot'}
    assert "temperature" not in asked(place)[0]


def test_openai_lines_in_and_out(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's batch files are asked with their parameters and answered in OpenAI's shape, errors included."""
    body = {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stop": ["END"],
        "reasoning_effort": "low",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "temperature": None,
    }
    line = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path = wrote("in.jsonl", line, {**line, "custom_id": "r2", "url": "/v1/embeddings"}, {"custom_id": "r3"})
    assert main(["batch", path, "-o", "out.jsonl"]) == 1
    (sent,) = asked(place)
    assert sent["model"] == "m"
    assert (sent["stop"], sent["reasoning_effort"], sent["tools"][0]["function"]["name"]) == (["END"], "low", "f")
    rows = {row["custom_id"]: row for row in lines("out.jsonl")}
    good = rows["r1"]["response"]
    assert (good["status_code"], rows["r1"]["error"]) == (200, None)
    assert good["body"]["choices"][0]["message"]["content"] == "hi"
    assert good["body"]["usage"]["total_tokens"] > 0
    assert "only POST /v1/chat/completions is understood" in rows["r2"]["error"]["message"]
    assert rows["r3"]["error"]["code"] == "InvalidRequestError"
    assert "the lines name the model 'gpt-x', and 'openai:m' is asked" in capsys.readouterr().err


def test_openai_lines_of_a_server_that_refuses(provided: Provided) -> None:
    """What the server said is in the line, with its status."""
    provided(Answer(status=400, body='{"error": {"message": "No such thing."}}'))
    line = {"custom_id": "r1", "body": {"messages": [{"role": "user", "content": "hi"}]}}
    assert main(["batch", wrote("in.jsonl", line), "-o", "out.jsonl"]) == 1
    (row,) = lines("out.jsonl")
    assert row["response"]["status_code"] == 400
    assert "No such thing." in row["error"]["message"]


def test_piped_prompts(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file what is piped in is asked, and answers go to standard output as JSON lines."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("one\nzwölf\n".encode()), encoding="ascii"))
    assert main(["batch", "-q"]) == 0
    out, err = capsys.readouterr()
    assert {json.loads(line)["content"] for line in out.splitlines()} == {"one", "zwölf"}
    assert err == ""
    assert len(asked(place)) == 2


@pytest.mark.usefixtures("place")
def test_a_pipe_that_goes_on(started: Started) -> None:
    """Each line is asked as it comes, without waiting for the next; the format is told by the first."""
    with started("batch", "--concurrency", "4", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(f'{{"id": "n{number}", "prompt": "say {number}"}}\n')
            process.stdin.flush()
            row = json.loads(process.stdout.readline())
            assert (row["id"], row["content"]) == (f"n{number}", f"say {number}")
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait() == 0


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_arrive(provided: Provided) -> None:
    """Every option of a request is in what the server gets."""
    place = provided(Answer(content='{"n": 3}'))
    Path("s.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    options = "--temperature 0.5 --top-p 0.9 --seed 3 --stop END --schema s.json --param presence_penalty=0.5"
    Path("in.txt").write_text("How many?\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", *options.split(), "--param", 'extra={"x": 1}']) == 0
    (body,) = asked(place)
    assert {name: body[name] for name in ("temperature", "top_p", "seed", "stop", "presence_penalty", "x")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["END"],
        "presence_penalty": 0.5,
        "x": 1,
    }
    assert body["response_format"]["type"] == "json_schema"
    assert lines("out.jsonl")[0]["parsed"] == {"n": 3}


def test_limits_and_settings_of_the_model(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits, a budget, a number of calls at once and the class's own settings are the model's."""
    seen: list[dict[str, Any]] = []
    from asyncmodels.remote.openai import OpenAIModel

    def made(name: str, **settings: Any) -> OpenAIModel:
        seen.append(settings)
        return OpenAIModel(name, **{key: value for key, value in settings.items() if key != "budget"})

    monkeypatch.setattr("asyncmodels.registry._class_of", lambda row: made)
    Path("in.txt").write_text("x\n")
    options = "--rpm 600 --tpm 5000 --budget 2.5 --concurrency 3 --model-arg max_tokens_field=max_tokens"
    assert main(["batch", "in.txt", "-q", *options.split()]) == 0
    assert seen == [
        {
            "max_concurrency": 3,
            "requests_per_minute": 600.0,
            "tokens_per_minute": 5000.0,
            "budget": 2.5,
            "max_tokens_field": "max_tokens",
        }
    ]
    assert len(asked(place)) == 1


def test_limit_and_shuffle(place: Place) -> None:
    """Only the first rows are read, in an order that the seed decides."""
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(50)))
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--limit", "20", "--shuffle", "4", "--concurrency", "1"]) == 0
    order = [int(body["messages"][0]["content"]) for body in asked(place)]
    assert sorted(order) == list(range(20)) != order
    assert [int(row["id"]) for row in lines("out.jsonl")] == order


@pytest.mark.usefixtures("place")
def test_in_order() -> None:
    """On demand results come in the order of the input."""
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(200)))
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--ordered"]) == 0
    assert [row["id"] for row in lines("out.jsonl")] == [str(number) for number in range(200)]


def test_progress_where_nobody_looks(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown on demand, with how much there is to come, which a file says."""
    Path("in.txt").write_text("1\n2\n\n3\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--progress"]) == 0
    assert "3/3 100%" in capsys.readouterr().err
    assert len(asked(place)) == 3


# -- how it ends ------------------------------------------------------------------------------------------------------


def test_failed_items(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """Some failed: exit code 1, a row for each that says why, and one example of each kind on standard error."""
    provided(Answer(echo=True), Answer(status=400, body='{"error": {"message": "Not\\nthis."}}'))
    Path("in.txt").write_text("1\n2\n3\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]) == 1
    assert contents("out.jsonl") == {"0": "1", "1": None, "2": None}
    assert lines("out.jsonl")[1]["error"] == "InvalidRequestError"
    assert lines("out.jsonl")[1]["error_status"] == 400
    err = capsys.readouterr().err.splitlines()
    assert "1 of 3 answered" in err[0]
    assert "2 failed" in err[0]
    assert err[1].startswith(
        "asyncmodels batch:   2 InvalidRequestError, such as id '1': The provider answered 400: Not this."
    )


def test_a_run_that_cannot_go_well_is_stopped(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong key is not tried a thousand times; that is another exit code than an error here and there."""
    place = provided(Answer(status=401, body='{"error": {"message": "Wrong key."}}'))
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(1000)))
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "2", "--no-journal"]) == 3
    assert len(asked(place)) < 20
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("asyncmodels batch: All were refused alike, so the run was stopped (AuthenticationError): ")


def test_what_is_one_prompt_s_own_trouble_stops_nothing(provided: Provided) -> None:
    """Many prompts that are too long, or refused for what is in them, say nothing of the others."""
    long = '{"error": {"code": "context_length_exceeded", "message": "This prompt is too long."}}'
    place = provided(*[Answer(status=400, body=long)] * 15, Answer(echo=True))
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(30)))
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]) == 1
    assert len(asked(place)) == 30


def test_too_many_errors(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """--max-errors says how many are too many. What was answered until the end is in the output, too."""
    place = provided(Answer(status=400, body='{"error": {"message": "No."}}'))
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(100)))
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1", "--max-errors", "14"]) == 3
    with read_journal("out.jsonl.sqlite") as journal:
        assert 15 <= len(lines("out.jsonl")) == len(journal) <= len(asked(place)) <= 17
    assert "The run was stopped after 15 errors (max_errors=14)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.txt"], "nowhere.txt cannot be read: No such file or directory."),
        (["."], ". cannot be read: Is a directory."),
        (["in.txt", "-o", "no/out.jsonl"], "the folder no does not exist."),
        (["in.txt", "-o", "out.doc"], "out.doc says no format: let it end in .jsonl, .csv or .parquet"),
        (
            ["in.txt", "-o", "in.txt", "--output-format", "jsonl", "--overwrite"],
            "in.txt is the input and cannot be the out",
        ),
        (["in.txt", "-o", "."], ". is a folder; -o needs the name of a file."),
        (["in.txt", "--output-format", "csv"], "csv needs a file: -o FILE."),
        (["in.txt", "-o", "o.parquet", "--no-journal"], "a Parquet file can be read only when it is whole"),
        (["in.txt", "--template", "no place"], "--template has no place for a field"),
        (["in.txt", "--template", "{a.b!r}"], "--template has a place without a plain name"),
        (["in.txt", "--template", "{a"], "--template has a brace too many or too few"),
        (["in.txt", "--template", "@nowhere"], "nowhere, which --template names, cannot be read"),
        (["in.txt", "--template", "{x}", "--column", "x"], "--template and --column both say what the prompt is"),
        (["in.txt", "--param", "top_k"], "--param needs NAME=VALUE, not 'top_k'."),
        (["in.txt", "--param", "temprature=1"], "Unknown parameter 'temprature': did you mean 'temperature'?"),
        (["in.txt", "--temperature", "-1"], "temperature must be at least 0"),
        (["in.txt", "--seed", "1", "--param", "seed=2"], "seed is given twice"),
        (["in.txt", "--keep", "content"], "--keep content: the output has a field of that name already."),
        (["in.txt", "--journal", "j.txt"], "--journal needs a path that ends in .sqlite (or .db) or in .jsonl"),
        (["in.txt", "--journal", "j.db", "--no-journal"], "--no-journal leaves nothing for --journal"),
        (["in.txt", "--resume"], "--resume needs the output of a run (-o), or its --journal."),
        (["in.txt", "--ordered", "--shuffle", "1"], "ConfigurationError: ordered has results wait for their turn"),
        (["in.txt", "--model-arg", "policies=3"], "ConfigurationError: policies is a list of policies, not a "),
        (
            ["in.txt", "--model-arg", "max_concurency=3"],
            "ConfigurationError: Unknown parameter 'max_concurency': did you",
        ),
        (["in.txt", "-m", "opnai:m"], "UnknownSchemeError: Unknown scheme 'opnai': did you mean 'openai'?"),
        (["array.jsonl"], "array.jsonl is one JSON array; JSON lines are needed"),
        (["utf16.csv"], "utf16.csv is UTF-16; save it as UTF-8."),
        (["empty.csv"], "empty.csv is empty: not even a header is in it."),
        (["twice.csv"], "twice.csv has the column 'a' more than once."),
        (
            ["table.csv"],
            "table.csv has no column 'prompt'; it has 'question', 'b': choose what to ask with --column or --t",
        ),
        (
            ["table.csv", "--column", "question", "--id-column", "nr"],
            "table.csv has no column 'nr'; it has 'question', 'b'.",
        ),
        (["table.csv", "--template", "{a}"], "table.csv has no column 'a'; it has 'question', 'b'."),
        (["no.parquet"], "no.parquet is no Parquet file, or a damaged one: "),
    ],
)
def test_wrong_usage(
    arguments: list[str], said: str, place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One sentence, the exit code 2, nothing asked, and no file left behind."""
    Path("in.txt").write_text("x\n")
    Path("array.jsonl").write_text('[\n{"prompt": "x"}\n]\n')
    Path("utf16.csv").write_bytes("prompt\nx\n".encode("utf-16"))
    Path("empty.csv").write_text("")
    Path("twice.csv").write_text("a,a\n1,2\n")
    Path("table.csv").write_text("question,b\n1,2\n")
    Path("no.parquet").write_bytes(b"PAR1 and no more")
    before = sorted(tmp_path.iterdir())
    assert refused(capsys, place, *arguments).startswith(said)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "option",
    [["--concurrency", "0"], ["--rpm", "-1"], ["--max-tokens", "x"], ["--limit", "0"], ["--overwrite", "--resume"]],
)
def test_wrong_numbers(option: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no number of the kind that is needed is wrong usage, too."""
    with pytest.raises(SystemExit) as caught:
        main(["batch", "in.txt", *option])
    assert caught.value.code == 2
    assert "asyncmodels batch: error: argument" in capsys.readouterr().err
    assert asked(place) == []


def test_missing_key(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot be made is said before there is an output."""
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    Path("in.txt").write_text("x\n")
    assert refused(capsys, place, "in.txt", "-o", "out.jsonl").startswith("MissingKeyError: ")
    assert not Path("out.jsonl").exists()


@pytest.mark.usefixtures("place")
def test_a_closed_pipe(started: Started) -> None:
    """When whoever reads stops reading, as ``head`` does, the program ends quietly with 141."""
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(2000)))
    with started("batch", "in.txt", "--concurrency", "5") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)


# -- journals ---------------------------------------------------------------------------------------------------------


def test_going_on(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run asks only for what is missing or failed, says what it reuses, and writes each row once."""
    Path("in.txt").write_text("".join(f"{number}\n" for number in range(10)))
    bad = Answer(status=400, body='{"error": {"message": "No."}}')
    place = provided(*[Answer(echo=True)] * 6, bad, bad, *[Answer(echo=True)] * 20)
    command = ["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]
    assert main(command) == 1
    assert len(asked(place)) == 10
    capsys.readouterr()
    assert "out.jsonl exists: --resume goes on with the run that made it" in refused(capsys, place, *command[1:])
    assert main([*command, "--resume"]) == 0
    assert len(asked(place)) == 12
    assert contents("out.jsonl") == {str(number): str(number) for number in range(10)}
    assert len(lines("out.jsonl")) == 10
    assert sum(row.get("reused", False) for row in lines("out.jsonl")) == 8
    assert "10 of 10 answered" in (said := capsys.readouterr().err)
    assert "8 reused from the journal out.jsonl.sqlite" in said


def test_starting_over(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite asks everything again; a file that is no journal is not taken for one."""
    Path("in.txt").write_text("1\n2\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 0
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--overwrite", "--temperature", "1"]) == 0
    assert len(asked(place)) == 4
    assert len(lines("out.jsonl")) == 2
    with read_journal("out.jsonl.sqlite") as journal:
        assert len(journal) == 2
    Path("mine.db").write_bytes(b"my notes")
    capsys.readouterr()
    said = refused(capsys, place, "in.txt", "-o", "new.jsonl", "--overwrite", "--journal", "mine.db")
    assert said.startswith("JournalError: The file 'mine.db' is no journal")
    assert Path("mine.db").read_bytes() == b"my notes"
    assert not Path("new.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--temperature", "0.5"], "Item '0' of the journal 'out.jsonl.sqlite' was asked something else: temperature"),
        (["--system", "Hm."], "Item '0' of the journal 'out.jsonl.sqlite' was asked something else: "),
        (["-m", "openai:other"], "The journal 'out.jsonl.sqlite' is that of another run: "),
    ],
)
def test_another_run(changed: list[str], said: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not as in the journal is refused, with what differs and what can be done; the output stays."""
    Path("in.txt").write_text("1\n2\n")
    command = ["in.txt", "-o", "out.jsonl", "--resume", "--concurrency", "1"]
    assert main(["batch", *command]) == 0
    before = Path("out.jsonl").read_bytes()
    capsys.readouterr()
    error = refused(capsys, place, *command, *changed)
    assert error.startswith(said)
    assert "--ask-changed asks anew what differs and keeps the rest, --overwrite starts over" in error
    assert Path("out.jsonl").read_bytes() == before
    assert main(["batch", *command, *changed, "--ask-changed"]) == 0
    assert len(asked(place)) == 4
    assert len(lines("out.jsonl")) == 2


def test_only_a_changed_row_is_asked_anew(place: Place) -> None:
    """--ask-changed keeps what is as it was."""
    Path("in.csv").write_text("id,prompt\na,1\nb,2\nc,3\n")
    assert main(["batch", "in.csv", "-o", "out.jsonl"]) == 0
    Path("in.csv").write_text("id,prompt\nc,3\nb,two\na,1\nd,4\n")
    assert main(["batch", "in.csv", "-o", "out.jsonl", "--resume", "--ask-changed"]) == 0
    assert contents("out.jsonl") == {"a": "1", "b": "two", "c": "3", "d": "4"}
    assert len(asked(place)) == 5


def test_a_run_without_its_journal(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """An output whose journal is gone cannot be resumed, and is not touched."""
    Path("in.txt").write_text("1\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--no-journal"]) == 0
    assert not Path("out.jsonl.sqlite").exists()
    capsys.readouterr()
    said = refused(capsys, place, "in.txt", "-o", "out.jsonl", "--resume")
    assert said == "there is no journal out.jsonl.sqlite, so the run that made out.jsonl cannot be resumed."


def test_parquet_is_resumed_too(place: Place) -> None:
    """The file is made anew, whole, of the journal and what was missing."""
    Path("in.txt").write_text("1\n2\n")
    assert main(["batch", "in.txt", "-o", "out.parquet", "--limit", "1"]) == 0
    assert main(["batch", "in.txt", "-o", "out.parquet", "--resume"]) == 0
    assert set(parquet.read_table("out.parquet")["content"].to_pylist()) == {"1", "2"}
    assert len(asked(place)) == 2
    assert [path.name for path in Path().glob(".*")] == []


def test_exporting_and_salvaging(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A journal becomes a file for others, and another journal."""
    Path("in.txt").write_text("1\n2\n")
    assert main(["batch", "in.txt", "--journal", "run.jsonl", "-q"]) == 0
    capsys.readouterr()
    assert main(["export", "run.jsonl", "all.parquet"]) == 0
    assert main(["salvage", "run.jsonl", "new.sqlite"]) == 0
    assert capsys.readouterr().out == "all.parquet: 2 items\nnew.sqlite: 2 items, 2 answered, 0 failed\n"
    assert parquet.read_table("all.parquet").num_rows == 2
    assert main(["export", "run.jsonl", "all.parquet"]) == 1
    assert capsys.readouterr().err.startswith("asyncmodels: JournalError: The file 'all.parquet' exists")
    assert main(["batch", "in.txt", "--journal", "new.sqlite", "-q"]) == 0
    assert len(asked(place)) == 2


# -- a provider's batch API -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_through_a_batch_api(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--mode batch sends files instead of calls, and has no use for a number of calls at once."""
    monkeypatch.setattr("asyncmodels.batch.bulk_plan.as_mode", lambda mode: QUICK if mode == "batch" else None)
    Path("in.txt").write_text("1\n2\n3\n")
    with running_provider() as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", provider.url)
        assert main(["batch", "in.txt", "-o", "out.jsonl", "--mode", "batch"]) == 0
        assert len(provider.batches) == 1
        assert contents("out.jsonl").keys() == {"0", "1", "2"}
        capsys.readouterr()
        assert main(["batch", "in.txt", "-o", "new.jsonl", "--mode", "batch", "--concurrency", "3"]) == 2
    assert "concurrency cannot be given with it" in capsys.readouterr().err
    assert not Path("new.jsonl").exists()
