"""Commands that start inference servers as a plan says, or the reason why a server can't express it."""

from .offers import SERVERS, offer

__all__ = ["SERVERS", "offer"]
