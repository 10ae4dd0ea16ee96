"""Where a bucket is kept that several processes share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from asyncmodels.errors import LimitStoreError
from asyncmodels.policies.limit_bucket import Answer, Asked

__all__ = ["LimitStore", "LimitStoreError"]


class LimitStore(ABC):
    """One bucket by its name. The methods block: they are called in a thread, by one at a time."""

    place: str
    """Where it is, without secrets."""
    name: str

    @abstractmethod
    def exchange(self, asked: Asked, /) -> Answer:
        """Does all of ``asked`` at once, with nobody else in between.

        Raises LimitStoreError when the store cannot be used now, within some seconds, and ConfigurationError when it
        never can.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of connections; a later ``exchange`` makes new ones. May be called from any thread."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} at {self.place}>"
