"""Who may see and do what: accounts and roles, signed sessions, and the guard that every request passes."""
