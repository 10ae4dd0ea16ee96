"""Journals in a file: what they do for a run, over a thread of their own that works with the file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from asyncmodels.batch.bulk_journal import BatchNote, BulkJournal, Placed
from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.journal import Asker, Journal
from asyncmodels.batch.journal_file import JournalFile, damaged
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile
from asyncmodels.batch.record import Asked, Questions, Record, Sample, recorded, sound
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.errors import ConfigurationError, JournalError, ResponseFormatError
from asyncmodels.fingerprint import differences, fingerprint, read
from asyncmodels.formats import parse_response
from asyncmodels.identity import canonical
from asyncmodels.messages import needs_loading

__all__ = ["FileJournal", "JSONLJournal", "SQLiteJournal", "as_journal"]

logger = logging.getLogger(__name__)

OnChange: TypeAlias = Literal["refuse", "ask"]
T = TypeVar("T")

_FORMAT = 1  # part of every key: a new way of writing down a question never finds the answer to an old one


class FileJournal(Journal, BulkJournal):
    """Keeps the items of a run in the file at ``path``, each once, by its id and by everything that decides its answer.

    A run that is given a journal of the same inputs asks only for what is missing, failed items among it. Where the
    model, its endpoint or what is asked under an id is not what the journal says, the run is refused with a
    JournalError that says what differs; with ``on_change="ask"`` such items are asked anew, and the answers to what was
    asked before stay in the file.

    A backend that does not say who it is goes by the model's name, or by ``namespace``, which also keeps apart what is
    given different ones.

    What is on the disk are prompts, answers and errors, images as digests, and no keys. It must be a local disk. One
    run at a time writes to the file; others may read it meanwhile. A request that holds what JSON cannot is never
    reused.
    """

    _kind: ClassVar[str]

    def __init__(
        self, path: str | os.PathLike[str], *, on_change: OnChange = "refuse", namespace: str | None = None
    ) -> None:
        if not os.fspath(path):
            raise ConfigurationError("A journal needs the path of its file.")
        if on_change not in ("refuse", "ask"):
            raise ConfigurationError(f'on_change must be "refuse" or "ask", not {on_change!r}.')
        if namespace is not None and (not isinstance(namespace, str) or not namespace):
            raise ConfigurationError(f"The namespace of a journal is a text that is not empty, not {namespace!r}.")
        self.path = Path(os.fspath(path)).expanduser()
        self.on_change: OnChange = on_change
        self.namespace = namespace
        self._thread: ThreadPoolExecutor | None = None
        self._open: _Open | None = None

    @abstractmethod
    def _opened(self) -> JournalFile: ...

    async def begin(self, asker: Asker, /) -> None:
        who = _who(asker, self.namespace)
        if self._thread is not None:
            raise JournalError(f"The journal {str(self.path)!r} is in use by another run of this process.")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.path.name)
        try:
            await self._do(lambda: self._begin(who, asker))
        except BaseException:
            await self.aclose()
            raise

    async def known(self, entries: Sequence[Entry], /) -> Sequence[Item | None]:
        journal = self._running()
        if journal.file.empty and not any(_has_images(entry) for entry in entries):
            return [None] * len(entries)
        return await self._do(lambda: journal.known(entries))

    async def record(self, items: Sequence[Item], /) -> None:
        journal = self._running()
        await self._do(lambda: journal.record(items))

    def sample(self, sample: Sample, /) -> None:
        if self._open is not None:
            self._open.samples.append(sample)

    def room(self) -> Path:
        return self.path.with_name(f".{self.path.name}-batches")

    async def batches(self) -> Sequence[BatchNote]:
        return await self._do(self._running().file.batches)

    async def placed(self, entries: Sequence[Entry], /) -> Sequence[tuple[Placed, str | None]]:
        journal = self._running()
        return await self._do(lambda: journal.placed(entries))

    async def note(self, note: BatchNote, placed: Sequence[Placed] = (), /) -> None:
        journal = self._running()
        await self._do(lambda: journal.file.note(note, placed))

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            # The thread does one thing after the other: whatever was given before is written by then.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, self._closed))
        finally:
            thread.shutdown(wait=False)

    def __repr__(self) -> str:
        changes = "" if self.on_change == "refuse" else f", on_change={self.on_change!r}"
        return f"<{type(self).__name__} {str(self.path)!r}{changes}>"

    async def _do(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise JournalError(f"The journal {str(self.path)!r} is not open: a run opens it.")
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_told)
            raise

    def _running(self) -> _Open:
        if self._open is None:
            raise JournalError(f"The journal {str(self.path)!r} is not open: a run opens it.")
        return self._open

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _begin(self, who: Mapping[str, Any], asker: Asker) -> None:
        # Here and not by who waits for it: he may be cancelled, and what was opened must be closed.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = JournalLock(self.path)
        except OSError as error:
            raise JournalError(f"The journal {str(self.path)!r} cannot be opened: {error.strerror}.") from error
        try:
            file = self._opened()
            try:
                questions = self._settled(file, who)
                file.settle({"began": time.time(), "ended": None, "total": asker.total, "origin": asker.origin})
                self._open = _Open(file, lock, questions, self._advice())
            except BaseException:
                file.close()
                raise
        except BaseException:
            lock.release()
            raise

    def _settled(self, file: JournalFile, who: Mapping[str, Any]) -> Questions:
        """Whose answers are in the file; raises JournalError where that is not who is asked now."""
        theirs = file.who
        if theirs is None or not _is_same(who, theirs):
            if theirs is not None and not file.empty and self.on_change == "refuse":
                differ = differences(read(fingerprint(who, {})), read(fingerprint(theirs, {})), "the journal")
                raise JournalError(
                    f"The journal {str(self.path)!r} is that of another run: {'; '.join(differ)}. {self._advice()}"
                )
            file.settle({"who": who, "created": time.time()})
            theirs = who
        return Questions(theirs)

    def _advice(self) -> str | None:
        if self.on_change == "ask":
            return None
        return (
            f"Choose another path, or have what differs asked anew by "
            f'journal={self._kind}({str(self.path)!r}, on_change="ask").'
        )

    def _closed(self) -> None:
        journal, self._open = self._open, None
        if journal is not None:
            journal.close()


class SQLiteJournal(FileJournal):
    """A FileJournal in an SQLite database; SQLite makes two more files beside it while it is open."""

    _kind = "SQLiteJournal"

    def _opened(self) -> JournalFile:
        return SQLiteFile(self.path)


class JSONLJournal(FileJournal):
    """A FileJournal with a line of JSON for each item; it is read once when a run begins."""

    _kind = "JSONLJournal"

    def _opened(self) -> JournalFile:
        return JSONLFile(self.path)


def as_journal(journal: Journal | str | os.PathLike[str] | None) -> Journal | None:
    """A journal by the suffix of its path. Raises ConfigurationError for one that says nothing."""
    if journal is None or isinstance(journal, Journal):
        return journal
    if not isinstance(journal, str | os.PathLike):
        raise ConfigurationError(f"A journal is a Journal or the path of one, not a {type(journal).__name__}.")
    suffix = Path(os.fspath(journal)).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JSONLJournal(journal)
    if suffix in (".sqlite", ".sqlite3", ".db"):
        return SQLiteJournal(journal)
    raise ConfigurationError(
        f"A journal's path ends in .sqlite (or .db) or in .jsonl, not as {os.fspath(journal)!r} does; "
        "SQLiteJournal(path) takes any."
    )


class _Open:
    """A journal while a run has it: all of it but ``samples`` is the thread's."""

    def __init__(self, file: JournalFile, lock: JournalLock, questions: Questions, advice: str | None) -> None:
        self.file = file
        self.samples: list[Sample] = []
        self._lock = lock
        self._questions = questions
        self._advice = advice
        self._early: dict[int, Asked] = {}
        """What was read of requests with images, until they are recorded: their files may change."""
        self._asked_anew: set[str] = set()
        """Ids under which there is an answer to something else."""

    def known(self, entries: Sequence[Entry]) -> list[Item | None]:
        found: Mapping[str, Record] = {}
        if not self.file.empty:
            found = self.file.find([sound(entry.id) for entry in entries if entry.request is not None])
        return [self._known(entry, found.get(sound(entry.id))) for entry in entries]

    def record(self, items: Sequence[Item]) -> None:
        records = [recorded(item, self._asked(item)) for item in items]
        samples, self.samples = self.samples, []
        replaced = [record.id for record in records if record.id in self._asked_anew and not record.unread]
        self.file.write(records, samples, replaced)
        self._asked_anew.difference_update(replaced)

    def placed(self, entries: Sequence[Entry]) -> list[tuple[Placed, str | None]]:
        found = self.file.placed([sound(entry.id) for entry in entries])
        return [self._placed(entry, found.get(sound(entry.id))) for entry in entries]

    def close(self) -> None:
        try:
            if self.samples:
                self.file.write([], self.samples)
            self.file.settle({"ended": time.time()})
        except JournalError as error:
            logger.warning("%s", error)
        finally:
            self.file.close()
            self._lock.release()

    def _known(self, entry: Entry, record: Record | None) -> Item | None:
        request = entry.request
        if request is None:
            return None
        images = _has_images(entry)
        if record is None or not record.ok or record.key is None:
            if images:
                self._early[entry.index] = self._questions.asked(request)
            return None
        asked = self._questions.asked(request)
        if asked.key == record.key:
            return self._reused(entry, record)
        if images:
            self._early[entry.index] = asked
        if asked.key is not None and self._advice is not None:
            raise JournalError(self._said(entry, asked, record))
        self._asked_anew.add(record.id)
        return None

    def _placed(self, entry: Entry, found: tuple[str, str | None] | None) -> tuple[Placed, str | None]:
        request = entry.request
        assert request is not None  # noqa: S101  # only what can be asked is placed
        asked = self._early.get(entry.index) or self._questions.asked(request)
        if found is not None and found[1] != asked.key:
            if None not in (found[1], asked.key) and self._advice is not None:
                raise JournalError(
                    f"Item {entry.id!r} of the journal {str(self.file.path)!r} is being asked something else in a "
                    f"batch of the provider's. {self._advice}"
                )
            found = None
        batch = None if found is None or asked.key is None else found[0]
        return Placed(sound(entry.id), asked.key), batch

    def _reused(self, entry: Entry, record: Record) -> Item | None:
        try:
            response = record.response()
        except ValueError as error:
            raise damaged(self.file.path, f"item {entry.id!r} has no answer that can be read") from error
        assert entry.request is not None  # noqa: S101  # the caller looked
        if response is None:
            return None
        if entry.request.response_format is not None:
            try:
                response = parse_response(entry.request, response)
            except ResponseFormatError:
                return None  # the caller's own parser has become stricter
        return Item(
            index=entry.index, id=entry.id, request=entry.request, response=response, began=record.began, reused=True
        )

    def _said(self, entry: Entry, asked: Asked, record: Record) -> str:
        name = str(self.file.path)
        here, there = (read(fingerprint(None, json.loads(text or "{}"))) for text in (asked.text, record.question))
        differ = "; ".join(differences(here, there, "the journal")) or "who was asked"
        return f"Item {entry.id!r} of the journal {name!r} was asked something else: {differ}. {self._advice}"

    def _asked(self, item: Item) -> Asked | None:
        if item.request is None:
            return None
        early = self._early.pop(item.index, None)
        return self._questions.asked(item.request) if early is None else early


def _told(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; that it failed must be said even so."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("%s", error)


def _has_images(entry: Entry) -> bool:
    return entry.request is not None and needs_loading(entry.request.messages)


def _who(asker: Asker, namespace: str | None) -> dict[str, Any]:
    if asker.chain is None and asker.model_id is None and namespace is None:
        raise ConfigurationError(
            "This model has no name and its backend does not say whose answers it gives, so a journal could not tell "
            'them from another one\'s: give SQLiteJournal(path, namespace="...") the name and version of the model.'
        )
    who = {"format": _FORMAT, "namespace": namespace, "model": asker.model_id, "chain": asker.chain}
    try:
        plain: dict[str, Any] = json.loads(canonical(who))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"What the backend says of itself is no JSON: {error}.") from error
    return plain


def _is_same(mine: Mapping[str, Any], theirs: Any) -> bool:
    """Some backends know only after their first answer where that comes from: their chain is None until then. And in
    some journals stand links that say nothing."""
    if not isinstance(theirs, Mapping):
        return False
    if isinstance(chain := theirs.get("chain"), list):
        theirs = {**theirs, "chain": [*filter(None, chain[:-1]), *chain[-1:]]}
    if None in (mine["chain"], theirs.get("chain")):
        mine, theirs = ({**who, "chain": None} for who in (mine, theirs))
    return canonical(mine) == canonical(theirs)
