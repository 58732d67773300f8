"""Check the packages of a lock for known vulnerabilities, with pip-audit.

    python deploy/release/audit.py [LOCK …]

Exit codes: 0 none is known; 1 some are, and are printed; 3 no advisory database could be reached, nothing was checked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "deploy/container/requirements.lock")
SERVICES = ("pypi", "osv")
UNREACHED = (
    "ConnectionError", "ServiceError", "Max retries", "NameResolution", "ProxyError", "HTTPError", "timed out",
    "could not be audited", "not found on", "Could not connect", "Could not reach",
)  # fmt: skip


def audit(lock: Path) -> int:
    """Audit one lock; returns its exit code."""
    for service in SERVICES:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--disable-pip", "--require-hashes"),
                # A package that is not in the database may have vulnerabilities.
                "--strict",
                *("--vulnerability-service", service, "--timeout", "20", "-r", str(lock)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode == 0:
            print(f"audit: {lock.name}: no known vulnerability ({service})")
            return 0
        if not any(word in said for word in UNREACHED):
            print(said)
            return 1
    print(f"audit: {lock.name}: no advisory database can be reached from here: nothing was checked", file=sys.stderr)
    return 3


def main() -> None:
    """Audit the locks that are named, or those of the repository."""
    locks = [Path(name) for name in sys.argv[1:]] or [ROOT / name for name in LOCKS]
    sys.exit(max(audit(lock) for lock in locks))


if __name__ == "__main__":
    main()
