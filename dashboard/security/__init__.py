"""Access control of the dashboard: accounts and roles, signed sessions, and the guard that checks every request."""
