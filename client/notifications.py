"""Calls about rules for notifications, which the notifier answers."""

from __future__ import annotations

from ..schemas import subjects
from ..schemas.work.notifications import Notifications, NotifyAction, NotifyOverride, NotifyRule, NotifyVerb
from .owned_calls import OwnedCalls


class NotifyCalls(OwnedCalls):
    """Rules for notifications of an owner: the client's, or another one with `owner`.

    An operator's calls, with `override`, are about the rules of anybody.
    """

    async def rules(self, *, owner: str | None = None, override: bool = False) -> Notifications:
        """Rules and the targets that they may name; with `override` and no owner, those of all."""
        return await self._send(NotifyAction(verb=NotifyVerb.LIST), owner, override)

    async def set(self, rule: NotifyRule, *, owner: str | None = None, override: bool = False) -> Notifications:
        """Add a rule, or replace that of the same name.

        Raises:
            InvalidRequest: the rule is wrong.
            NotFound: there is no such target, or the owner may not name it.
        """
        return await self._send(NotifyAction(verb=NotifyVerb.SET, rule=rule), owner, override)

    async def remove(self, name: str, *, owner: str | None = None, override: bool = False) -> Notifications:
        """Remove a rule.

        Raises:
            NotFound: there is none of this name.
        """
        return await self._send(NotifyAction(verb=NotifyVerb.REMOVE, name=name), owner, override)

    async def test(
        self,
        *,
        rule: str | None = None,
        target: str | None = None,
        owner: str | None = None,
        override: bool = False,
    ) -> Notifications:
        """Send a test message to the targets of a rule, or to one target; its `results` say how that went.

        Raises:
            NotFound: there is no such rule or target.
            TooManyRequests: there were too many tests in the last minute.
        """
        return await self._send(NotifyAction(verb=NotifyVerb.TEST, name=rule, target=target), owner, override)

    async def _send(self, action: NotifyAction, owner: str | None, override: bool) -> Notifications:
        if not override:
            whose = owner or self.owner
            named = NotifyAction(
                owner=whose, verb=action.verb, rule=action.rule, name=action.name, target=action.target
            )
            return await self._plan(self._owned(subjects.NOTIFY_RULES, whose), named, Notifications)
        operator = self._operator(None)
        named = NotifyAction(owner=owner, verb=action.verb, rule=action.rule, name=action.name, target=action.target)
        return await self._plan(
            self._signed_by(subjects.NOTIFY_OVERRIDE, operator),
            NotifyOverride(operator=operator, action=named),
            Notifications,
        )
