"""Calls on behalf of an owner or an operator, on subjects that end with that name where the bus requires it."""

from __future__ import annotations

import msgspec
import nats.aio.client

from ..bus.credentials import ANY_OWNER
from ..bus.permissions import identity_of
from ..schemas import requests
from .errors import InvalidRequest, Refused
from .request import default_owner
from .rpc import Calls


class OwnedCalls(Calls):
    """Calls over a connection on behalf of an owner.

    Args:
        nc: a connected client of the bus.
        owner: owner of requests, leases and jobs where a call names none; None takes the owner that the environment
            names, then that of the credentials, then the name of the user account.
        timeout: as in `Calls`.
        patience: as in `Calls`.
        owned_subjects: send requests on subjects that end with the owner; None does so if the connection has
            credentials.

    Attributes:
        identity: identity in the connection's credentials.
    """

    def __init__(
        self,
        nc: nats.aio.client.Client,
        *,
        owner: str | None,
        timeout: float,
        patience: float,
        owned_subjects: bool | None,
    ) -> None:
        super().__init__(nc)
        self.identity = identity_of(nc)
        self.owner = owner or default_owner(self.identity.owner)
        self.timeout = timeout
        self.patience = patience
        self.owned_subjects = bool(self.identity.file) if owned_subjects is None else owned_subjects

    def _owned(self, subject: str, owner: str) -> str:
        named = self.identity.owner
        if named not in ("", ANY_OWNER, owner):
            # The server would refuse the message without a reply, so the caller would wait until the timeout.
            raise Refused(
                f"these credentials can make requests for the owner {named!r} only, not for {owner!r}",
                "refused",
                "$.owner",
            )
        return f"{subject}.{owner}" if self.owned_subjects else subject

    def _operator(self, operator: str | None) -> str:
        """Name that signs an action: `operator` if given, else the credentials' user, else the client's owner.

        The server checks the name against the credentials. Credentials for any owner sign with the client's owner.
        """
        if operator or self.identity.owner == ANY_OWNER:
            return operator or self.owner
        return self.identity.user or self.owner

    def _signed_by(self, subject: str, operator: str) -> str:
        """Subject of an operator's action.

        Raises:
            InvalidRequest: the name can't stand in a subject.
        """
        if not self.owned_subjects:
            return subject
        try:
            msgspec.convert(operator, requests.OwnerName)
        except msgspec.ValidationError:
            text = f"{operator!r} can't sign an action: use letters, digits and _ @ . : / + - only"
            raise InvalidRequest(text, "invalid", "$.operator") from None
        return f"{subject}.{operator}"
