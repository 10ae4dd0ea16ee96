"""load("scheme:name"): what it builds, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import asyncmodels
from asyncmodels.errors import ConfigurationError, InvalidRequestError, MissingExtraError, UnknownSchemeError
from asyncmodels.model import Model
from asyncmodels.registry import import_target, load, schemes
from asyncmodels.remote.openai import OpenAIModel


def run(script: str, *path: Path) -> str:
    """What a script prints in a process of its own, with ``path`` in front of its import path."""
    head = f"import sys\nsys.path[:0] = {[str(folder) for folder in path]!r}\n"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


async def test_load_builds_the_class_of_the_scheme() -> None:
    """The name after the colon is the class's first argument, and parameters are passed on."""
    async with load("openai:gpt-5", api_key="none", temperature=0.5) as model:
        assert type(model) is OpenAIModel
        assert model.model_id == "gpt-5"


async def test_a_name_may_contain_colons_and_slashes() -> None:
    """Only the first colon separates: the rest is the name as it is."""
    async with load("openai:ft:gpt-4o:org/x:id", api_key="none") as model:
        assert model.model_id == "ft:gpt-4o:org/x:id"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("opnai:gpt-5", "did you mean 'openai'"),
        ("OpenAI:gpt-5", "did you mean 'openai'"),
        (" openai:gpt-5", "did you mean 'openai'"),
        ("transformer:x", "did you mean 'transformers'"),
        ("smolm", "did you mean 'smollm'"),
        ("xyz:gpt-5", "known are .*openai, .*transformers"),
        ("gpt-5", "known are"),
    ],
)
def test_an_unknown_scheme_suggests_one(name: str, hint: str) -> None:
    """A scheme that no row has is an UnknownSchemeError, also a LookupError, with the one that was probably meant."""
    with pytest.raises(UnknownSchemeError, match=hint) as caught:
        load(name)
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("name", ["openai", "openai:", "transformers:", "smollm:135m", "", "  ", None, 5])
def test_a_name_that_is_missing_or_too_much(name: str) -> None:
    """A scheme without its name, one with a name too many, and no name at all are ConfigurationErrors."""
    with pytest.raises(ConfigurationError) as caught:
        load(name)
    assert not isinstance(caught.value, UnknownSchemeError)
    assert "\n" not in str(caught.value)


def test_parameters_that_the_class_does_not_know() -> None:
    """An unknown parameter is a typed error that names it and what was probably meant."""
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'"):
        load("openai:gpt-5", api_key="none", temprature=1)


def test_a_parameter_given_twice() -> None:
    """A parameter that the name says already is a ConfigurationError, not a TypeError."""
    with pytest.raises(ConfigurationError, match="model_id"):
        load("openai:gpt-5", model_id="gpt-4")


def test_schemes_are_sorted_and_described() -> None:
    """The table lists each scheme once, sorted, with what to install for it and a line of words."""
    rows = schemes()
    names = [row.scheme for row in rows]
    assert names == sorted(set(names))
    assert {"openai", "smollm", "transformers"} <= set(names)
    assert all(row.description and row.target.count(":") == 1 for row in rows)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("openai:gpt-5", "openai", "openai"),
        ("groq:llama-3.3-70b-versatile", "openai", "openai"),
        ("transformers:some/model", "torch", "transformers"),
        ("transformers:some/model", "transformers", "transformers"),
        ("smollm", "torch", "smollm"),
    ],
)
def test_a_missing_extra_says_what_to_install(name: str, package: str, extra: str) -> None:
    """Without the package of an extra, load() is a MissingExtraError, also an ImportError, with the pip line."""
    out = run(f"""
        sys.modules[{package!r}] = None
        import asyncmodels
        try:
            asyncmodels.load({name!r})
        except asyncmodels.MissingExtraError as error:
            print(isinstance(error, ImportError), error)
    """)
    assert out.startswith("True ")
    assert package in out
    assert f'pip install "asyncmodels[{extra}]"' in out


def test_a_missing_extra_of_a_public_name_says_what_to_install() -> None:
    """The same for the class itself, taken from the package, and the rest of the package works on."""
    out = run("""
        sys.modules["openai"] = None
        import asyncmodels
        for _ in range(2):
            try:
                asyncmodels.OpenAIModel
            except asyncmodels.MissingExtraError as error:
                print(error)
        print(asyncmodels.CallableModel.__name__)
    """)
    assert out.splitlines()[0] == out.splitlines()[1]
    assert 'pip install "asyncmodels[openai]"' in out
    assert out.endswith("CallableModel\n")


def test_an_import_error_of_our_own_is_not_taken_for_a_missing_extra() -> None:
    """A module of ours that does not exist stays a plain ModuleNotFoundError."""
    with pytest.raises(ModuleNotFoundError) as caught:
        import_target("asyncmodels.remote.nothing:Model", "openai")
    assert not isinstance(caught.value, MissingExtraError)


def test_the_public_load_is_the_registrys() -> None:
    """asyncmodels.load and asyncmodels.schemes are these functions."""
    assert (asyncmodels.load, asyncmodels.schemes) == (load, schemes)


# -- rows of other packages -------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder as pip leaves it: a module, and the metadata whose entry points add schemes."""
    (tmp_path / "echo_plugin.py").write_text(
        textwrap.dedent("""
            from asyncmodels import CallableModel

            class EchoModel(CallableModel):
                def __init__(self, name, **params):
                    super().__init__(lambda messages: name + ": " + messages[0]["content"], **params)

            def broken(name):
                raise TypeError("broken by itself")

            def nothing(name):
                return None
        """)
    )
    (tmp_path / "needy_plugin.py").write_text("import a_package_that_nobody_has\n")
    metadata = tmp_path / "echo_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        textwrap.dedent("""
            [asyncmodels.schemes]
            echo = echo_plugin:EchoModel
            openai = echo_plugin:EchoModel
            missing = echo_plugin:NoSuchModel
            gone = no_such_module:Model
            needy = needy_plugin:Model
            broken = echo_plugin:broken
            nothing = echo_plugin:nothing
        """)
    )
    return tmp_path


def test_entry_points_add_schemes(plugin: Path) -> None:
    """A scheme of an installed package loads its class, shows in the list, and never replaces one of ours."""
    out = run(
        """
        import asyncmodels
        print(asyncmodels.load("echo:parrot").sync.generate("hi"))
        rows = {row.scheme: row for row in asyncmodels.schemes()}
        print(rows["echo"].description)
        print(rows["openai"].target)
        try:
            asyncmodels.load("ecoh:parrot")
        except asyncmodels.UnknownSchemeError as error:
            print(error)
        """,
        plugin,
    )
    assert out.splitlines() == [
        "parrot: hi",
        "from echo-plugin",
        "asyncmodels.remote.openai:OpenAIModel",
        "Unknown scheme 'ecoh': did you mean 'echo'?",
    ]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("missing", ["echo_plugin", "NoSuchModel"]),
        ("gone", ["no_such_module"]),
        ("needy", ["needy_plugin", "a_package_that_nobody_has"]),
        ("broken", ["broken by itself"]),
        ("nothing", ["NoneType"]),
    ],
)
def test_a_broken_row_of_another_package_is_a_typed_error(plugin: Path, scheme: str, words: list[str]) -> None:
    """A row that leads nowhere is a ConfigurationError that names what is missing; the other schemes work on."""
    out = run(
        f"""
        import asyncmodels
        try:
            asyncmodels.load("{scheme}:x")
        except asyncmodels.ConfigurationError as error:
            print(error)
        print(asyncmodels.load("echo:parrot").sync.generate("hi"))
        """,
        plugin,
    )
    message, answer = out.splitlines()
    assert all(word in message for word in words)
    assert answer == "parrot: hi"


def test_loading_a_model_type() -> None:
    """What load() returns is a Model."""
    assert isinstance(load("openai:gpt-5", api_key="none"), Model)
