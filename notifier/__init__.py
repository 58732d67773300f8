"""Notifier: tells people by e-mail, chat or webhook when something happens, once for each cause.

`news` and `conditions` find out what has happened, `rules` and `quiet` decide who is told and when, `messages` writes
it; all of them are pure. `store` keeps what is to be sent on the bus before it is sent, `outbox` sends it by `sending`,
`service` puts them together.
"""
