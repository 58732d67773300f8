"""Answers commands about rules over the bus: owners about their own, operators about everybody's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from ..bus.permissions import with_name
from ..bus.tasks import BackgroundTasks
from ..schemas import codec, replies, subjects
from ..schemas.requests import Error
from ..schemas.work.notifications import (
    MAX_RULES,
    Notifications,
    NotifyAction,
    NotifyOverride,
    NotifyRule,
    NotifyVerb,
    SendResult,
)
from .messages import clock, trial_message
from .outbox import Outbox
from .rulebook import RuleBook
from .rules import WrongRule, check
from .sending import Sender
from .store import Store, StoredRules, StoreFailed

log = logging.getLogger("corral.notifier")

T = TypeVar("T", NotifyAction, NotifyOverride)

MAX_REQUEST_BYTES: Final = 2**16
TESTS: Final = 6
"""Tests that an owner may ask for in `TEST_SECONDS`: they reach people."""
TEST_SECONDS: Final = 60.0
_REMEMBERED: Final = 1000


class Refusal(Exception):
    """A command that is not carried out.

    Attributes:
        error: the answer.
    """

    def __init__(self, code: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.error = Error(code=code, message=message, field=field)


class Api:
    """The notifier's subjects.

    Args:
        nc: connection.
        book: rules and targets.
        store: keeps rules.
        outbox: knows the state of targets.
        sender: sends tests.
    """

    def __init__(self, nc: Client, book: RuleBook, store: Store, outbox: Outbox, sender: Sender) -> None:
        self._nc = nc
        self._book = book
        self._store = store
        self._outbox = outbox
        self._sender = sender
        self._tasks = BackgroundTasks()
        self._subscriptions: list[Subscription] = []
        self._changes = asyncio.Lock()
        self._tests: dict[str, deque[float]] = {}

    async def open(self) -> None:
        """Answer from now on."""
        for subject, field, answer in (
            (subjects.NOTIFY_RULES, "owner", self._answering(subjects.NOTIFY_RULES, "owner", NotifyAction, self._own)),
            (
                subjects.NOTIFY_OVERRIDE,
                "operator",
                self._answering(subjects.NOTIFY_OVERRIDE, "operator", NotifyOverride, self._override),
            ),
        ):
            for listened in (subject, f"{subject}.>"):
                self._subscriptions.append(await self._nc.subscribe(listened, cb=answer))
            self._subscriptions.append(
                await self._nc.subscribe(subjects.unnamed(subject), cb=self._refusing(subject, field))
            )

    async def close(self) -> None:
        """Answer no more."""
        for subscription in self._subscriptions:
            with contextlib.suppress(NatsError, OSError, ValueError):
                await subscription.unsubscribe()
        self._subscriptions = []
        await self._tasks.cancel()

    def _refusing(self, subject: str, field: str) -> Callable[[Msg], Awaitable[None]]:
        async def refuse(message: Msg) -> None:
            await self._reply(message, Error(code="refused", message=with_name(subject, field)))

        return refuse

    def _answering(
        self, subject: str, field: str, type: type[T], work: Callable[[T], Awaitable[Notifications]]
    ) -> Callable[[Msg], Awaitable[None]]:
        async def answer(message: Msg) -> None:
            try:
                action, warnings = _decoded(message, subject, field, type)
                found: Notifications | Error = replace(await work(action), warnings=warnings)
            except codec.DecodeError as error:
                found = Error(code=error.code, message=str(error), field=error.field)
            except Refusal as refusal:
                found = refusal.error
            except StoreFailed as error:
                found = Error(code="unavailable", message=f"{error}: nothing was changed, try again")
            except Exception:
                log.exception("a command on %s failed", message.subject)
                found = Error(code="internal", message="the command failed: see the notifier's log")
            await self._reply(message, found)

        async def start(message: Msg) -> None:
            # A test may take half a minute, and others shall not wait for it.
            self._tasks.start(answer(message), name="command")

        return start

    async def _reply(self, message: Msg, found: Notifications | Error) -> None:
        if message.reply:
            content = replies.asked_in(message.headers)
            with contextlib.suppress(NatsError, OSError):
                await self._nc.publish(
                    message.reply, codec.encode(found, content), headers=replies.headers(found, content)
                )

    # Commands

    async def _own(self, action: NotifyAction) -> Notifications:
        if action.owner is None:
            raise Refusal("invalid", "the owner of the rules is missing", "$.owner")
        return await self._carry_out(action, action.owner, by=action.owner)

    async def _override(self, override: NotifyOverride) -> Notifications:
        action = override.action
        found = await self._carry_out(action, action.owner or "", by=override.operator, operator=True)
        if action.verb is not NotifyVerb.LIST:
            log.info("%s by the operator %s, about %s", action.verb, override.operator, action.owner or "all rules")
        return found

    async def _carry_out(self, action: NotifyAction, owner: str, *, by: str, operator: bool = False) -> Notifications:
        """Carry a command out.

        Args:
            action: the command.
            owner: owner of the rules; empty for all rules, and those of the file.
            by: who gives it.
            operator: true if that is an operator, who may name any target.
        """
        results: list[SendResult] = []
        async with self._changes:
            if action.verb is NotifyVerb.SET:
                await self._set(action, owner)
            elif action.verb is NotifyVerb.REMOVE:
                await self._remove(action, owner)
        if action.verb is NotifyVerb.TEST:
            results = await self._test(action, owner, by)
        rules = [owned for owned in self._book.rules if owned.owner == owner or (operator and not owner)]
        # Statuses are of full names, and each owner sees the names that count in their rules.
        names = self._book.targets.names_for(owner)
        full = {name: target.name for name in names if (target := self._book.targets.of_owner(owner, name))}
        statuses = await asyncio.to_thread(self._outbox.statuses, list(full.values()))
        shown = [replace(status, name=name) for name, status in zip(full, statuses, strict=True)]
        return Notifications(rules=rules, targets=shown, results=results)

    async def _set(self, action: NotifyAction, owner: str) -> None:
        rule = action.rule
        if rule is None:
            raise Refusal("invalid", "the rule to set is missing", "$.rule")
        if not owner:
            raise Refusal(
                "refused", "rules for everybody are in the notifier's file (corral notifier --rules)", "$.owner"
            )
        try:
            check(rule)
        except WrongRule as error:
            raise Refusal("invalid", str(error), f"$.rule.{error.field}") from None
        for name in rule.to:
            if self._book.targets.of_owner(owner, name) is None:
                raise Refusal("not_found", self._no_target(owner, name), "$.rule.to")
        before = self._book.of_owner(owner)
        rules = [rule if each.name == rule.name else each for each in before]
        if rule not in rules:
            rules.append(rule)
        if len(rules) > MAX_RULES:
            raise Refusal("refused", f"{owner} has {MAX_RULES} rules, which is the most: remove one first", "$.rule")
        await self._save(StoredRules(owner=owner, rules=rules))

    async def _remove(self, action: NotifyAction, owner: str) -> None:
        if action.name is None:
            raise Refusal("invalid", "the name of the rule to remove is missing", "$.name")
        if not owner:
            raise Refusal("refused", "say whose rule it is; those of the file are removed there", "$.owner")
        rules = self._book.of_owner(owner)
        left = [rule for rule in rules if rule.name != action.name]
        if len(left) == len(rules):
            raise Refusal("not_found", _no_rule(owner, action.name, rules), "$.name")
        await self._save(StoredRules(owner=owner, rules=left))

    async def _save(self, rules: StoredRules) -> None:
        await self._store.save_rules(rules)
        self._book.set_owner(rules)

    async def _test(self, action: NotifyAction, owner: str, by: str) -> list[SendResult]:
        if (action.name is None) == (action.target is None):
            raise Refusal("invalid", "name either a rule or a target to test", "$.name")
        zone = "UTC"
        if action.target is not None:
            names = [action.target]
        else:
            assert action.name is not None
            owned = next(
                (each for each in self._book.rules if each.owner == owner and each.rule.name == action.name), None
            )
            if owned is None:
                known = [each.rule for each in self._book.rules if each.owner == owner]
                raise Refusal("not_found", _no_rule(owner, action.name, known), "$.name")
            names, zone = owned.rule.to, owned.rule.zone
        found = {name: self._book.targets.of_owner(owner, name) for name in names}
        for name, target in found.items():
            if target is None:
                raise Refusal("not_found", self._no_target(owner, name), "$.target")
        self._count_test(by)
        message = trial_message(action.name or "", clock(datetime.now(UTC), zone))
        sent = await asyncio.gather(*(self._sender.send(target, message) for target in found.values() if target))
        return [
            SendResult(target=name, sent=not result.problem, seconds=result.seconds, problem=result.problem)
            for name, result in zip(found, sent, strict=True)
        ]

    def _count_test(self, by: str) -> None:
        now = time.monotonic()
        if len(self._tests) > _REMEMBERED:
            self._tests = {who: times for who, times in self._tests.items() if times and now - times[-1] < TEST_SECONDS}
        times = self._tests.setdefault(by, deque())
        while times and now - times[0] > TEST_SECONDS:
            times.popleft()
        if len(times) >= TESTS:
            raise Refusal("too_many_requests", f"{TESTS} tests a minute are the most: wait a little")
        times.append(now)

    def _no_target(self, owner: str, name: str) -> str:
        names = self._book.targets.names_for(owner)
        known = f"there are {', '.join(names)}" if names else "there is none yet"
        whose = f" for {owner}" if owner else ""
        return f"there is no target {name!r}{whose}: {known}. Operators add targets to the notifier's file"


def _no_rule(owner: str, name: str, rules: Sequence[NotifyRule]) -> str:
    known = f"there are {', '.join(rule.name for rule in rules)}" if rules else "there is none yet"
    return f"{owner or 'the file'} has no rule {name!r}: {known}"


def _decoded(message: Msg, subject: str, field: str, type: type[T]) -> tuple[T, list[str]]:
    """Decode a command. The name that ends the subject fills the body's field, and must equal it if that is set.

    Raises:
        DecodeError: the body is wrong, or names another.
    """
    content = codec.content_type(message.headers)
    if len(message.data) > MAX_REQUEST_BYTES:
        raise codec.DecodeError(
            f"The message has {len(message.data)} bytes, {MAX_REQUEST_BYTES} are the most", "too_large"
        )
    named = message.subject.removeprefix(subject).removeprefix(".")
    if not named:
        return codec.decode_request(message.data, type, content)
    codec.refuse_empty(message.data)
    tree = codec.decode(message.data, dict[str, Any], content)
    said = tree.setdefault(field, named)
    if said != named:
        text = f"The subject says that {named!r} asks, the body says {said!r}"
        raise codec.DecodeError(text, "refused", f"$.{field}")
    return codec.decode_request(codec.encode_again(tree, content), type, content)
