"""What tests of policies share: a Redis server, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.policies.redis_server import REDIS, RedisServer, free_port


@pytest.fixture(scope="module")
def one_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(one_redis_server: RedisServer) -> RedisServer:
    """One that runs, whatever the test before has done to it."""
    if one_redis_server.process is None:
        one_redis_server.start()
    return one_redis_server
