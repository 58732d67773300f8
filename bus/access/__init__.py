"""Access control on the bus: a table of roles, keys and certificates, and the server configuration made from them."""
