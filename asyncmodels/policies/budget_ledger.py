"""The book of a budget: what was spent, what is reserved for calls that run, and who waits for some of that to come
back. Several models, policies, event loops and threads keep one book together."""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import count

from asyncmodels.errors import BudgetExceededError, ConfigurationError
from asyncmodels.policies.prices import UNIT

__all__ = ["Account", "Reservation", "SpendingLimit", "Stand", "Tally", "Waiter", "looking", "reserve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingLimit:
    """How much may be spent: money, in the currency of the Spending it belongs to, and tokens; None is no limit."""

    money: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        money, tokens = self.money, self.tokens
        number = isinstance(money, int | float | Decimal) and not isinstance(money, bool)
        if money is not None and not (number and 0 <= money < math.inf):
            raise ConfigurationError(f"A limit of money must be a number of at least 0, not {money!r}.")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise ConfigurationError(f"A limit of tokens must be a whole number of at least 0, not {tokens!r}.")


class Tally:
    """Counts the calls of one kind. Only the ledger changes it, under its lock."""

    __slots__ = (
        "calls",
        "overruns",
        "refused",
        "reserved",
        "reserved_tokens",
        "running",
        "spent",
        "tokens",
        "uncounted",
        "unpriced",
        "waiting",
    )

    def __init__(self) -> None:
        self.spent = self.reserved = self.tokens = self.reserved_tokens = 0
        self.calls = self.running = self.waiting = self.refused = 0
        self.uncounted = self.overruns = self.unpriced = 0

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Account:
    """Something that is limited, and what of it is taken. Money is in whole units, see ``prices``."""

    __slots__ = ("currency", "line", "money", "name", "reserved", "reserved_tokens", "spent", "spent_tokens", "tokens")

    def __init__(self, name: str, currency: str, limit: SpendingLimit) -> None:
        self.name = name
        self.currency = currency
        self.money = None if limit.money is None else int(Decimal(str(limit.money)) * UNIT)
        self.tokens = limit.tokens
        self.spent = self.reserved = self.spent_tokens = self.reserved_tokens = 0
        self.line: list[tuple[tuple[int, int], Waiter]] = []

    # What takes none of something fits, however little there is of it.

    def fits(self, money: int, tokens: int) -> bool:
        if money and self.money is not None and self.spent + self.reserved + money > self.money:
            return False
        return not tokens or self.tokens is None or self.spent_tokens + self.reserved_tokens + tokens <= self.tokens

    def will_never_fit(self, money: int, tokens: int) -> bool:
        """Not even if all that is reserved came back."""
        if money and self.money is not None and self.spent + money > self.money:
            return True
        return tokens > 0 and self.tokens is not None and self.spent_tokens + tokens > self.tokens

    def concerns(self, money: int, tokens: int) -> bool:
        return (money > 0 and self.money is not None) or (tokens > 0 and self.tokens is not None)

    def refusal(self, money: int, tokens: int) -> BudgetExceededError:
        scale = float(UNIT)
        if money and self.money is not None and self.spent + self.reserved + money > self.money:
            limit, spent, reserved, needed, unit = self.money, self.spent, self.reserved, money, self.currency
        else:
            limit, spent, reserved = self.tokens or 0, self.spent_tokens, self.reserved_tokens
            needed, unit, scale = tokens, "tokens", 1.0
        words = [f"{amount / scale:.10g}" for amount in (needed, limit, spent, reserved)]
        return BudgetExceededError(
            f"This call may take up to {words[0]} {unit}, which {self.name} does not have: of {words[1]} {unit}, "
            f"{words[2]} are spent and {words[3]} are reserved for calls that run.",
            needed=needed / scale,
            left=max(0, limit - spent - reserved) / scale,
            unit=unit,
        )


class Stand:
    """Where calls of one kind stand in the book: the accounts that limit them, and what counts them."""

    __slots__ = ("accounts", "limits_money", "limits_tokens", "tallies")

    def __init__(self, accounts: Iterable[Account], tallies: Iterable[Tally]) -> None:
        self.accounts = tuple(dict.fromkeys(accounts))
        self.tallies = tuple(dict.fromkeys(tallies))
        self.limits_money = any(account.money is not None for account in self.accounts)
        self.limits_tokens = any(account.tokens is not None for account in self.accounts)

    def and_those(self, others: Iterable[Stand]) -> Stand:
        stands = (self, *others)
        return Stand(
            [account for stand in stands for account in stand.accounts],
            [tally for stand in stands for tally in stand.tallies],
        )


class Reservation:
    """What is set aside for one call, in all of its accounts, until it is settled."""

    __slots__ = ("money", "settled", "stand", "tokens")

    def __init__(self, stand: Stand, money: int, tokens: int) -> None:
        self.stand = stand
        self.money = money
        self.tokens = tokens
        self.settled = False

    def settle(self, money: int, tokens: int, counted: bool = True, priced: bool = True) -> None:
        """Puts what was spent in place of what was reserved. Only the first call does anything."""
        _ledger.settle(self, money, tokens, counted, priced)

    def later(self, then: Callable[[], None]) -> None:
        """Calls ``then``, which settles, for the garbage collector: it comes at any moment, in any thread, and that may
        be the one that has the lock."""
        _ledger.later(then)


class Waiter:
    """One call in line. Its future belongs to its own event loop and is only ever resolved there."""

    __slots__ = ("error", "future", "gone", "key", "loop", "money", "reservation", "stand", "tokens")

    def __init__(self, stand: Stand, money: int, tokens: int, key: tuple[int, int]) -> None:
        self.stand = stand
        self.money = money
        self.tokens = tokens
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.reservation: Reservation | None = None
        self.error: BudgetExceededError | None = None
        self.gone = False

    def leave(self) -> None:
        """Gives up, and gives back what it may just have been given."""
        _ledger.leave(self)

    def leave_later(self) -> None:
        _ledger.later(self.leave)

    def wake(self) -> bool:
        """False when its loop is closed, so that nobody can hear it."""
        if asyncio._get_running_loop() is self.loop:
            self._resolve()
            return True
        try:
            self.loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:
            return False
        return True

    def _resolve(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _Ledger:
    """The decisions, all of them synchronous. One lock guards all books, because books lie within each other.

    Whoever does not fit waits in the line of the first account that is too tight for him. Only what is settled in that
    account can let him in, so only its line is looked at then: in order, until one still does not fit. A newcomer waits
    behind whoever waits in any of his accounts and is no less urgent. As long as anybody waits something is reserved in
    that account, so somebody will come by.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._arrivals = count()
        self.late: deque[Callable[[], None]] = deque()

    def reserve(self, stand: Stand, money: int, tokens: int, *, priority: int, wait: bool) -> Reservation | Waiter:
        with self.lock:
            for account in stand.accounts:
                if account.line and account.line[0][0][0] <= -priority and account.concerns(money, tokens):
                    break
                if not account.fits(money, tokens):
                    break
            else:
                return self._set_aside(stand, money, tokens)
            blocker = account
            for account in stand.accounts:
                if account.will_never_fit(money, tokens) or not (wait or account.fits(money, tokens)):
                    for tally in stand.tallies:
                        tally.refused += 1
                    raise account.refusal(money, tokens)
            if not wait:  # others wait where this one fits: they belong to policies that do
                return self._set_aside(stand, money, tokens)
            waiter = Waiter(stand, money, tokens, (-priority, next(self._arrivals)))
            heapq.heappush(blocker.line, (waiter.key, waiter))
            for tally in stand.tallies:
                tally.waiting += 1
        return waiter

    def settle(self, reservation: Reservation, money: int, tokens: int, counted: bool, priced: bool) -> None:
        woken: Sequence[Waiter] = ()
        with self.lock:
            if reservation.settled:
                return
            if not counted or not priced or money > reservation.money or tokens > reservation.tokens:
                for tally in reservation.stand.tallies:
                    tally.uncounted += not counted
                    tally.unpriced += not priced
                    tally.overruns += money > reservation.money or tokens > reservation.tokens
            if self._settle(reservation, money, tokens):
                woken = self._look_at(reservation.stand.accounts)
        if woken or self.late:
            self._wake(woken)

    def leave(self, waiter: Waiter) -> None:
        with self.lock:
            if waiter.gone:
                return
            waiter.gone = True
            if waiter.reservation is None:
                self._end_wait(waiter)
            elif not waiter.reservation.settled:
                for tally in waiter.stand.tallies:
                    tally.calls -= 1
                self._settle(waiter.reservation, 0, 0)
            woken = self._look_at(waiter.stand.accounts)
        self._wake(woken)

    def later(self, then: Callable[[], None]) -> None:
        self.late.append(then)
        self.catch_up()

    def catch_up(self) -> None:
        """Does what had to wait for the lock: whoever held it comes by here after he has let go of it."""
        while self.late and not self.lock.locked():
            try:
                then = self.late.popleft()
            except IndexError:  # another thread was faster
                return
            then()

    @staticmethod
    def _set_aside(stand: Stand, money: int, tokens: int) -> Reservation:
        for account in stand.accounts:
            account.reserved += money
            account.reserved_tokens += tokens
        for tally in stand.tallies:
            tally.calls += 1
            tally.running += 1
            tally.reserved += money
            tally.reserved_tokens += tokens
        return Reservation(stand, money, tokens)

    @staticmethod
    def _settle(reservation: Reservation, money: int, tokens: int) -> bool:
        """Whether anybody waits for what comes back thereby."""
        reservation.settled = True
        stand, reserved, reserved_tokens = reservation.stand, reservation.money, reservation.tokens
        waiting = False
        for account in stand.accounts:
            account.reserved -= reserved
            account.reserved_tokens -= reserved_tokens
            account.spent += money
            account.spent_tokens += tokens
            if account.line:
                waiting = True
        for tally in stand.tallies:
            tally.running -= 1
            tally.reserved -= reserved
            tally.reserved_tokens -= reserved_tokens
            tally.spent += money
            tally.tokens += tokens
        return waiting

    def _look_at(self, accounts: Iterable[Account]) -> Sequence[Waiter]:
        """Lets in whoever fits now, and sends away who never will; returns those who must be told."""
        woken: list[Waiter] = []
        for account in accounts:
            while account.line:
                waiter = account.line[0][1]
                if not waiter.gone and not self._decide(waiter, account, woken):
                    break
                heapq.heappop(account.line)
        return woken

    def _decide(self, waiter: Waiter, account: Account, woken: list[Waiter]) -> bool:
        """Whether the first in the line of ``account`` need not wait there any longer."""
        accounts, money, tokens = waiter.stand.accounts, waiter.money, waiter.tokens
        hopeless = next((other for other in accounts if other.will_never_fit(money, tokens)), None)
        if hopeless is not None:
            waiter.error = hopeless.refusal(money, tokens)
            waiter.gone = True
            for tally in waiter.stand.tallies:
                tally.refused += 1
        else:
            if not account.fits(money, tokens):
                return False
            blocker = next((other for other in accounts if other is not account and _is_tight(other, waiter)), None)
            if blocker is not None:
                heapq.heappush(blocker.line, (waiter.key, waiter))
                return True
            waiter.reservation = self._set_aside(waiter.stand, money, tokens)
        self._end_wait(waiter)
        woken.append(waiter)
        return True

    @staticmethod
    def _end_wait(waiter: Waiter) -> None:
        for tally in waiter.stand.tallies:
            tally.waiting -= 1

    def _wake(self, woken: Iterable[Waiter]) -> None:
        for waiter in woken:
            if not waiter.wake():
                self.leave(waiter)
        if self.late:
            self.catch_up()


def _is_tight(account: Account, waiter: Waiter) -> bool:
    """Whether ``waiter`` does not fit into it, or would get in ahead of somebody who waits there for longer."""
    money, tokens, line = waiter.money, waiter.tokens, account.line
    ahead = bool(line) and line[0][0] < waiter.key and account.concerns(money, tokens)
    return ahead or not account.fits(money, tokens)


_ledger = _Ledger()


@contextmanager
def looking() -> Iterator[None]:
    """Nothing changes while somebody looks at several numbers."""
    with _ledger.lock:
        yield
    _ledger.catch_up()


def reserve(stand: Stand, money: int, tokens: int, *, priority: int = 0, wait: bool = True) -> Reservation | Waiter:
    """Sets so much aside in all of the accounts, or returns a place in line: whoever has it awaits its future.

    Raises BudgetExceededError where it can never fit, or does not now and may not ``wait``.
    """
    try:
        return _ledger.reserve(stand, money, tokens, priority=priority, wait=wait)
    finally:
        if _ledger.late:
            _ledger.catch_up()
