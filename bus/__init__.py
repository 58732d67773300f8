"""The bus at run time: connections, credentials, streams, health checks. `schemas` declares subjects and payloads."""
