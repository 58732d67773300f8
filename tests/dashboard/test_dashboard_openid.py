"""Logging in to the dashboard through a real OpenID Connect provider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from corral.cli.local.server import EmbeddedServer
from support.browser import DashboardProcess
from support.openid_provider import CLIENT_SECRET, OpenIdProvider, openid_provider

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenIdProvider]:
    with openid_provider(tmp_path_factory.mktemp("provider")) as made:
        yield made


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory, provider: OpenIdProvider) -> Iterator[DashboardProcess]:
    folder = tmp_path_factory.mktemp("dashboard")
    server = EmbeddedServer(folder / "nats")
    server.start()
    secret = folder / "secret"
    secret.write_text(CLIENT_SECRET)
    rules = provider.rules(folder / "login.toml", client_id='"dashboard"', client_secret_file=f'"{secret}"')
    made = DashboardProcess(folder / "state", server.url, "--openid", str(rules))
    yield made
    made.stop()
    server.kill()


def way_to_provider(dashboard: DashboardProcess, client: httpx.Client, target: str = "/leases") -> str:
    """Press the button, and return the page of the provider that it leads to."""
    page = client.get("/login", params={"next": target})
    assert "/login/openid?next=" in page.text
    away = client.get("/login/openid", params={"next": target})
    assert away.status_code == 303
    return away.headers["location"]


def way_back(provider: OpenIdProvider, name: str, url: str) -> str:
    """Log in at the provider, which sends the browser back."""
    with closing(provider.browser(name)) as browser:
        answer = browser.get(url, follow_redirects=False)
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


def test_who_logs_in_at_the_provider_has_the_role_of_their_groups_until_they_log_out(
    dashboard: DashboardProcess, provider: OpenIdProvider
) -> None:
    with dashboard.http() as ann, dashboard.http() as olga:
        for client, name, role in ((ann, "ann", "requester"), (olga, "olga", "operator")):
            url = way_to_provider(dashboard, client)
            assert parse_qs(urlsplit(url).query)["code_challenge_method"] == ["S256"]
            back = client.get(way_back(provider, name, url))
            assert (back.status_code, back.headers["location"]) == (303, "/leases")
            assert f"{name} logged in through {provider.issuer} as {role}" in dashboard.log.read_text()
            assert client.get("/leases", headers={"Accept": "text/html"}).status_code == 200
        ann.post("/logout")
        assert ann.get("/leases", headers={"Accept": "text/html"}).status_code == 303
        dashboard.stop()
        dashboard.start()
        # A session outlives the dashboard, and one that has ended does not come back.
        kept = dict(olga.cookies)
        with dashboard.http() as again:
            again.cookies.update(kept)
            assert again.get("/leases", headers={"Accept": "text/html"}).status_code == 200


def test_nobody_gets_in_with_the_answer_to_another_login(dashboard: DashboardProcess, provider: OpenIdProvider) -> None:
    with dashboard.http() as victim, dashboard.http() as attacker:
        theirs = way_back(provider, "ann", way_to_provider(dashboard, attacker))
        # Without a login of its own, and with one: the state is another's.
        assert victim.get(theirs).status_code == 403
        way_to_provider(dashboard, victim)
        assert victim.get(theirs).status_code == 403
        assert "corral_session" not in victim.cookies
        # A code works once, and a made-up one never.
        assert attacker.get(theirs).status_code == 303
        with dashboard.http() as other:
            url = way_to_provider(dashboard, other)
            state = parse_qs(urlsplit(url).query)["state"][0]
            refused = other.get("/login/callback", params={"state": state, "code": "made-up"})
            assert refused.status_code == 403
            assert "refused the login" in refused.text
            wrong = other.get("/login/callback", params={"state": state, "error": "access_denied"})
            assert wrong.status_code == 403


def test_who_has_no_role_or_a_password_here_is_told_so(
    dashboard: DashboardProcess, provider: OpenIdProvider, tmp_path: Path
) -> None:
    with dashboard.http() as eve:
        answer = eve.get(way_back(provider, "eve", way_to_provider(dashboard, eve)))
        assert answer.status_code == 403
        assert "none of your groups" in answer.text
    dashboard.user("planner", "viewer")
    with dashboard.http() as client:
        answer = client.get(way_back(provider, "planner", way_to_provider(dashboard, client)))
        assert answer.status_code == 403
        assert "has an account with a password here" in answer.text
        assert "corral_session" not in client.cookies


def test_a_target_of_another_site_is_not_followed(dashboard: DashboardProcess, provider: OpenIdProvider) -> None:
    with dashboard.http() as ann:
        away = ann.get("/login/openid", params={"next": "https://evil.example/"}).headers["location"]
        assert ann.get(way_back(provider, "ann", away)).headers["location"] == "/"
