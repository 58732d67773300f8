"""The rules and targets in force: those of the operator's files, and those that owners have set over the bus."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ..schemas.work.notifications import NotifyRule, OwnedRule
from . import targets as target_files
from .rule_text import parse_rules
from .rules import WrongRule
from .store import StoredRules
from .targets import Targets, WrongTargets

log = logging.getLogger("corral.notifier")


class WrongFiles(ValueError):
    """A file can't be used; the message says which, why, and what to do."""


class Files(Struct, frozen=True, kw_only=True):
    """Paths of the operator's files.

    Attributes:
        rules: TOML file of rules; None for none.
        targets: TOML file of targets; None for none.
        folder: with a file of targets for each owner; None for none.
    """

    rules: Path | None = None
    targets: Path | None = None
    folder: Path | None = None


class RuleBook:
    """Rules and targets.

    Args:
        files: the operator's files.

    Attributes:
        targets: as they are now.
        problems: what is wrong with files that have changed, or with files of owners.
    """

    def __init__(self, files: Files) -> None:
        self.targets = Targets()
        self.problems: list[str] = []
        self._files = files
        self._seen: object = None
        self._changing: object = None
        self._of_file: list[NotifyRule] = []
        self._of_owners: dict[str, StoredRules] = {}

    def read(self) -> None:
        """Read the files.

        Raises:
            WrongFiles: one of the operator's is wrong.
        """
        self._seen = self._state()
        files = self._files
        try:
            targets, problems = target_files.read(files.targets, files.folder)
        except WrongTargets as error:
            raise WrongFiles(str(error)) from None
        rules: list[NotifyRule] = []
        if files.rules is not None:
            try:
                rules = parse_rules(files.rules.read_text())
            except OSError as error:
                raise WrongFiles(f"{files.rules} can't be read: {error.strerror}") from None
            except (WrongRule, UnicodeDecodeError) as error:
                raise WrongFiles(f"{files.rules}: {error}") from None
        self.targets, self.problems, self._of_file = targets, problems, rules
        for problem in problems:
            log.warning("%s", problem)

    def reread(self) -> bool:
        """Read the files again if they have changed; one that is wrong changes nothing, and is a problem.

        They are read once they are as they were at the look before: one that is half written may well be right.

        Returns:
            True if there may be other rules or targets now.
        """
        state, before = self._state(), self._changing
        self._changing = state
        if state == self._seen or state != before:
            return False
        try:
            self.read()
        except WrongFiles as error:
            self.problems = [f"{error} (what was read before stays in force)"]
            log.error("%s", self.problems[0])
            return False
        log.info(
            "rules and targets were read again: %d rules, %d targets", len(self._of_file), len(self.targets.by_name)
        )
        return True

    def _state(self) -> object:
        """State of the files, which changes with them."""
        files = self._files
        paths = target_files.files_in(files.targets, files.folder)
        found: list[object] = []
        for path in [*paths, *([files.rules] if files.rules is not None else [])]:
            try:
                stat = path.stat()
            except OSError as error:
                found.append((path, error.errno))
            else:
                found.append((path, stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode))
        return found

    def take(self, of_owners: Mapping[str, StoredRules]) -> None:
        """Take the rules of owners, as the bucket has them."""
        self._of_owners = dict(of_owners)

    def of_owner(self, owner: str) -> list[NotifyRule]:
        """Rules of an owner."""
        found = self._of_owners.get(owner)
        return list(found.rules) if found is not None else []

    def set_owner(self, rules: StoredRules) -> None:
        """Take the rules of an owner in place of those before."""
        self._of_owners[rules.owner] = rules

    @property
    def rules(self) -> list[OwnedRule]:
        """All rules, those of the file first."""
        return [
            *(self._with_problem(OwnedRule(rule=rule)) for rule in self._of_file),
            *(
                self._with_problem(OwnedRule(rule=rule, owner=stored.owner))
                for stored in self._of_owners.values()
                for rule in stored.rules
            ),
        ]

    def meant(self, owned: OwnedRule, name: str) -> str | None:
        """Full name of the target that a rule means; None if it is not there, or the rule's owner may not name it."""
        found = self.targets.of_owner(owned.owner, name)
        return None if found is None else found.name

    def _with_problem(self, owned: OwnedRule) -> OwnedRule:
        gone = [name for name in owned.rule.to if self.meant(owned, name) is None]
        return replace(owned, problem=f"there is no target {', '.join(gone)} for it") if gone else owned
