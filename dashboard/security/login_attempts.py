"""Rate limit of failed logins. Pure state.

Failures are counted per account and address, per address, and per account. A browser that has logged in to the account
before is counted separately, by account and browser only. So guesses at a password delay only the attacker: the user
can still log in with a browser that was used before, whatever others do.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from msgspec import Struct

from ...bus.addresses import machine

FREE: Final = 5
"""Failed logins to an account from one address or known browser before the first wait."""
FREE_OF_PLACE: Final = 20
"""Failed logins to all accounts from one address before the first wait."""
FREE_OF_ACCOUNT: Final = 50
"""Failed logins to an account from all addresses, except from known browsers, before the first wait."""
FIRST_SECONDS: Final = 60.0
MAX_SECONDS: Final = 900.0
FORGOTTEN_SECONDS: Final = 3600.0
_KEPT: Final = 10_000


class _Failures(Struct):
    count: int
    last: float


class Attempts:
    """Counters of failed logins; of more than 10,000 the oldest are dropped."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str, str], _Failures] = OrderedDict()

    def wait_seconds(self, account: str, address: str, browser: str, now: float) -> float:
        """Seconds until the next attempt is allowed; 0 if it is allowed now.

        Args:
            account: name of the account; empty for a token.
            address: address of the client.
            browser: id of the browser if it has logged in to the account before; else empty.
            now: time on a monotonic clock, in seconds.
        """
        waits = (self._wait(key, free, most, now) for key, free, most in _keys(account, address, browser))
        return max(waits, default=0.0)

    def failed(self, account: str, address: str, browser: str, now: float) -> None:
        """Count a failed login."""
        for key, _, _ in _keys(account, address, browser):
            found = self._failures.pop(key, None)
            if found is None or now - found.last > FORGOTTEN_SECONDS:
                found = _Failures(0, now)
            found.count, found.last = found.count + 1, now
            self._failures[key] = found
        while len(self._failures) > _KEPT:
            self._failures.popitem(last=False)

    def succeeded(self, account: str, address: str, browser: str) -> None:
        """Reset the counter of the account for this browser or address."""
        self._failures.pop(_keys(account, address, browser)[0][0], None)

    def _wait(self, key: tuple[str, str, str], free: int, most: float, now: float) -> float:
        found = self._failures.get(key)
        if found is None or found.count < free or now - found.last > FORGOTTEN_SECONDS:
            return 0.0
        length = min(FIRST_SECONDS * 2.0 ** min(found.count - free, 10), most)
        return max(0.0, found.last + length - now)


def _keys(account: str, address: str, browser: str) -> list[tuple[tuple[str, str, str], int, float]]:
    """Counters of an attempt, each with the number of failures before the first wait and the longest wait (seconds)."""
    if browser:
        return [(("browser", account, browser), FREE, MAX_SECONDS)]
    place = machine(address)
    keys = [(("pair", account, place), FREE, MAX_SECONDS), (("place", "", place), FREE_OF_PLACE, MAX_SECONDS)]
    # This wait doesn't grow, so that a user with a new browser can log in despite an attack on the account.
    return [*keys, (("account", account, ""), FREE_OF_ACCOUNT, FIRST_SECONDS)] if account else keys
