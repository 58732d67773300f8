"""Members of groups from `corral auth`, where a user may have a group."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from ....bus.access.folder import Authority, AuthorityError
from ....bus.access.users import User
from ....schemas.work.groups import GroupTree
from ...exits import USAGE, CommandError
from ..auth import FOLDER_VARIABLE, default_folder

AuthFolder = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        envvar=FOLDER_VARIABLE,
        metavar="FOLDER",
        help="Folder of the authority, for --members-from-auth. Default: that of `corral up`.",
    ),
]


def from_auth(tree: GroupTree, folder: Path | None) -> GroupTree:
    """A tree with the members that users have by their groups in the authority of a folder.

    Raises:
        CommandError: there is no authority, or a user's group is not in the tree.
    """
    try:
        users = Authority(folder or default_folder()).registry.users.values()
    except AuthorityError as error:
        raise CommandError(str(error), USAGE) from None
    return with_members(tree, users)


def with_members(tree: GroupTree, users: Iterable[User]) -> GroupTree:
    """A tree in which each user's owner is in the user's group, and in no other. Users without a group change nothing.

    Raises:
        CommandError: a group is not in the tree, or two users of one owner have different groups.
    """
    group_of: dict[str, str] = {}
    for user in users:
        if user.group and group_of.setdefault(user.owner, user.group) != user.group:
            text = f"owner {user.owner} is in {group_of[user.owner]} and in {user.group} by `corral auth`: leave one"
            raise CommandError(text, USAGE)
    known = {group.name for group in tree.groups}
    for owner, name in group_of.items():
        if name not in known:
            text = f"{owner} is in group {name} by `corral auth`, which is not there: add it, or change the user's"
            raise CommandError(text, USAGE)
    return replace(
        tree,
        groups=[
            replace(
                group,
                members=[
                    *(owner for owner in group.members if group_of.get(owner, group.name) == group.name),
                    *(owner for owner in group_of if group_of[owner] == group.name and owner not in group.members),
                ],
            )
            for group in tree.groups
        ],
    )
