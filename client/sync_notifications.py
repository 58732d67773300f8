"""Rules for notifications, for programs without asyncio: the twin of `NotifyCalls`."""

from __future__ import annotations

from ..schemas.work.notifications import Notifications, NotifyRule
from .jobs.sync import Runs
from .notifications import NotifyCalls


class SyncNotifyCalls:
    """Calls about rules for notifications, as `client.notifications` of a `SyncClient`.

    Args:
        loop: runs the calls.
        calls: the asynchronous ones.
    """

    def __init__(self, loop: Runs, calls: NotifyCalls) -> None:
        self._loop = loop
        self._calls = calls

    def rules(self, *, owner: str | None = None, override: bool = False) -> Notifications:
        """See `NotifyCalls.rules`."""
        return self._loop.run(self._calls.rules(owner=owner, override=override))

    def set(self, rule: NotifyRule, *, owner: str | None = None, override: bool = False) -> Notifications:
        """See `NotifyCalls.set`."""
        return self._loop.run(self._calls.set(rule, owner=owner, override=override))

    def remove(self, name: str, *, owner: str | None = None, override: bool = False) -> Notifications:
        """See `NotifyCalls.remove`."""
        return self._loop.run(self._calls.remove(name, owner=owner, override=override))

    def test(
        self,
        *,
        rule: str | None = None,
        target: str | None = None,
        owner: str | None = None,
        override: bool = False,
    ) -> Notifications:
        """See `NotifyCalls.test`."""
        return self._loop.run(self._calls.test(rule=rule, target=target, owner=owner, override=override))
