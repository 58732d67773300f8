"""Who may do what on the bus: roles as a table, keys and certificates, and the server's configuration made of them."""
