"""A real OpenID Connect provider for tests: django-oauth-toolkit on SQLite, in a process of its own.

Run as a script with a folder, it prints its port and serves until it is terminated. Everyone's password is `secret`.
"""

# pyright: basic, reportMissingTypeStubs=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import re
import socketserver
import subprocess
import sys
import wsgiref.simple_server
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

PEOPLE = {"ann": ["gpu-users", "vision"], "olga": ["gpu-operators"], "eve": [], "planner": ["gpu-users"]}
"""Groups of each person."""
CLIENT_SECRET = "secret-of-the-dashboard"
REDIRECT = "http://127.0.0.1/login/callback"
"""Of a dashboard on any port of this machine (RFC 8252, section 7.3)."""
_AUTHORIZATION_CODE = "authorization-code"
_DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"


class OpenIdProvider:
    """A provider that runs.

    Attributes:
        issuer: its URL.
    """

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.issuer = f"{self.base}/o"

    def rules(self, file: Path, **more: str) -> Path:
        """Write rules for logins through it: lines of TOML after those that all need."""
        lines = {
            "issuer": f'"{self.issuer}"',
            "client_id": '"corral"',
            "scopes": '["openid", "profile"]',
            "device_authorization_endpoint": f'"{self.issuer}/device-authorization/"',
            **more,
        }
        tables = '[roles]\ngpu-users = "requester"\ngpu-operators = "operator"\n[groups]\nvision = "lab/vision"\n'
        file.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()) + tables)
        return file

    def browser(self, name: str) -> httpx.Client:
        """A browser in which somebody has logged in at the provider; the caller closes it."""
        made = httpx.Client(follow_redirects=True, timeout=30)
        made.get(f"{self.base}/in", params={"name": name}).raise_for_status()
        return made

    def confirm(self, name: str, user_code: str, answer: str = "accept") -> None:
        """Enter the code of a device, and accept or deny it."""
        with contextlib.closing(self.browser(name)) as browser:
            page = browser.post(f"{self.issuer}/device/", data={"user_code": user_code})
            browser.post(str(page.url), data={"action": answer}).raise_for_status()


@contextlib.contextmanager
def openid_provider(folder: Path) -> Iterator[OpenIdProvider]:
    """Run a provider, with its database in a folder."""
    folder.mkdir(exist_ok=True)
    with (folder / "provider.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, (folder / "provider.log").read_text()
            yield OpenIdProvider(int(port))
        finally:
            process.kill()
            process.wait()


def user_code(text: str) -> str:
    """The code in what `corral login` prints."""
    found = re.search(r"confirm the code (\S+)", text)
    assert found, text
    return found[1]


def _serve(folder: Path) -> None:
    import django
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from django.conf import settings

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    settings.configure(
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="x" * 50,
        ROOT_URLCONF=__name__,
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "people.sqlite")}},
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "oauth2_provider",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
        ],
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        USE_TZ=True,
        LOGIN_URL="/in",
        OAUTH2_PROVIDER={
            "OIDC_ENABLED": True,
            "OIDC_RSA_PRIVATE_KEY": key.decode(),
            "SCOPES": {"openid": "identity", "profile": "name"},
            "PKCE_REQUIRED": True,
            "ALLOWED_REDIRECT_URI_SCHEMES": ["http"],
            "OAUTH2_VALIDATOR_CLASS": f"{__name__}.Validator",
            "OAUTH_DEVICE_VERIFICATION_URI": "http://127.0.0.1/o/device/",
        },
    )
    django.setup()
    from django.contrib.auth import authenticate, login
    from django.contrib.auth.models import Group, User
    from django.core.handlers.wsgi import WSGIHandler
    from django.core.management import call_command
    from django.http import HttpResponse
    from django.urls import include, path
    from oauth2_provider.models import Application
    from oauth2_provider.oauth2_validators import OAuth2Validator

    class Validator(OAuth2Validator):
        oidc_claim_scope = None

        def get_additional_claims(self, request: Any) -> dict[str, Any]:
            groups = [group.name for group in request.user.groups.all()]
            return {"preferred_username": request.user.username, "groups": groups}

    def log_in(request: Any) -> HttpResponse:
        login(request, authenticate(request, username=request.GET["name"], password="secret"))
        return HttpResponse("welcome")

    module = sys.modules[__name__]
    module.Validator = Validator  # type: ignore[attr-defined]
    module.urlpatterns = [  # type: ignore[attr-defined]
        path("in", log_in),
        path("o/", include("oauth2_provider.urls", namespace="oauth2_provider")),
    ]
    call_command("migrate", verbosity=0)
    for name, groups in PEOPLE.items():
        user = User.objects.create_user(name, password="secret")
        user.groups.set([Group.objects.get_or_create(name=group)[0] for group in groups])
    Application.objects.create(
        client_id="corral",
        client_type="public",
        authorization_grant_type=_DEVICE_CODE,
        name="corral",
        algorithm="RS256",
    )
    Application.objects.create(
        client_id="dashboard",
        client_secret=CLIENT_SECRET,
        client_type="confidential",
        authorization_grant_type=_AUTHORIZATION_CODE,
        redirect_uris=REDIRECT,
        skip_authorization=True,
        name="dashboard",
        algorithm="RS256",
    )

    class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        daemon_threads = True

    server = wsgiref.simple_server.make_server("127.0.0.1", 0, WSGIHandler(), server_class=Server)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
