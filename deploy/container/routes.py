"""Create the secret with which the servers of a cluster authenticate each other, if it is missing.

routes.py FILE SERVER…
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

file, servers = Path(sys.argv[1]), sys.argv[2:]
if not file.exists():
    secret = secrets.token_urlsafe(32)
    routes = ", ".join(f'"nats://route:{secret}@{server}:6222"' for server in servers)
    writing = file.with_suffix(".tmp")
    with os.fdopen(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(f'authorization {{ user: route, password: "{secret}", timeout: 2 }}\nroutes: [{routes}]\n')
    writing.rename(file)
