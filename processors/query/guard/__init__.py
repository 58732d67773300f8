"""Restrictions on readers' SQL: an allow-list, and bounds on its growth during parsing and binding."""
