"""Who may import whom. The tables are the rule: a new module gets a row, a new arrow is a decision made here.

Read them from the bottom of the package to its top. Three kinds of imports are told apart, because they cost different
things: ``at import`` is what a module needs to exist, ``lazy`` is inside of a function, ``typing`` is under
TYPE_CHECKING and exists for checkers only.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asyncmodels

ROOT = Path(asyncmodels.__file__).parent

# -- the tables -------------------------------------------------------------------------------------------------------

CORE: Mapping[str, set[str]] = {
    # values
    "types": set(),
    "errors": set(),
    "clock": set(),
    "histogram": set(),
    "recipe": set(),
    # what brings callers' words to values
    "strict": set(),
    "stopping": {"errors"},
    "images": {"errors", "types"},
    "roles": {"errors", "types"},
    "messages": {"errors", "images", "types"},
    "tools": {"errors", "types"},
    "plain_schema": set(),
    "formats": {"errors", "plain_schema", "strict", "types"},
    "request": {"errors", "formats", "messages", "tools", "types"},
    # the seam and the face
    "backend": {"errors", "recipe", "types"},
    "bulk": {"types"},
    "fast_json": set(),
    "answers": {"fast_json", "types"},
    "scored": {"errors", "types"},
    "identity": {"backend", "fast_json", "types"},
    "fingerprint": {"identity"},
    "deadline": {"errors"},
    "origin": {"backend"},
    "trace": {"backend", "types"},
    "attempt": {"backend", "deadline", "errors", "trace", "types"},
    "calls": {"errors", "messages", "types"},
    "stream": {"backend", "calls", "deadline", "errors", "formats", "messages", "types"},
    "model": {
        "attempt",
        "backend",
        "calls",
        "deadline",
        "errors",
        "formats",
        "messages",
        "recipe",
        "request",
        "scored",
        "stream",
        "types",
    },
    # around the face
    "sync": {"errors", "types"},
    "explanation": {"backend", "errors", "model", "recipe"},
    "several": {
        "backend",
        "clock",
        "errors",
        "model",
        "policies.choice",
        "policies.endpoint",
        "policies.fallback",
        "policies.route",
        "request",
    },
    "registry": {"errors"},
    "callable": {"backend", "errors", "model", "request", "stopping", "types"},
    "testing": {"backend", "clock", "errors", "stopping", "types"},
    # on top
    "": set(),
    "cli": {
        f"commands.{name}" for name in ("ask", "batch", "bench", "journals", "models", "parser", "report", "terminal")
    },
    "__main__": {"cli"},
}
"""What each module of the core imports when it is imported; "" is the package itself."""

PACKAGES: Mapping[str, set[str]] = {
    "policies": {
        "answers",
        "backend",
        "clock",
        "errors",
        "fingerprint",
        "formats",
        "identity",
        "origin",
        "trace",
        "types",
    },
    "remote": {
        "",
        "backend",
        "bulk",
        "clock",
        "errors",
        "identity",
        "messages",
        "model",
        "request",
        "roles",
        "stopping",
        "stream",
        "types",
    },
    "local": {"backend", "clock", "errors", "histogram", "messages", "model", "request", "stopping", "types"},
    "batch": {
        "answers",
        "backend",
        "bulk",
        "clock",
        "errors",
        "fast_json",
        "fingerprint",
        "formats",
        "histogram",
        "identity",
        "messages",
        "model",
        "origin",
        "request",
        "types",
    },
}
"""What every module of a package may import beside its own package; batch, server and integrations come later."""

PARTS: Mapping[str, set[str]] = {
    "local.vision_reader": {"images"},
    "batch.bulk_calls": {"policies.retry", "recipe"},
    "batch.bulk_seam": {"policies.retry"},
    "batch.cost": {"policies.prices"},
    **{f"batch.report{part}": {"policies.prices"} for part in ("", "_cost", "_summary")},
    "batch.watch": {"policies.prices"},
    "policies.slots": {"policies.line"},
    "policies.adaptive": {"policies.latency"},
    "policies.service": {"policies.slots"},
    "policies.concurrency": {"policies.adaptive", "policies.service", "policies.slots", "policies.watched_deltas"},
    "policies.cache_store": {"policies.cached_answer"},
    "policies.cache_file": {"policies.cached_answer"},
    "policies.store_worker": {"policies.cache_store", "policies.cached_answer"},
    "policies.threaded_store": {"policies.cache_store", "policies.cached_answer", "policies.store_worker"},
    "policies.disk_store": {"policies.cache_file", "policies.cache_store", "policies.threaded_store"},
    "policies.redis_store": {"policies.cache_store", "policies.cached_answer", "policies.threaded_store"},
    "policies.cache": {
        "policies.address",
        "policies.cache_store",
        "policies.cached_answer",
        "policies.disk_store",
    },
    "policies.budget_ledger": {"policies.prices"},
    "policies.spending": {"policies.budget_ledger", "policies.prices"},
    "policies.budget": {
        "policies.budget_ledger",
        "policies.charges",
        "policies.prices",
        "policies.spending",
        "policies.worst_case",
        "policies.watched_deltas",
    },
    "policies.telemetry_log": {"policies.telemetry_call"},
    "policies.telemetry_hook": {"policies.telemetry_call", "policies.telemetry_events"},
    "policies.telemetry_spans": {"policies.telemetry_call", "policies.telemetry_prompts"},
    "policies.telemetry": {
        "policies.telemetry_call",
        "policies.telemetry_events",
        "policies.telemetry_hook",
        "policies.telemetry_log",
        "policies.telemetry_spans",
        "policies.watched_deltas",
    },
    "policies.retry_schedule": {"policies.timer"},
    "policies.retry": {
        "policies.chosen_errors",
        "policies.opened_stream",
        "policies.reask",
        "policies.repeated_failures",
        "policies.retry_budget",
        "policies.retry_schedule",
    },
    "policies.breaker": {"policies.chosen_errors", "policies.circuit", "policies.watched_deltas"},
    "policies.hedge": {"policies.opened_stream", "policies.quantile", "policies.race", "policies.shared_stream"},
    "policies.race": {"policies.timer"},
    "policies.targets": {"attempt", "model", "policies.health", "policies.pace"},
    "policies.trail": {"policies.own_copy", "policies.targets"},
    "policies.choosing": {"policies.targets", "policies.trail", "recipe"},
    "policies.fallback": {"policies.choosing", "policies.health", "policies.targets", "policies.trail"},
    "policies.endpoint": {"policies.health", "policies.pace", "policies.targets"},
    "policies.choice": {"policies.endpoint"},
    "policies.route": {
        "policies.choice",
        "policies.choosing",
        "policies.endpoint",
        "policies.health",
        "policies.targets",
        "policies.trail",
    },
    "policies.limit_learning": {"policies.limit_bucket"},
    "policies.limit_estimate": {"policies.limit_bucket"},
    "policies.limit_charge": {"policies.limit_bucket"},
    "policies.limit_store": {"policies.limit_bucket"},
    "policies.limit_sqlite": {"policies.limit_bucket", "policies.limit_store"},
    "policies.limit_redis": {"policies.limit_bucket", "policies.limit_store"},
    "policies.limit_sharing": {
        "policies.address",
        "policies.limit_redis",
        "policies.limit_sqlite",
        "policies.limit_store",
    },
    "policies.limit_line": {"policies.limit_bucket"},
    "policies.limit_gate": {"policies.limit_bucket", "policies.limit_line"},
    "policies.limit_shared": {
        "policies.limit_bucket",
        "policies.limit_gate",
        "policies.limit_line",
        "policies.limit_store",
    },
    "policies.limit_call": {
        "policies.limit_bucket",
        "policies.limit_charge",
        "policies.limit_estimate",
        "policies.limit_gate",
        "policies.limit_learning",
        "policies.watched_deltas",
    },
    "policies.rate_limit": {
        "policies.limit_bucket",
        "policies.limit_call",
        "policies.limit_estimate",
        "policies.limit_gate",
        "policies.limit_shared",
        "policies.limit_sharing",
        "policies.limit_store",
        "policies.watched_deltas",
    },
    "policies.shared_stream": {"policies.own_copy"},
    "policies.single_flight": {"policies.own_copy", "policies.shared_stream"},
}
"""Policies know no other; what is listed here is one policy in several files."""

CHAIN = "remote.chain"
"""The one module of remote that names policies, because it makes the default chain."""

LAZY: Mapping[str, set[str]] = {
    "": {"registry"},
    "batch.report_page": {""},
    "local.host": {"registry"},
    "model": {"batch", "explanation", "identity", "sync"},
    "registry": {"model"},
    "cli": {"", "errors"},
}
TYPING: Mapping[str, set[str]] = {
    "errors": {"types"},
    "model": {"batch", "explanation", "sync"},
    "sync": {"batch", "model", "request", "scored", "stream"},
    "registry": {"model"},
}
"""What a module imports beyond its row above, in functions and for checkers."""

RUNTIMES = {"accelerate", "gguf", "mlx", "mlx_lm", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
FOREIGN: Mapping[str, set[str]] = {
    "batch.frame": {"pandas"},
    "batch.parquet": {"pyarrow"},
    "batch.progress_notebook": {"IPython"},
    "batch.progress_rich": {"rich"},
    "callable": {"anyio"},
    "commands.batch_parquet": {"pyarrow"},
    "fast_json": {"orjson"},
    "policies.limit_redis": {"redis"},
    "policies.redis_store": {"redis"},
    "policies.telemetry_spans": {"opentelemetry"},
    "remote.aiohttp_protocol": {"aiohttp"},
    "remote.bedrock": {"aiobotocore"},
    "remote.bedrock_client": {"aiobotocore", "aiohttp", "botocore"},
    "remote.bedrock_config": {"aiobotocore", "botocore"},
    "remote.bedrock_errors": {"aiohttp", "botocore"},
    "remote.bedrock_key": {"botocore"},
    "remote": {"anyio", "httptools", "httpx2", "orjson"},
    "remote.openai_client": {"openai"},
    "remote.azure_client": {"openai"},
    "remote.hf_lookup": {"huggingface_hub"},
    "remote.hf_routing": {"huggingface_hub"},
    "remote.huggingface": {"huggingface_hub"},
    "remote.litellm_call": {"httpx"},
    "remote.litellm_session": {"aiohttp", "litellm"},
    "remote.litellm_wire": {"aiohttp"},
    "local": RUNTIMES | {"filelock", "huggingface_hub"},
    "local.grammar": {"llguidance"},
    "local.image_fetch": {"httpx2"},
    "local.vision_reader": {"PIL"},
    **{f"local.vllm_{part}": {"vllm"} for part in ("answers", "arguments", "runner", "sampling", "statistics")},
    **{f"integrations.ray{part}": {"ray"} for part in ("", "_crew", "_failures", "_travel", "_worker")},
    **{f"integrations.inspect_ai{part}": {"inspect_ai"} for part in ("", "_messages", "_parameters")},
    "integrations.inspect_ai_answers": {"inspect_ai", "pydantic"},
    "integrations.inspect_ai_provider": {"inspect_ai", "tenacity"},
    "integrations.inspect_ai_sample": {"inspect_ai", "rich"},
    "integrations.lm_eval": {"lm_eval", "tqdm"},
    **{f"integrations.smolagents{part}": {"smolagents"} for part in ("", "_answers", "_messages", "_parameters")},
}
"""Packages of others, imported at the top of the leaf that owns them."""
FOREIGN_LAZY: Mapping[str, set[str]] = {
    "batch.run": {"pandas"},
    "formats": {"jsonschema", "pydantic", "referencing"},
    "images": {"PIL"},
    "integrations.lm_eval": {"jinja2", "lm_eval", "transformers"},
    "policies.prices": {"genai_prices"},
    "policies.telemetry": {"opentelemetry"},
    "sync": {"pandas"},
    "tools": {"griffe", "pydantic"},
}
"""Those that cost more than the module that needs them, and that most programs never need."""

PURE = {
    "agent_weights",
    "answer_parser",
    "backend",
    "deep_threads",
    "engine",
    "engine_errors",
    "gate",
    "host",
    "job",
    "jobs",
    "json_grammar",
    "notation",
    "out_of_memory",
    "prefill",
    "prefix_cache",
    "prompt",
    "recovery",
    "residence",
    "response_templates",
    "runner",
    "scheduler",
    "crowding",
    "guests",
    "kv_memory",
    "inbox",
    "fair_queue",
    "step_cost",
    "score_prompt",
    "seeds",
    "sequence",
    "signals",
    "tally",
    "thought_first",
    "template_messages",
    "template_parser",
    "tool_grammar",
    "tool_prompt",
    "turns",
    "watch",
    "worker",
    "written_calls",
}
"""The modules of local that know no runtime: one engine drives them all."""


# -- what the sources say ---------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(module: str) -> Mapping[str, frozenset[str]]:
    """By kind, what ``module`` imports: ours by their names below asyncmodels, others as ``*package``."""
    found: dict[str, set[str]] = defaultdict(set)
    for kind, target in _imports(ast.parse(MODULES[module].read_text("utf-8")), "at import"):
        package, _, rest = target.partition(".")
        if package == "asyncmodels":
            found[kind].add(rest if rest in MODULES else rest.rpartition(".")[0])
        elif package not in sys.stdlib_module_names:
            found[kind].add(f"*{package}")
    return {kind: frozenset(targets) for kind, targets in found.items()}


def _imports(tree: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        inner = kind
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "lazy"
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            inner = "typing"
        if isinstance(node, ast.Import):
            yield from ((kind, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((kind, f"{node.module}.{alias.name}") for alias in node.names)
        yield from _imports(node, inner)


def ours(module: str, kind: str) -> set[str]:
    return {target for target in imports(module).get(kind, ()) if not target.startswith("*")}


def foreign(module: str, *kinds: str) -> set[str]:
    return {target[1:] for kind in kinds for target in imports(module).get(kind, ()) if target.startswith("*")}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def allowed(module: str) -> set[str]:
    """What ``module`` may import when it is imported."""
    if module in CORE:
        return set(CORE[module])
    package = package_of(module)
    own = {other for other in MODULES if package_of(other) == package and package != "policies"}
    policies = {other for other in MODULES if package_of(other) == "policies"} if module == CHAIN else set()
    return PACKAGES.get(package, set()) | PARTS.get(module, set()) | own | policies


SUBJECTS = [module for module in MODULES if package_of(module) in CORE or package_of(module) in PACKAGES]
TOP = ("commands", "integrations", "server")
"""What sits on top of everything and may import all of it; nobody imports them."""

# -- the rules --------------------------------------------------------------------------------------------------------


def test_every_module_has_its_place() -> None:
    """A module that no row knows must be given one."""
    known = {*CORE, *PACKAGES, *TOP}
    assert [module for module in MODULES if package_of(module) not in known] == []
    assert [module for module in CORE if module not in MODULES] == []


@pytest.mark.parametrize("module", SUBJECTS)
def test_a_module_imports_what_its_row_says(module: str) -> None:
    """What a module imports when it is imported is in its row."""
    assert ours(module, "at import") - allowed(module) == set()


@pytest.mark.parametrize("module", SUBJECTS)
def test_a_module_imports_later_what_its_row_says(module: str) -> None:
    """Imports inside of functions and for checkers are arrows too: no way around the table."""
    if module == "":
        assert ours(module, "lazy") <= LAZY[""]  # and for checkers it shows everything
        return
    for kind, table in (("lazy", LAZY), ("typing", TYPING)):
        targets = {package_of(target) if package_of(target) == "batch" else target for target in ours(module, kind)}
        assert targets - allowed(module) - table.get(module, set()) == set(), kind


def test_the_rows_of_the_core_are_no_longer_than_needed() -> None:
    """A row that allows more than is used would let an arrow come back unnoticed."""
    unused = {module: CORE[module] - ours(module, "at import") for module in CORE}
    assert {module: sorted(targets) for module, targets in unused.items() if targets} == {}


def test_only_the_default_chain_names_policies() -> None:
    """remote and local know no policy, except in the one module that makes the default chain."""
    users = {
        module
        for module in MODULES
        for kind in ("at import", "lazy")
        for target in ours(module, kind)
        if package_of(target) == "policies"
        and package_of(module) in ("remote", "local", "model", "policies")
        and target not in PARTS.get(module, set())
    }
    assert users == {CHAIN}


def test_nobody_imports_what_is_on_top() -> None:
    """The command line, the server and the integrations are used by nobody of ours."""
    top = {"cli", *TOP}
    users = {
        (module, target)
        for module in MODULES
        for kind in ("at import", "lazy", "typing")
        for target in ours(module, kind)
        if package_of(target) in top and package_of(module) not in top
    }
    assert users == {("__main__", "cli")}


def test_there_are_no_cycles() -> None:
    """Modules that import each other when they are imported would form a cycle."""
    graph = {module: ours(module, "at import") for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle: {error.args[1]}")


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) != "server"])
def test_packages_of_others_are_imported_by_their_owners(module: str) -> None:
    """A package of others is imported at the top of the leaf that owns it, and nowhere else."""
    owned = FOREIGN.get(module, set()) | FOREIGN.get(package_of(module), set())
    assert foreign(module, "at import") - owned == set()
    assert foreign(module, "lazy", "typing") - owned - FOREIGN_LAZY.get(module, set()) == set()


@pytest.mark.parametrize("module", sorted(PURE))
def test_scheduling_knows_no_runtime(module: str) -> None:
    """What decides and what waits is plain Python: it runs, and is tested, without torch."""
    assert foreign(f"local.{module}", "at import", "lazy") == set()
    pure = {f"local.{name}" for name in PURE}
    assert {target for target in ours(f"local.{module}", "at import") if package_of(target) == "local"} <= pure


def test_files_are_named_by_their_idea() -> None:
    """No file gathers what belongs nowhere."""
    assert {path.stem for path in MODULES.values()} & {"util", "utils", "helper", "helpers", "common", "misc"} == set()


# -- what really happens ----------------------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    """The top-level packages that ``statement`` brings into a fresh interpreter."""
    script = (
        "import sys, json\nbefore = set(sys.modules)\n"
        f"{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in set(sys.modules) - before}})))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(ended.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import asyncmodels",
        "import asyncmodels; dir(asyncmodels); asyncmodels.schemes(); asyncmodels.Message; asyncmodels.RateLimitError",
        "from asyncmodels import Model, Stream, Policy, load, compose",
        "from asyncmodels.testing import ScriptedBackend; import asyncmodels.sync, asyncmodels.cli",
    ],
)
def test_the_core_needs_no_package_of_others(statement: str) -> None:
    """Importing the package, its values and its face brings in nothing but the standard library."""
    assert imported_by(statement) - set(sys.stdlib_module_names) == {"asyncmodels"}


def test_importing_the_package_brings_in_next_to_nothing() -> None:
    """`import asyncmodels` alone does not even start asyncio."""
    assert "asyncio" not in imported_by("import asyncmodels")
