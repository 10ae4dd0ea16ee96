"""The clients under the Bedrock backend: configured as botocore would, made once, shared, and closed with the loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import ssl
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.config import Config

from asyncmodels import (
    AuthenticationError,
    BedrockModel,
    ClosedError,
    ConfigurationError,
    EventLoopError,
    InvalidRequestError,
    MissingKeyError,
    OverloadedError,
    PermissionDeniedError,
)
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.bedrock import BedrockBackend
from asyncmodels.remote.bedrock_client import Session
from asyncmodels.remote.bedrock_secrets import Secrets, mask_logs
from tests.server.handle import Place, Server
from tests.server.script import Answer

EXPIRED = [("x-amzn-errortype", "ExpiredTokenException")]
WHERE = {"region_name": "us-east-1"}
FOUR_TIMES = partial(Retry, attempts=4, wait_initial=0.001, wait_max=0.002)
KEYS = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "very-secret"}


def model_at(place: Place, api_key: str | None = "k", **kwargs: Any) -> BedrockModel:
    return BedrockModel("m", client_kwargs={"endpoint_url": place.url, **WHERE, **kwargs}, api_key=api_key)


def backend_of(model: BedrockModel) -> BedrockBackend:
    assert isinstance(model.backend, BedrockBackend)
    return model.backend


async def client_of(model: BedrockModel) -> Any:
    """The client that the model uses on this loop."""
    lease = backend_of(model)._clients.lease()
    return lease.client or await lease.open()


def authorization(place: Place) -> list[str | None]:
    return [request.header("authorization") for request in place.seen().requests]


# -- configuration ----------------------------------------------------------------------------------------------------


async def test_what_is_not_said_is_set_for_language_models(server: Server) -> None:
    """Answers may take minutes, botocore does not retry, and no call waits for a connection."""
    async with model_at(server.script()) as model:
        config = (await client_of(model)).meta.config
    assert (config.connect_timeout, config.read_timeout) == (5.0, 600.0)
    assert config.max_pool_connections >= 1000
    assert config.retries["total_max_attempts"] == 1
    assert issubclass(config.http_session_cls, AIOHTTPSession)


@pytest.mark.parametrize("kind", [Config, AioConfig])
async def test_a_config_of_the_users_own(server: Server, kind: type[Config]) -> None:
    """What it says counts, whichever class it is; the rest stays ours, and retrying."""
    theirs = kind(read_timeout=7, user_agent_extra="mine", retries={"total_max_attempts": 5})
    async with model_at(server.script(), config=theirs) as model:
        config = (await client_of(model)).meta.config
    assert (config.read_timeout, config.connect_timeout) == (7, 5.0)
    assert config.retries["total_max_attempts"] == 1
    assert "mine" in config.user_agent_extra


async def test_settings_of_aiohttp(server: Server) -> None:
    """What aiobotocore adds to botocore's config is not lost in merging."""
    theirs = AioConfig(connector_args={"keepalive_timeout": 3})
    async with model_at(server.script(), config=theirs) as model:
        config = (await client_of(model)).meta.config
    assert config.connector_args["keepalive_timeout"] == 3


@pytest.mark.parametrize(
    ("retries", "attempts"),
    [
        ({"total_max_attempts": 5}, 5),
        ({"max_attempts": 2}, 3),
        ({"mode": "adaptive"}, None),
        ({"total_max_attempts": 1}, 0),
    ],
    ids=str,
)
def test_retries_of_botocore_become_ours(retries: dict[str, Any], attempts: int | None) -> None:
    """As many attempts as the config says, by the one layer that retries."""
    model = BedrockModel("m", client_kwargs={**WHERE, "config": Config(retries=retries)})
    links = [repr(link) for link in model._links() if isinstance(link, Retry)]
    if attempts == 0:
        assert links == []
    else:
        [link] = links
        assert attempts is None or f"[{attempts} attempts" in link


@pytest.mark.parametrize(("given", "limit"), [(None, 20), (50, 50)])
async def test_connections_of_botocore_limit_the_calls(given: int | None, limit: int) -> None:
    """A limit of connections is one of calls, and there are always as many connections as calls."""
    kwargs = {**WHERE, "config": Config(max_pool_connections=20)}
    async with BedrockModel("m", client_kwargs=kwargs, max_concurrency=given, api_key="k") as model:
        assert (await client_of(model)).meta.config.max_pool_connections == limit
        assert model.statistics().links["Concurrency"].limit == limit


async def test_credentials_sign(server: Server) -> None:
    """A key in client_kwargs signs the request."""
    place = server.script()
    async with model_at(place, None, **KEYS) as model:
        await model.generate("x")
    [header] = authorization(place)
    assert (header or "").startswith("AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/")


async def test_which_key_wins(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program says beats the environment; there, a bearer token beats a key."""
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "from-environment")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    place = server.script()
    for model in (model_at(place, None), model_at(place, "k"), model_at(place, None, **KEYS)):
        async with model:
            await model.generate("x")
    monkeypatch.delenv("AWS_BEARER_TOKEN_BEDROCK")
    async with model_at(place, None) as model:
        await model.generate("x")
    first, second, third, fourth = authorization(place)
    assert (first, second) == ("Bearer from-environment", "Bearer k")
    assert "AKIAEXAMPLE" in (third or "")
    assert "AKIAENVIRONMENT" in (fourth or "")


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_function_gives_the_key(server: Server, monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    """It beats the environment, what it gave is remembered, and asked for anew when Bedrock refuses it."""
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "from-environment")
    refused = Answer(status=403, headers=EXPIRED, body='{"message": "The security token has expired"}')
    place = server.script(Answer(content="hi"), Answer(content="hi"), refused, Answer(content="hi"))
    given: list[str] = []

    def give() -> str:
        given.append(f"key-{len(given)}-0123456789")
        return given[-1]

    async def give_later() -> str:
        return give()

    model = BedrockModel(
        "m", client_kwargs={"endpoint_url": place.url, **WHERE}, api_key=give_later if is_async else give
    )
    async with model:
        assert [str(await model.generate("x")) for _ in range(3)] == ["hi", "hi", "hi"]
        assert not any(key in f"{model.backend!r} {vars(model.backend)!r}" for key in given)
    first, second = (f"Bearer {key}" for key in given)
    assert authorization(place) == [first, first, first, second]


async def test_a_function_that_gives_no_key(server: Server) -> None:
    """A key that was given just now and is refused is not asked for again; one that fails is an AuthenticationError."""
    refused = Answer(status=403, headers=EXPIRED, body='{"message": "No, new-key-0123456789 is not good"}')
    place = server.script(refused)
    where = {"endpoint_url": place.url, **WHERE}
    async with BedrockModel("m", client_kwargs=where, api_key=lambda: "new-key-0123456789") as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.generate("x")
        assert "new-key" not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert len(place.seen().requests) == 1

    def fail() -> str:
        raise ValueError("no key today")

    for give, kind in ((fail, AuthenticationError), (str, MissingKeyError)):
        async with BedrockModel("m", client_kwargs=where, api_key=give) as model:
            with pytest.raises(kind):
                await model.generate("x")


async def test_a_profile(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """profile_name is that of boto3's Session: its key and its region, whatever the environment says."""
    (tmp_path / "config").write_text("[profile mine]\nregion = eu-central-1\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKIAMINE\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "from-environment")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    place = server.script()
    kwargs = {"profile_name": "mine", "endpoint_url": place.url}
    async with BedrockModel("m", client_kwargs=kwargs) as model:
        await model.generate("x")
    [header] = authorization(place)
    assert "Credential=AKIAMINE/" in (header or "")
    assert "/eu-central-1/" in (header or "")


@pytest.mark.parametrize(
    ("environment", "kwargs", "region"),
    [
        ({"AWS_REGION": "a-b-1"}, {}, "a-b-1"),
        ({"AWS_REGION": "a-b-1", "AWS_DEFAULT_REGION": "a-b-2"}, {}, "a-b-2"),
        ({"AWS_REGION": "a-b-1"}, {"region_name": "a-b-3"}, "a-b-3"),
        ({"AWS_REGION": "a-b-1"}, {"config": Config(region_name="a-b-4")}, "a-b-4"),
    ],
    ids=["AWS_REGION", "AWS_DEFAULT_REGION", "argument", "config"],
)
async def test_where_the_region_comes_from(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kwargs: dict[str, Any], region: str
) -> None:
    """From the program, from botocore's variable, and last from the one that it does not read."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    async with BedrockModel("m", client_kwargs=kwargs, api_key="k") as model:
        client = await client_of(model)
    assert client.meta.region_name == region
    assert client.meta.endpoint_url == f"https://bedrock-runtime.{region}.amazonaws.com"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model_id": ""}, "model_id"),
        ({"model_id": None}, "model_id"),
        ({"client": object()}, "not object"),
        ({"client_kwargs": []}, "client_kwargs must be a dict"),
        ({"client_kwargs": {"region": "us-east-1"}}, "did you mean 'region_name'"),
        ({"client_kwargs": {"region_name": 5}}, "region_name must be a string"),
        ({"client_kwargs": {"endpoint_url": "localhost:8000"}}, "must be a URL"),
        ({"client_kwargs": {"config": {"read_timeout": 5}}}, "config must be"),
        ({"client_kwargs": {"config": AioConfig(http_session_cls=object)}}, "http_session_cls"),
        ({"client_kwargs": {"profile_name": 5}}, "profile_name"),
        ({"client_kwargs": {**KEYS}, "api_key": "k"}, "give one of them"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "k\n"}, "api_key"),
        ({"custom_role_conversions": []}, "custom_role_conversions"),
        ({"structured_output": "xml"}, "structured_output"),
        ({"inferenceConfig": {"maxTokens": 5}, "max_tokens": 6}, "given twice"),
        ({"policies": (), "max_concurrency": 5}, "policies replaces"),
        ({"max_concurrency": "many", "client_kwargs": {"config": Config(max_pool_connections=5)}}, "many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], what: str) -> None:
    """In one sentence that names them."""
    with pytest.raises(ConfigurationError, match=what):
        BedrockModel(**{"model_id": "m", **options})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"inferenceconfig": {}}, "inferenceconfig"),
        ({"max_new_tokens": 5}, "max_tokens"),
        ({"inferenceConfig": {"topK": 5}}, "topK"),
        ({"temperature": "hot"}, "temperature"),
        ({"guardrailConfig": "x"}, "guardrailConfig must be a dict, not str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_parameters_are_refused_at_once(options: dict[str, Any], what: str) -> None:
    """A typo does not wait for the first call."""
    with pytest.raises(InvalidRequestError, match=what):
        BedrockModel("m", **options)


# -- a client of the user's own ---------------------------------------------------------------------------------------


@asynccontextmanager
async def own_client(place: Place, service: str = "bedrock-runtime", **options: Any) -> AsyncIterator[Any]:
    config = AioConfig(**options) if options else None
    creating = AioSession().create_client(service, endpoint_url=place.url, config=config, **WHERE, **KEYS)
    async with creating as client:
        yield client


async def test_a_client_of_the_users_own(server: Server) -> None:
    """It is used, its connections are counted, and it stays open."""
    place = server.script(Answer(content="hi"))
    async with own_client(place) as client:
        for _ in range(2):
            async with BedrockModel("m", client) as model:
                assert str(await model.generate("x")) == "hi"
                assert model.statistics().links["BedrockBackend"].connections == {server.url: 1}
        await client.converse(modelId="m", messages=[{"role": "user", "content": [{"text": "x"}]}])
    assert place.seen().connections == 1


@pytest.mark.parametrize(
    ("retries", "requests"),
    [
        (None, 5),
        ({"mode": "standard"}, 3),
        ({"mode": "standard", "total_max_attempts": 2}, 2),
        ({"total_max_attempts": 1}, 4),
    ],
    ids=str,
)
async def test_one_layer_retries_beside_a_client_of_the_users_own(
    server: Server, monkeypatch: pytest.MonkeyPatch, retries: dict[str, Any] | None, requests: int
) -> None:
    """The client where it retries, as it was made to, and else ours: their attempts never multiply."""
    monkeypatch.setattr("aiobotocore.endpoint.asyncio", _Hurried)
    place = server.script(Answer(status=503))
    retry: Any = FOUR_TIMES if requests == 4 else True
    options: dict[str, Any] = {"retries": retries} if retries else {}
    async with own_client(place, **options) as client, BedrockModel("m", client, retry=retry) as model:
        with pytest.raises(OverloadedError):
            await model.generate("x")
    assert len(place.seen().requests) == requests


class _Hurried:
    """asyncio, where botocore waits between two attempts, without the wait."""

    @staticmethod
    async def sleep(_: float) -> None:
        await asyncio.sleep(0)


@pytest.mark.parametrize("retry", [False, 3, FOUR_TIMES], ids=["none", "a number", "a policy"])
async def test_a_retry_beside_a_client_that_retries(server: Server, retry: Any) -> None:
    """It says how to make a client that does not; without one, or with policies, the caller has decided."""
    async with own_client(server.script()) as client:
        with pytest.raises(ConfigurationError, match=r'AioConfig\(retries={"total_max_attempts": 1}\)'):
            BedrockModel("m", client, retry=retry)
        assert not any(isinstance(link, Retry) for link in BedrockModel("m", client)._links())
        assert not any(isinstance(link, Retry) for link in BedrockModel("m", client, policies=())._links())
    async with own_client(server.script(), retries={"total_max_attempts": 1}) as client:
        assert any(isinstance(link, Retry) for link in BedrockModel("m", client)._links())


async def test_connections_of_the_users_own_client_limit_the_calls(server: Server) -> None:
    """No call waits for a connection where its limit does not show it."""
    async with own_client(server.script()) as client:
        assert BedrockModel("m", client).statistics().links["Concurrency"].limit == 10
        assert BedrockModel("m", client, max_concurrency=5).statistics().links["Concurrency"].limit == 5
        with pytest.raises(ConfigurationError, match="max_pool_connections=20"):
            BedrockModel("m", client, max_concurrency=20)
    async with own_client(server.script(), max_pool_connections=20) as client:
        assert BedrockModel("m", client, max_concurrency=20).statistics().links["Concurrency"].limit == 20


async def test_closing_the_model_ends_calls_on_the_users_own_client(server: Server) -> None:
    """They are ClosedError, and the client stays open."""
    place = server.script(Answer(fault="hang_in_body", after=2), Answer(content="hi"))
    async with own_client(place) as client:
        model = BedrockModel("m", client)

        async def read() -> None:
            async with model.stream("x") as stream:
                await stream.response()

        task = asyncio.create_task(read())
        await place.until(in_progress=1)
        await model.aclose()
        with pytest.raises(ClosedError):
            await task
        assert str(await BedrockModel("m", client).generate("x")) == "hi"


async def test_a_client_of_aioboto3(server: Server) -> None:
    """The same."""
    aioboto3 = pytest.importorskip("aioboto3")
    place = server.script(Answer(content="hi"))
    session = aioboto3.Session(**KEYS, **WHERE)
    async with session.client("bedrock-runtime", endpoint_url=place.url) as client, BedrockModel("m", client) as model:
        assert str(await model.generate("x")) == "hi"


async def test_clients_that_cannot_be_used(server: Server) -> None:
    """One that blocks, one that is not open, one for something else, and one beside other settings."""
    place = server.script()
    with pytest.raises(ConfigurationError, match="boto3, which blocks"):
        BedrockModel("m", boto3.client("bedrock-runtime", **WHERE, **KEYS))
    creating = AioSession().create_client("bedrock-runtime", **WHERE)
    with pytest.raises(ConfigurationError, match="must be an open"):
        BedrockModel("m", creating)
    await (await creating.__aenter__()).close()
    async with own_client(place, "sts") as client:
        with pytest.raises(ConfigurationError, match="'sts'"):
            BedrockModel("m", client)
    async with own_client(place) as client:
        with pytest.raises(ConfigurationError, match="or client_kwargs"):
            BedrockModel("m", client, WHERE)


def test_a_client_of_the_users_own_belongs_to_one_loop(server: Server) -> None:
    """On another loop it is EventLoopError, and not something odd."""
    place = server.script()

    async def main() -> None:
        async with own_client(place) as client:
            model = BedrockModel("m", client)
            await model.generate("x")
            with pytest.raises(EventLoopError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, model.generate("x"))

    asyncio.run(main())


# -- sharing ----------------------------------------------------------------------------------------------------------


async def test_models_that_want_the_same_share_a_client(server: Server) -> None:
    """Equal is enough; another region, key or setting is another client."""
    place = server.script()
    same = [model_at(place, config=Config(read_timeout=7)) for _ in range(3)]
    others = [
        model_at(place, "other", config=Config(read_timeout=7)),
        model_at(place, config=Config(read_timeout=8)),
        model_at(place, region_name="eu-west-1", config=Config(read_timeout=7)),
    ]
    clients = [await client_of(model) for model in same]
    assert len({id(client) for client in clients}) == 1
    assert len({id(await client_of(model)) for model in (same[0], *others)}) == 4
    for model in same[:2]:
        await model.aclose()
    await same[2].generate("x")
    for model in (same[2], *others):
        await model.aclose()
    await place.until(open=0)


async def test_calls_at_once_make_one_client(server: Server) -> None:
    """However many come first, of however many models."""
    place = server.script(Answer(content="hi"))
    models = [model_at(place) for _ in range(5)]
    await asyncio.gather(*(model.generate("x") for model in models for _ in range(10)))
    assert len({id(await client_of(model)) for model in models}) == 1
    for model in models:
        await model.aclose()


async def test_making_a_client_reads_nothing_on_the_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's model, which is megabytes of JSON, is read in a thread, and once per process."""
    from botocore.loaders import JSONFileLoader

    from asyncmodels.remote import bedrock_client

    readers: list[int] = []
    load = JSONFileLoader.load_file

    def noted(self: Any, path: str) -> Any:
        data = load(self, path)
        if data is not None:
            readers.append(threading.get_ident())
        return data

    monkeypatch.setattr(bedrock_client, "_LOADERS", {})
    monkeypatch.setattr(JSONFileLoader, "load_file", noted)
    place = server.script()
    for _ in range(2):
        async with model_at(place) as model:
            await model.generate("x")
    assert readers
    assert threading.get_ident() not in readers
    assert len(readers) < 10


# -- loops ------------------------------------------------------------------------------------------------------------


def test_two_event_loops_one_after_the_other(server: Server) -> None:
    """A model that was used under one asyncio.run works under the next, and each closes what it opened."""
    place = server.script(Answer(content="hi"))
    model = model_at(place)

    async def ask() -> None:
        assert str(await model.generate("x")) == "hi"

    for number in (1, 2, 3):
        asyncio.run(ask())
        seen = asyncio.run(place.until(open=0))
        assert (len(seen.requests), seen.connections) == (number, number)
    assert str(model.sync.generate("x")) == "hi"
    asyncio.run(model.aclose())


def test_event_loops_in_several_threads_at_once(server: Server) -> None:
    """Each loop has its own client; one model serves them all at the same time."""
    place = server.script(Answer(content="hi", delay=0.01))
    model = model_at(place)
    together = threading.Barrier(4)

    async def many() -> list[str]:
        together.wait()
        return [str(response) for response in await asyncio.gather(*(model.generate("x") for _ in range(10)))]

    with ThreadPoolExecutor(4) as threads:
        outcomes = [threads.submit(asyncio.run, many()) for _ in range(4)]
        assert [outcome.result() for outcome in outcomes] == [["hi"] * 10] * 4
    assert model.statistics().links["BedrockBackend"].in_flight == 0
    asyncio.run(model.aclose())


def test_a_model_closed_on_another_loop(server: Server) -> None:
    """Closing in one thread closes the connections that the model has in another one's loop."""
    place = server.script(Answer(content="hi"))
    model = model_at(place)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def ask() -> None:
        await model.generate("x")

    asyncio.run_coroutine_threadsafe(ask(), loop).result(20)
    assert place.seen().open == 1
    asyncio.run(model.aclose())
    asyncio.run(place.until(open=0))
    asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(20)
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_loop_that_ended_is_not_kept(server: Server) -> None:
    """Neither a model nor what models share holds on to an event loop that has shut down."""
    model = model_at(server.script())
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await model.generate("x")

    asyncio.run(use())
    asyncio.run(use())
    gc.collect()
    assert loops[0]() is None
    asyncio.run(model.aclose())


async def trusted(**options: Any) -> Any:
    """The TLS context of a session with these options."""
    made = Session(**options)._create_connector(None)
    connector = await made if inspect.isawaitable(made) else made
    await connector.close()
    return connector._ssl


async def test_sessions_that_trust_the_same_share_it(server: Server, tmp_path: Path) -> None:
    """Authorities are read once, and again when their file changes; who shows a certificate shows it alone."""
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(server.ca_file.read_bytes())
    shared = await trusted(verify=str(authorities))
    assert await trusted(verify=str(authorities)) is shared
    assert (shared.cert_store_stats()["x509_ca"], shared.check_hostname) == (1, True)
    assert (await trusted(verify=True)).cert_store_stats()["x509_ca"] > 1
    mine = str(server.ca_file.with_name("server.pem"))
    assert await trusted(verify=str(authorities), client_cert=mine) is not shared
    for use in ({"proxy_ca_bundle": str(server.ca_file)}, {"proxy_client_cert": mine}):
        assert await trusted(verify=str(authorities), proxies_config=use) is not shared
    assert await trusted(verify=str(authorities)) is shared
    authorities.write_bytes(2 * server.ca_file.read_bytes())
    assert await trusted(verify=str(authorities)) is not shared


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_authorities_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    """The error is that of the file, each time."""
    authorities = tmp_path / "ca.pem"
    if content is not None:
        authorities.write_text(content)
    for _ in range(2):
        with pytest.raises(FileNotFoundError if content is None else ssl.SSLError):
            await trusted(verify=str(authorities))


def test_without_a_loop() -> None:
    """Outside of asyncio it is EventLoopError, which says so."""
    with pytest.raises(EventLoopError, match="asyncio"):
        backend_of(BedrockModel("m"))._clients.lease()


PROGRAM = """
    import asyncio, sys, threading
    from asyncmodels import BedrockModel

    kwargs = {"endpoint_url": sys.argv[1], "region_name": "us-east-1", "verify": sys.argv[2]}
    model = BedrockModel("m", client_kwargs=kwargs, api_key="k")

    async def use():
        await model.generate("x")

    async def read():
        async with model.stream("x") as stream:
            async for delta in stream:
                sys.exit(0)
"""
ENDINGS = {
    "run twice": "asyncio.run(use()); asyncio.run(use())",
    "in a stream": "asyncio.run(read())",
    "making the client": (
        "async def main():\n    asyncio.create_task(use())\n    await asyncio.sleep(0)\nasyncio.run(main())"
    ),
    "daemon thread": (
        "loop = asyncio.new_event_loop()\n"
        "threading.Thread(target=loop.run_forever, daemon=True).start()\n"
        "asyncio.run_coroutine_threadsafe(use(), loop).result()"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interpreter_that_exits_says_nothing(server: Server, ending: str) -> None:
    """However a program ends, with or without aclose, there is no warning and no traceback."""
    place = server.script(Answer(pieces=["x"] * 100, interval=0.001))
    url = place.tls_url if ending == "run twice" else place.url
    program = textwrap.dedent(PROGRAM) + ENDINGS[ending]
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # botocore's own, at import
    command = [sys.executable, *warnings, "-c", program, url, str(server.ca_file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"api_key": "bedrock-api-key-0123456789"},
        {"api_key": None, **KEYS, "aws_session_token": "session-token-0123456789"},
    ],
    ids=["bearer", "session"],
)
async def test_keys_are_in_no_log(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: dict[str, Any]
) -> None:
    """Not where botocore logs what it sends at DEBUG, and not where a server repeats what it refuses."""
    secrets = [value for name, value in given.items() if value and name != "aws_access_key_id"]
    body = '{"message": "The keys ' + " ".join(secrets) + ' are not valid."}'
    place = server.script(Answer(content="hi"), Answer(status=403, body=body))
    caplog.set_level(logging.DEBUG, "")
    async with model_at(place, **given) as model:
        await model.generate("x")
        with pytest.raises(PermissionDeniedError) as refused:
            await model.generate("x")
    logged = "\n".join([caplog.text, *map(str, (record.args for record in caplog.records))])
    assert "Sending http request" in logged
    assert "are not valid" in logged
    for secret in secrets:
        assert secret not in logged
        assert secret not in str(refused.value)
    assert all(request.header("authorization") for request in place.seen().requests)


async def test_keys_that_botocore_found_are_in_no_log_of_what_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A session token of the environment, and the client of the user's own."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token-0123456789")
    for name, value in KEYS.items():
        monkeypatch.setenv(name.upper(), value)
    place = server.script(Answer(content="hi"))
    caplog.set_level(logging.DEBUG, "")
    async with model_at(place, None) as model:
        await model.generate("x")
    creating = AioSession().create_client("bedrock-runtime", endpoint_url=place.url, **WHERE)
    async with creating as client, BedrockModel("m", client) as model:
        await model.generate("x")
    assert caplog.text.count("Sending http request") == 2
    assert "session-token" not in caplog.text


def test_what_is_no_secret_is_logged_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing else changes, also where the message of a log does not fit its arguments."""
    secrets = Secrets(["key-0123456789"])
    mask_logs()
    logger = logging.getLogger("botocore.endpoint")
    caplog.set_level(logging.DEBUG, "botocore")
    logger.debug("Sending %s: %s", "Authorization: AWS4-HMAC-SHA256 Credential=AKIA", {"bearer": "of good news"})
    assert caplog.records[0].args == ("Authorization: AWS4-HMAC-SHA256 Credential=AKIA", {"bearer": "of good news"})
    try:
        raise ValueError("key-0123456789 is wrong")
    except ValueError:
        logger.debug("It failed.", exc_info=True)
    assert "*** is wrong" in caplog.text
    assert "key-0123456789" not in caplog.text
    del secrets
    logger.debug("key-0123456789")
    assert "key-0123456789" in caplog.text
