"""Write the bill of materials of a release: every package of the container's lock, with its hashes, as CycloneDX.

    python deploy/release/sbom.py [FILE]

The same lock gives the same file, byte by byte.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy" / "container" / "requirements.lock"


def main() -> None:
    """Write it to the given file, or to dist/."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / f"corral-{project['version']}.cdx.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "requirements", str(LOCK)),
            *("--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "application"),
            *("--output-reproducible", "--output-format", "JSON", "--output-file", str(out)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    print(f"{out}: {len(json.loads(out.read_text())['components'])} components")


if __name__ == "__main__":
    main()
