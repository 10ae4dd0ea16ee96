"""A limit for the processes of many machines, on a Redis server.

It stands on the redis package and one Lua script, which the server runs as a whole, by its own clock. The ``limits``
package would do the same for counting windows, one limit a call; it has no bucket that takes several amounts or none,
owes, gives back, and learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urldefrag

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.limit_bucket import BURST, CREDIT, GRAIN, HOLD_MOST, JUMP, Amounts, Answer, Asked
from asyncmodels.policies.limit_store import LimitStore, LimitStoreError

__all__ = ["RedisLimitStore"]

_PREFIX = "asyncmodels:limit:"
_LIFETIME = 86400


class RedisLimitStore(LimitStore):
    """Keeps the bucket ``name`` on the Redis server at ``server``: a URL such as ``redis://:password@host:6379/0``,
    ``rediss://...`` or ``unix://...``, or a ``redis.Redis``.

    A ``#name`` behind the URL goes before ``name``. A server that is silent for ``timeout`` seconds has failed; what is
    given as a ``redis.Redis`` has time limits of its own, and is not closed. ``time`` replaces the server's clock.
    """

    def __init__(
        self, server: str | Redis, *, name: str = "default", timeout: float = 5.0, time: float | None = None
    ) -> None:
        self._owns = isinstance(server, str)
        if isinstance(server, str):
            url, fragment = urldefrag(server)
            try:
                parts: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # redis left it without types
                # Tried again once, and at once: a connection that was idle for long may have been closed.
                self._client = Redis.from_url(
                    url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 1)
                )
            except (ValueError, TypeError, AttributeError):
                # Never the url itself, in which a password may be.
                raise ConfigurationError(
                    "The URL of a shared limit is one such as 'redis://localhost:6379/0#name'."
                ) from None
            name = fragment or name
        else:
            self._client = server
            parts = getattr(server.connection_pool, "connection_kwargs", {})
        self.place = "Redis " + str(parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}")
        self.name = name
        self.time = time
        self._script = self._client.register_script(_SCRIPT)

    def exchange(self, asked: Asked, /) -> Answer:
        try:
            said: Any = self._script(keys=[_PREFIX + self.name], args=list(self._arguments(asked)))
            wait, at, number, *rest = [_number(word) for word in said]
        except ResponseError as error:
            # What the server says of a script of ours holds nothing of the caller's; NOAUTH, WRONGTYPE, READONLY, ...
            raise LimitStoreError(f"The {self.place} refuses to hold a shared limit: {error}.") from error
        except (RedisError, OSError) as error:
            # Only the kind of error: the text may hold the address with its password.
            raise LimitStoreError(
                f"The {self.place}, which holds a shared limit, cannot be reached: {type(error).__name__}."
            ) from error
        delays = tuple(delay or 0.0 for delay in rest[12:])
        levels, spent, (a, b, c, d) = _four(rest[:4]), _four(rest[4:8]), rest[8:12]
        return Answer(delays, wait or 0.0, at or 0.0, int(number or 0), levels, spent, (a, b, c, d))

    def close(self) -> None:
        if self._owns:
            self._client.close()

    def _arguments(self, asked: Asked) -> Iterator[str]:
        yield "" if self.time is None else repr(self.time)
        for number in (BURST, CREDIT, GRAIN, JUMP, HOLD_MOST, _LIFETIME, asked.ahead):
            yield repr(number)
        yield from map(_word, asked.given)
        yield str(len(asked.lessons))
        for lesson in asked.lessons:
            grant = lesson.grant
            yield str(grant.number)
            yield repr(grant.at)
            yield repr(lesson.hold)
            for amounts in (grant.cost, grant.spent, lesson.limits, lesson.remaining):
                yield from map(_word, amounts)
        for amounts_of in (asked.backs, asked.costs):
            yield str(len(amounts_of))
            for each in amounts_of:
                yield from map(_word, each)


def _word(amount: float | None) -> str:
    return "-" if amount is None else repr(float(amount))


def _number(word: bytes | str) -> float | None:
    text = word.decode("ascii") if isinstance(word, bytes) else word
    return None if text == "-" else float(text)


def _four(numbers: Sequence[float | None]) -> Amounts:
    a, b, c, d = (number or 0.0 for number in numbers)
    return a, b, c, d


# What limit_bucket.serve does, line by line; tests/policies/test_rate_limit_redis.py holds the two to the same.
_SCRIPT = """
local place = 0
local function word() place = place + 1; return ARGV[place] end
local function number() return tonumber(word()) end
local function four() return {number() or false, number() or false, number() or false, number() or false} end

local now = word()
if now == '' then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
else
  now = tonumber(now)
end
local BURST, CREDIT, GRAIN, JUMP = number(), number(), number(), number()
local HOLD_MOST, LIFETIME, ahead = number(), number(), number()
local given = four()

local at, held, count, heeded = now, now, 0, 0
local levels, spent, learned = {0, 0, 0, 0}, {0, 0, 0, 0}, {false, false, false, false}
local kept = redis.call('GET', KEYS[1])
if kept then
  local words = {}
  for one in string.gmatch(kept, '%S+') do words[#words + 1] = tonumber(one) or false end
  if #words == 16 then
    at, held, count, heeded = words[1], words[2], words[3], words[4]
    for d = 1, 4 do levels[d], spent[d], learned[d] = words[4 + d], words[8 + d], words[12 + d] end
  end
end

local rates
local function reckon()
  rates = {}
  for d = 1, 4 do
    local limit = given[d]
    if learned[d] and (not limit or learned[d] < limit) then limit = learned[d] end
    if limit then rates[d] = limit / 60 end
  end
end

local function refill(moment)
  local elapsed = moment - at
  if elapsed <= 0 then
    if elapsed < -JUMP then
      held = moment + math.min(held - at, HOLD_MOST)
      at = moment
    end
    return
  end
  at = moment
  for d = 1, 4 do
    local rate = rates[d]
    if rate and levels[d] < rate * BURST then levels[d] = math.min(levels[d] + rate * elapsed, rate * BURST) end
  end
end

reckon()
for _ = 1, number() do
  local lesson, started, hold = number(), number(), number()
  local cost, before, limits, remaining = four(), four(), four(), four()
  if heeded < lesson and lesson <= count then
    heeded = lesson
    for d = 1, 4 do learned[d] = limits[d] or learned[d] end
    reckon()
    refill(now)
    if hold > 0 then held = math.max(held, now + math.min(hold, HOLD_MOST)) end
    local elapsed = math.max(0, now - started)
    for d = 1, 4 do
      if rates[d] and remaining[d] then
        local whole = learned[d] or rates[d] * 60
        local left = math.min(whole, remaining[d] + whole / 60 * elapsed - (spent[d] - before[d]))
        if left < cost[d] then levels[d] = math.min(levels[d], left - cost[d]) end
      end
    end
  end
end

for _ = 1, number() do
  local back = four()
  refill(now)
  for d = 1, 4 do
    local rate, level = rates[d], levels[d]
    if rate then
      if back[d] <= 0 then
        levels[d] = level + back[d]
      else
        levels[d] = math.min(level + back[d], math.max(level, rate * CREDIT, back[d]))
      end
    end
    spent[d] = spent[d] - back[d]
  end
end

local function waiting()
  local seconds = 0
  for d = 1, 4 do
    if rates[d] then seconds = math.max(seconds, -levels[d] / rates[d]) end
  end
  seconds = math.max(seconds + (at - now), held - now)
  return seconds > GRAIN and seconds or 0
end

local delays = {}
refill(now)
for _ = 1, number() do
  local cost, delay = four(), waiting()
  if delay > ahead or held > now then break end
  refill(now + delay)
  for d = 1, 4 do
    if rates[d] then levels[d] = levels[d] - cost[d] end
    spent[d] = spent[d] + cost[d]
  end
  count = count + 1
  delays[#delays + 1] = delay
end

local function text(value) return value and string.format('%.17g', value) or '-' end
local state = {text(at), text(held), text(count), text(heeded)}
for _, amounts in ipairs({levels, spent, learned}) do
  for d = 1, 4 do state[#state + 1] = text(amounts[d]) end
end
redis.call('SET', KEYS[1], table.concat(state, ' '), 'EX', LIFETIME)
local answer = {text(waiting()), text(now), text(count)}
for place = 5, 16 do answer[#answer + 1] = state[place] end
for _, delay in ipairs(delays) do answer[#answer + 1] = text(delay) end
return answer
"""
