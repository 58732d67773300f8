"""Targets: where messages go, from files that only the notifier may read.

    [targets]
    ops = "slack://…"
    ann-mail = { url = "mailtos://user:password@smtp.example?to=ann@example", owners = ["ann"] }

Rules of the operator may name any target. `owners` says who else may, in rules of their own. Files in a folder each
hold the targets of one owner, `ann.toml` those of ann: in ann's own rules they have the names that they have there,
elsewhere `ann/` before it.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import msgspec
from msgspec import Meta, Struct

from ..schemas.requests import OwnerName
from ..schemas.values import globs
from ..schemas.values.error_words import in_words
from ..schemas.values.misspelt import meant
from ..schemas.work.notifications import TargetName

_OTHERS: Final = stat.S_IWGRP | stat.S_IRWXO
"""What nobody but the file's owner may: write as its group, or anything as all others."""
_KEYS: Final = ("url", "owners", "format")


class WrongTargets(ValueError):
    """A file of targets can't be used; the message says why, and what to do. It has no secrets."""


class Target(Struct, frozen=True, kw_only=True):
    """A target.

    Attributes:
        name: name; with the owner and `/` before it for one of an owner's file.
        url: address with its secrets, as Apprise has it.
        owners: who may name it in rules of their own, as globs.
        format: `text` or `markdown`; empty for what its service takes best.
        owner: owner of the file that it is in; empty for the operator's.
    """

    name: str
    url: str
    owners: tuple[str, ...] = ()
    format: Literal["", "text", "markdown"] = ""
    owner: str = ""

    def __repr__(self) -> str:
        """Leave out the address, which must not get into a log."""
        return f"Target({self.name!r})"


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(min_length=1, max_length=8192)]
    owners: list[Annotated[str, Meta(min_length=1, max_length=128)]] = []
    format: Literal["", "text", "markdown"] = ""


class Targets(Struct, frozen=True):
    """All targets, by name."""

    by_name: Mapping[str, Target] = {}

    def of_owner(self, owner: str, name: str) -> Target | None:
        """The target that an owner means by a name; empty for the operator."""
        if not owner:
            return self.by_name.get(name)
        own = self.by_name.get(f"{owner}/{name}")
        if own is not None:
            return own
        found = self.by_name.get(name)
        return found if found is not None and self.allows(found, owner) else None

    @staticmethod
    def allows(target: Target, owner: str) -> bool:
        """True if an owner may name a target in rules of their own."""
        return target.owner == owner or globs.matches_any(owner, target.owners)

    def names_for(self, owner: str) -> list[str]:
        """Names that an owner may use, sorted; all for the operator."""
        return sorted(
            name.removeprefix(f"{owner}/") if owner else name
            for name, target in self.by_name.items()
            if not owner or self.allows(target, owner)
        )


def files_in(file: Path | None, folder: Path | None) -> list[Path]:
    """Files of targets that are there."""
    found = [file] if file is not None and file.exists() else []
    if folder is not None and folder.is_dir():
        found += sorted(folder.glob("*.toml"))
    return found


def read(file: Path | None, folder: Path | None = None) -> tuple[Targets, list[str]]:
    """Read the targets.

    Args:
        file: the operator's; None for none.
        folder: with a file for each owner; None for none.

    Returns:
        The targets, and what is wrong with files of owners: one of them does not affect the others.

    Raises:
        WrongTargets: the operator's file can't be read, or is wrong.
    """
    found = _of_file(file, "") if file is not None else {}
    problems: list[str] = []
    files: dict[str, Path] = {}
    for path in files_in(None, folder):
        try:
            of_one = _of_file(path, path.stem)
            for target in of_one.values():
                if files.setdefault(target.owner, path) != path:
                    raise WrongTargets(f"{path}: {files[target.owner]} is the file of {target.owner} already")
            found |= of_one
        except WrongTargets as error:
            problems.append(str(error))
    return Targets(found), problems


def _of_file(path: Path, owner: str) -> dict[str, Target]:
    document = _parsed(path)
    if owner:
        owner = _owner(document.pop("owner", None), path)
    for key in document:
        if key != "targets":
            close = meant(key, ("targets",))
            raise WrongTargets(f"{path}: there is no key {key!r}: " + (f"did you mean {close!r}?" if close else _FORM))
    tables = document.get("targets", {})
    if not isinstance(tables, dict):
        raise WrongTargets(f"{path}: {_FORM}")
    found: dict[str, Target] = {}
    for name, value in cast("dict[str, Any]", tables).items():
        where = f"target {name!r}"
        _converted(name, TargetName, path, where)
        entry = _entry({"url": value} if isinstance(value, str) else value, path, where)
        if owner and entry.owners:
            raise WrongTargets(f"{path}: {where}: leave out `owners`, since the file is of one owner")
        full = f"{owner}/{name}" if owner else name
        found[full] = Target(
            name=full, url=entry.url.strip(), owners=tuple(entry.owners), format=entry.format, owner=owner
        )
    return found


def _owner(said: Any, path: Path) -> str:
    """Owner of a file: its name, unless no file can have the name. So nobody's file can speak for another."""
    owner = _converted(path.stem if said is None else said, OwnerName, path, "owner")
    if owner != path.stem and "/" not in owner:
        raise WrongTargets(f"{path}: the file of {owner} has the name {owner}.toml")
    return owner


_FORM: Final = "write targets like this: [targets], and below it ann-mail = 'mailtos://…'"


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _OTHERS:
                raise WrongTargets(
                    f"{path} can be read or changed by others (mode {stat.S_IMODE(mode):o}), and has passwords in it: "
                    f"chmod 600 {path}"
                )
            return tomllib.load(file)
    except OSError as error:
        raise WrongTargets(f"{path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongTargets(f"{path} is no TOML: {error}") from None


def _entry(value: Any, path: Path, where: str) -> _Entry:
    if isinstance(value, dict):
        for key in cast("dict[str, Any]", value):
            if key not in _KEYS:
                close = meant(key, _KEYS)
                raise WrongTargets(
                    f"{path}: {where} has no key {key!r}: "
                    + (f"did you mean {close!r}?" if close else f"there are {', '.join(_KEYS)}")
                )
    return _converted(value, _Entry, path, where)


def _converted(value: Any, type: Any, path: Path, where: str) -> Any:
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        # Only the path of the field: a value could be a secret.
        raise WrongTargets(f"{path}: {where}: {in_words(str(error))}") from None
