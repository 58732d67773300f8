"""The bus at run time: connections, credentials, streams, health. What is on the bus is declared in `schemas`."""
