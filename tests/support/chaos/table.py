"""The accounts of `make chaos` as a table: `python -m support.chaos.table FOLDER [PAGE]` prints it, or in a page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
from support.chaos.faults import FAULTS
from support.chaos.load import Account

HEAD = (
    "| fault | samples expected | found | stored twice | leases answered | on record | granted twice "
    "| placement back, s | history back, s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(account: Account) -> str:
    """One account."""
    cells = (
        account.what, f"{account.rows_expected:,}", f"{account.rows_found:,}", account.rows_doubled,
        account.leases_expected, account.leases_found, account.promised_twice, account.placement_back_seconds,
        account.history_back_seconds,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Print, and write into the page between its marks."""
    found = {
        path.stem: msgspec.json.decode(path.read_bytes(), type=Account) for path in Path(sys.argv[1]).glob("*.json")
    }
    accounts = [found[name] for name in FAULTS if name in found]
    table = "\n".join([HEAD, *map(row, accounts)])
    print(table)
    for account in accounts:
        for problem in account.wrong:
            print(f"{account.fault}: {problem}")
    if len(sys.argv) > 2:
        page = Path(sys.argv[2])
        marked = re.compile(r"(<!-- chaos -->\n).*?(\n<!-- /chaos -->)", re.S)
        page.write_text(marked.sub(lambda match: match[1] + table + match[2], page.read_text()))
    return any(account.wrong for account in accounts)


if __name__ == "__main__":
    sys.exit(main())
