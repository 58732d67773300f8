"""Who has guessed too often, and how long they wait. Pure state.

Guesses are counted for each account and place together, for each place, and for each account. A place is a browser that
has logged in to the account before, or else an address. So whoever guesses at somebody's password holds up themselves:
the person goes on from where they have logged in before, whatever others do.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final

from msgspec import Struct

FREE: Final = 5
"""Wrong attempts at an account from a place, before the first wait."""
FREE_OF_PLACE: Final = 20
"""At all accounts from an address."""
FREE_OF_ACCOUNT: Final = 50
"""At an account from all places that are not known to it."""
FIRST_SECONDS: Final = 60.0
MOST_SECONDS: Final = 900.0
FORGOTTEN_SECONDS: Final = 3600.0
_KEPT: Final = 10_000


class _Failures(Struct):
    count: int
    last: float


class Attempts:
    """Failed logins, by what they are counted for; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str, str], _Failures] = OrderedDict()

    def wait_seconds(self, account: str, address: str, browser: str, now: float) -> float:
        """How long the next attempt has to wait; 0 where it may be made.

        Args:
            account: its name; empty for a token.
            address: where it comes from.
            browser: the browser, if it has logged in to the account before; else empty.
            now: on a monotonic clock.
        """
        waits = (self._wait(key, free, most, now) for key, free, most in _keys(account, address, browser))
        return max(waits, default=0.0)

    def failed(self, account: str, address: str, browser: str, now: float) -> None:
        """Count a wrong attempt."""
        for key, _, _ in _keys(account, address, browser):
            found = self._failures.pop(key, None)
            if found is None or now - found.last > FORGOTTEN_SECONDS:
                found = _Failures(0, now)
            found.count, found.last = found.count + 1, now
            self._failures[key] = found
        while len(self._failures) > _KEPT:
            self._failures.popitem(last=False)

    def succeeded(self, account: str, address: str, browser: str) -> None:
        """Forget what was wrong before at this account from this place."""
        self._failures.pop(_keys(account, address, browser)[0][0], None)

    def _wait(self, key: tuple[str, str, str], free: int, most: float, now: float) -> float:
        found = self._failures.get(key)
        if found is None or found.count < free or now - found.last > FORGOTTEN_SECONDS:
            return 0.0
        length = min(FIRST_SECONDS * 2.0 ** min(found.count - free, 10), most)
        return max(0.0, found.last + length - now)


def _keys(account: str, address: str, browser: str) -> list[tuple[tuple[str, str, str], int, float]]:
    """What an attempt is counted for, how many are free, and the longest wait."""
    if browser:
        return [(("browser", account, browser), FREE, MOST_SECONDS)]
    place = _place(address)
    keys = [(("pair", account, place), FREE, MOST_SECONDS), (("place", "", place), FREE_OF_PLACE, MOST_SECONDS)]
    # It grows no longer: strangers to the account have to get in some time, too.
    return [*keys, (("account", account, ""), FREE_OF_ACCOUNT, FIRST_SECONDS)] if account else keys


def unmapped(address: str) -> str:
    """An address, of IPv4 as such: a socket that takes both kinds has it as `::ffff:10.0.0.5`."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _place(address: str) -> str:
    """An address; of IPv6 the network, since one machine has all of it."""
    found = unmapped(address)
    try:
        parsed = ipaddress.ip_address(found)
    except ValueError:
        return found
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else found
