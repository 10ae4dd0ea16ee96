"""What a provider says of its rate limits in the headers of an answer, as a ``RateLimits`` value.

Understood are, in any case of letters:

``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``
    OpenAI, Azure, Groq, GitHub Models and most that copy them; resets are durations (``6m0s``, ``120ms``) or seconds.
    With a ``-minute`` or ``-day`` behind it (Cerebras, Mistral), which is then the window; with ``renewalperiod`` as a
    fourth word (Azure), the window in seconds; with ``tokens-prompt`` and ``tokens-generated`` (Fireworks); and in the
    spelling ``x-rate-limit-``.
``anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}``
    Anthropic; resets are dates (RFC 3339), windows minutes.
``x-ratelimit-{limit,remaining,reset}``
    GitHub, OpenRouter and many gateways, about requests; a reset is in seconds, or a moment since 1970 in seconds or
    milliseconds.
``RateLimit`` and ``RateLimit-Policy``
    the IETF's draft (draft-ietf-httpapi-ratelimit-headers): ``"default";r=50;t=30`` and ``"default";q=100;w=60``, and
    its older spelling ``limit=100, remaining=50, reset=30``; about requests, unless ``qu`` or the name says tokens.
``ratelimit-{limit,remaining,reset}``
    the older draft itself.

What cannot be read is left out. Which headers an answer has is looked at once for each set of names that comes by.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeAlias

import httpx2

from asyncmodels.types import Allowance, RateLimits, make

__all__ = ["rate_limits_in", "rate_limits_of"]

Raw: TypeAlias = Sequence[tuple[bytes, bytes]]


def rate_limits_of(answer: httpx2.Response) -> RateLimits | None:
    """What the headers of ``answer`` say; None when they say nothing."""
    raw: Raw | None = answer.extensions.get("raw_headers")  # ours leaves them there as they came, see transport.py
    return _read(answer.headers.raw if raw is None else raw)


def rate_limits_in(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> RateLimits | None:
    """The same of headers as text."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return _read(
        [(name.encode("latin-1", "replace"), str(value).encode("latin-1", "replace")) for name, value in pairs]
    )


def _read(raw: Raw) -> RateLimits | None:
    names = tuple(map(_name, raw))
    try:
        plan = _plans[names]
    except KeyError:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[names] = _planned(names)
    return None if plan is None else make(_Unread, _plan=plan, _told=plan.pick(raw), _came=time.time())


class _Unread(RateLimits):
    """It reads what was told when somebody asks for it, and is an ordinary RateLimits from then on.

    To read them costs several times what it costs to find them, and of a thousand answers few are asked.
    """

    _plan: _Plan
    _told: Raw
    _came: float

    def _learn(self) -> None:
        found: _Found = {}
        for step in self._plan.steps:
            step(self._told, self._came, found)
        fields = _chosen(found)
        # One by one, each complete in itself: another thread may be doing the same just now.
        for name in ("requests", "tokens", "input_tokens", "output_tokens"):
            object.__setattr__(self, name, fields.get(name))
        object.__setattr__(self, "__class__", RateLimits)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._learn()
        return getattr(self, name)

    def __eq__(self, other: object) -> bool:
        self._learn()
        return self == other

    def __hash__(self) -> int:
        self._learn()
        return hash(self)

    def __repr__(self) -> str:
        self._learn()
        return repr(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RateLimits, (self.requests, self.tokens, self.input_tokens, self.output_tokens)


_name = itemgetter(0)
_plans: dict[tuple[bytes, ...], _Plan | None] = {}
_MOST_PLANS = 512


# -- which header says what -------------------------------------------------------------------------------------------

# By what is counted and by the name of the limit, where a provider has several: the fields of an Allowance.
_Found: TypeAlias = dict[tuple[str, str], dict[str, float]]
_Step: TypeAlias = Callable[[Raw, float, _Found], None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which of the headers ``pick`` takes, and what each of them says."""

    pick: Callable[[Raw], Raw]
    steps: tuple[_Step, ...]


_WINDOWS = {b"second": 1.0, b"minute": 60.0, b"hour": 3600.0, b"day": 86400.0}
_UNITS = {
    b"requests": "requests",
    b"req": "requests",
    b"tokens-prompt": "input_tokens",
    b"tokens-generated": "output_tokens",
    b"tokens": "tokens",
    b"input-tokens": "input_tokens",
    b"output-tokens": "output_tokens",
}
_UNIT = b"|".join(_UNITS)
_OPENAI = re.compile(
    rb"x-rate-?limit-(limit|remaining|reset|renewalperiod)-(" + _UNIT + rb")(?:-(second|minute|hour|day))?"
)
_ANTHROPIC = re.compile(rb"anthropic-ratelimit-(" + _UNIT + rb")-(limit|remaining|reset)")
_BARE = re.compile(rb"(?:x-rate-?limit|ratelimit)-(limit|remaining|reset)")
_FIELDS = {b"limit": "limit", b"remaining": "remaining", b"reset": "reset", b"renewalperiod": "window"}


def _planned(names: tuple[bytes, ...]) -> _Plan | None:
    lower = [name.lower() for name in names]
    places: list[int] = []
    steps: list[_Step] = []
    date = 0 if b"date" in lower else None  # the first of those that are picked
    for place, name in enumerate(lower):
        told = len(places) + (date is not None)
        if match := _OPENAI.fullmatch(name):
            what, unit, window = match.groups()
            steps.append(_step(told, date, _FIELDS[what], _UNITS[unit], _WINDOWS.get(window)))
        elif match := _ANTHROPIC.fullmatch(name):
            unit, what = match.groups()
            steps.append(_step(told, date, _FIELDS[what], _UNITS[unit], 60.0))
        elif match := _BARE.fullmatch(name):
            steps.append(_step(told, date, _FIELDS[match[1]], "requests", None))
        elif name in (b"ratelimit", b"ratelimit-policy"):
            steps.append(_structured_step(told))
        else:
            continue
        places.append(place)
    if not steps:
        return None
    if date is not None:
        places.insert(0, lower.index(b"date"))
    pick = itemgetter(*places)
    return _Plan(pick if len(places) > 1 else lambda raw: (pick(raw),), tuple(steps))


def _step(told: int, date: int | None, field: str, unit: str, window: float | None) -> _Step:
    key = unit, "" if window is None else f"{window:g}"
    whole = field in ("limit", "remaining")

    def step(raw: Raw, came: float, found: _Found) -> None:
        text = raw[told][1]
        value = _count(text) if whole else _seconds(text)
        if field == "reset" and (value is None or value > _MOMENT):
            # Against the server's own clock where it says what time it is: ours may be off by minutes.
            now = came if date is None else _date(raw[date][1]) or came
            value = _until(text, now) if value is None else _from_now(value, now)
        if value is not None:
            fields = found.get(key)
            if fields is None:
                fields = found[key] = {} if window is None else {"window": window}
            fields[field] = value

    return step


def _structured_step(told: int) -> _Step:
    def step(raw: Raw, came: float, found: _Found) -> None:
        for name, unit, fields in _structured(raw[told][1]):
            found.setdefault((unit, name), {}).update(fields)

    return step


def _chosen(found: _Found) -> dict[str, Allowance]:
    allowances: dict[str, Allowance] = {}
    for (unit, _), fields in found.items():
        limit, remaining = fields.get("limit"), fields.get("remaining")
        if limit is None and remaining is None:
            continue
        allowance = make(
            Allowance,
            limit=None if limit is None else int(limit),
            remaining=None if remaining is None else int(remaining),
            reset=fields.get("reset"),
            window=fields.get("window"),
        )
        before = allowances.get(unit)
        if before is None or _is_tighter(allowance, before):
            allowances[unit] = allowance
    return allowances


def _is_tighter(one: Allowance, other: Allowance) -> bool:
    """Of two windows the one to heed: the one that is used up, else the shorter one."""
    if (one.remaining == 0) != (other.remaining == 0):
        return one.remaining == 0
    return (one.window or 60.0) < (other.window or 60.0)


# -- values -----------------------------------------------------------------------------------------------------------

_MOMENT = 1e8  # seconds since 1970, not from now: more than three years are no reset
_DURATION = re.compile(b"".join(rb"(?:(\d+(?:\.\d+)?)%s)?" % unit for unit in (b"d", b"h", b"m(?!s)", b"s", b"ms")))
_SECONDS_OF = (86400.0, 3600.0, 60.0, 1.0, 0.001)


def _count(value: bytes) -> float | None:
    """A whole number, at most of 15 digits."""
    if value.isdigit() and len(value) < 16:
        return int(value)
    match = _LEADING.match(value)
    return int(match[1]) if match else None


_LEADING = re.compile(rb"\s*(\d{1,15})(?:\.\d+)?\s*(?:[,;].*)?$", re.DOTALL)


@lru_cache(maxsize=1024)
def _seconds(value: bytes) -> float | None:
    """Of ``"12"``, ``"11.38"``, ``"1m6.5s"`` or ``"120ms"``; None for what is neither."""
    text = value.strip()
    try:
        number = float(text)
    except ValueError:
        match = _DURATION.fullmatch(text.replace(b" ", b""))
        if not text or match is None:
            return None
        return sum(float(part) * seconds for part, seconds in zip(match.groups(), _SECONDS_OF, strict=True) if part)
    return number if 0 <= number < float("inf") else None


def _until(value: bytes, now: float) -> float | None:
    """The seconds until a date."""
    try:
        moment = datetime.fromisoformat(value.decode("ascii").strip())
        return None if moment.tzinfo is None else max(0.0, moment.timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _from_now(moment: float, now: float) -> float:
    """The same until a moment since 1970, in seconds or in milliseconds."""
    return max(0.0, (moment / 1000 if moment > 1e11 else moment) - now)


@lru_cache(maxsize=8)
def _date(value: bytes) -> float | None:
    try:
        return parsedate_to_datetime(value.decode("ascii")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


# -- the IETF's structured fields -------------------------------------------------------------------------------------

_ITEM = re.compile(
    r"""\s*(?:"(?P<quoted>[^"]*)"|(?P<bare>[^;,="\s]+))(?P<parameters>(?:\s*;\s*[a-z*][\w.*-]*(?:=[^;,]*)?)*)\s*(?:,|$)"""
)
_PARAMETER = re.compile(r';\s*([a-z*][\w.*-]*)=\s*"?([^;,"]*)"?')
_OLD = re.compile(r"(limit|remaining|reset)\s*=\s*(\d{1,15})")
_WHOLE = re.compile(r"\d{1,15}", re.ASCII)
_LETTERS = {"q": "limit", "w": "window", "r": "remaining", "t": "reset"}


@lru_cache(maxsize=256)
def _structured(value: bytes) -> tuple[tuple[str, str, tuple[tuple[str, float], ...]], ...]:
    """Of each item its name, what it counts, and what it says."""
    text = value.decode("latin-1")
    old = _OLD.findall(text)
    if old:
        return (("", "requests", tuple((field, float(number)) for field, number in old)),)
    items: list[tuple[str, str, tuple[tuple[str, float], ...]]] = []
    for item in _ITEM.finditer(text):
        parameters = dict(_PARAMETER.findall(item["parameters"]))
        fields = tuple(
            (field, float(parameters[letter]))
            for letter, field in _LETTERS.items()
            if _WHOLE.fullmatch(parameters.get(letter, "").strip())
        )
        name = item["quoted"] or item["bare"] or ""
        if _WHOLE.fullmatch(name):  # the draft before: ``100;w=60``, of the one limit that the other headers are about
            if items:
                continue
            fields, name = (("limit", float(name)), *fields), ""
        unit = _counted(parameters.get("qu", ""), name)
        if fields and unit is not None:
            items.append((name, unit, fields))
    return tuple(items)


def _counted(quota_unit: str, name: str) -> str | None:
    if quota_unit not in ("", "requests", "tokens"):
        return None  # bytes, connections
    words = f"{quota_unit} {name}".lower().replace("_", "-")
    if "token" not in words:
        return "requests"
    return "input_tokens" if "input" in words else "output_tokens" if "output" in words else "tokens"
