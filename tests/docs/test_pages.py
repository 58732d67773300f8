"""Every command in the documentation, run page by page in a real shell on a real cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.bus.access.folder import Authority
from corral.bus.access.reload import reload
from corral.bus.access.roles import Role
from corral.cli import config
from corral.cli.loading import load
from corral.cli.registry import COMMANDS
from support import docs_pages as pages
from support.exporter_process import running
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

ROOT = pages.ROOT
PAGES = sorted(
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    # The reference repeats the examples of the commands' own help, which are held to their options below.
    if "node_modules" not in page.parts and page.parent != ROOT / "docs" / "reference"
)
NEEDED = ("bash", "jq", "curl")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of programs for the PATH; see `docs_programs`."""
    folder = tmp_path_factory.mktemp("bin")
    # Paths of sockets are short.
    path = str(Path("/tmp") / f"corral-docs-{os.getpid()}.sock")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "docs_programs.py"), path, str(folder)],
        stdout=subprocess.PIPE,
        env=environment(OPENBLAS_NUM_THREADS="1"),
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    yield folder
    server.kill()
    server.wait()
    Path(path).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """What `corral up` starts where there are no GPUs: the pages show its devices."""
    made = LocalCluster(tmp_path_factory.mktemp("docs") / "data", "--source", "simulated", authenticated=True)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def gateway(fleet: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway beside the cluster; its URL."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    authority = Authority(fleet.folder / "auth")
    if "http" not in authority.registry.users:
        authority.add(Role.GATEWAY, "http")
        reload(Path(authority.registry.pid_file))
    own = {"CORRAL_NATS_URL": fleet.url, "CORRAL_NATS_CREDS": str(authority.credentials("http"))}
    with running(log, *CORRAL, "serve-http", "--listen", "127.0.0.1:0", **own):
        yield wait_for(lambda: re.search(r"served at (\S+)", log.read_text()))[1]


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_works(
    page: Path, fleet: LocalCluster, programs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"the pages use {', '.join(missing)}, which is not installed here")
    home = tmp_path / "home"
    (home / ".config" / "corral").mkdir(parents=True)
    (home / "var" / "lib" / "corral").mkdir(parents=True)
    (home / "etc" / "corral").mkdir(parents=True)
    # As `corral up` leaves it for whoever started it.
    credentials = fleet.credentials["CORRAL_NATS_CREDS"]
    (home / ".config" / "corral" / "corral.toml").write_text(
        f'current = "local"\n[contexts.local]\nnats = "{fleet.url}"\ncreds = "{credentials}"\n'
    )
    for folder in ("docs", "deploy", "bench"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "train.py").write_text("import os\nprint('training on', os.environ.get('CUDA_VISIBLE_DEVICES'))\n")
    found: list[pages.Command] = []
    wrong: list[str] = []
    varies: set[int] = set()
    for block in pages.blocks(page):
        assert block.language in (*pages.RUN, *pages.READ, *pages.TEXT), f"{page}:{block.line}: what is it?"
        if block.language in pages.TEXT:
            typed = [line for line in block.text.splitlines() if re.match(r"(\$ )?(corral|pip|docker|nats) ", line)]
            assert not typed, f"{page}:{block.line}: commands go into a block of sh: {typed}"
        commands = pages.commands(block, tmp_path, fleet.url)
        found += commands
        if block.varies:
            varies |= {command.line for command in commands}
        if block.not_here and block.language in ("sh", "console"):
            wrong += [problem for line in block.text.splitlines() if (problem := options_of(line))]
        wrong += [problem for problem in [pages.read(page, block)] if problem]
    values = environment(
        PATH=f"{programs}:{os.environ['PATH']}",
        HOME=str(home),
        SHELL="/bin/true",
        TERM="dumb",
        DOCS_URL=fleet.url,
        DOCS_CREDENTIALS=credentials,
        DOCS_CURL=shutil.which("curl") or "",
        DOCS_HTTP=request.getfixturevalue("gateway") if "curl " in page.read_text() else "",
        # Who asks is the account's name, until a page says otherwise.
        USER="you",
        LOGNAME="you",
        # This host has GPUs, as the hosts of those who read it have.
        CORRAL_HOST="sim-0001",
    )
    for name in ("CORRAL_CONFIG", "CORRAL_OWNER", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "COLUMNS"):
        values.pop(name, None)
    # Simulated processes outlive the leases of the page before by some seconds, and leave devices in use.
    wait_for(lambda: not any(device["in_use"] for device in fleet.json("devices")["devices"]))
    try:
        wrong += pages.run(page, found, tmp_path, values, varies)
    finally:
        for owner in {lease["owner"] for lease in fleet.json("leases")["leases"]}:
            fleet.corral("release", "--all", CORRAL_OWNER=owner)
        fleet.corral("group", "apply", "/dev/null")
        for drain in fleet.json("drain")["drains"]:
            kind, _, what = drain.partition(":")
            fleet.corral("undrain", {"host": "--host", "device": "--device", "label": "--host-label"}[kind], what)
    assert not wrong, "\n".join(wrong)


def options_of(line: str) -> str:
    """What is wrong with the options of a `corral` command; empty if nothing, or if it is another command."""
    line = re.sub(r"\s#.*", "", line.strip().removeprefix("$ "))
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    if words[:1] != ["corral"] or len(words) < 2:
        return ""
    words = words[1 : next((at for at, word in enumerate(words) if word in ("|", ">", ";", "&&")), len(words))]
    while words and words[0] in ("--nats", "--creds", "--context", "--config"):
        words = words[2:]
    name, *arguments = words
    if name.startswith("-"):
        return ""
    if name not in COMMANDS:
        return f"{line}: there is no command {name}"
    command = load(name)
    if arguments and (inner := getattr(command, "commands", {}).get(arguments[0])):
        command, arguments = inner, arguments[1:]
    try:
        command.make_context(name, arguments)
    except SystemExit as end:
        return f"{line}: {end}"
    except Exception as error:
        return f"{line}: {error}"
    return ""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_right(name: str) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import cli_reference

    for _, command in cli_reference.leaves(name):
        examples = cli_reference.parts(command).examples
        assert examples or getattr(load(name), "commands", None), f"corral {name} shows no example"
        for line in examples:
            line = re.sub(r"\s{2,}[^\"']*$", "", line)
            for part in re.findall(r"corral .*", re.sub(r'^(eval|export \w+=)?\s*"?\$\((.*)\)"?$', r"\2", line)):
                assert not options_of(part), line


def test_configuration_in_pages_is_right(tmp_path: Path) -> None:
    for page in [*PAGES, *(ROOT / "docs" / "reference").glob("*.md")]:
        for block in pages.blocks(page):
            if block.language == "toml" and not block.not_here:
                file = tmp_path / "corral.toml"
                file.write_text(block.text)
                found = config.read([file])
                for name in found.tables:
                    config.defaults(found, name, load(name))


def test_an_installation_that_can_not_work_is_found(programs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nsudo python3 -m venv --without-pip /opt/corral\nsudo /opt/corral/bin/pip install '.[collector]'\n"
        "sudo python3 -m venv ./elsewhere\nsudo ./elsewhere/bin/pip install '.[collector]'\n"
        "sudo systemctl enable --now corral-collector\n```\n"
    )
    found = [command for block in pages.blocks(page) for command in pages.commands(block, tmp_path)]
    values = environment(PATH=f"{programs}:{os.environ['PATH']}", HOME=str(tmp_path))
    wrong = pages.run(page, found, tmp_path, values, set())
    assert [problem.split(": ")[0] for problem in wrong] == ["page.md:3", "page.md:6"]


def test_a_page_that_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ echo '3 of 4 GPUs on sim-0001'\n7 of 9 GPUs on sim-0003\n$ echo more\nless\n```\n"
        "<!-- run: exits 3 -->\n```sh\nX=3 &&\\\n  (exit $X)\nfalse  # fails\n```\n"
        "<!-- run: first\nY=5 -->\n```sh\ntest $X$Y = 35\n```\n"
        "<!-- run: not here: no reason -->\n```sh\nfalse\n```\n"
    )
    found = [command for block in pages.blocks(page) for command in pages.commands(block, tmp_path)]
    wrong = pages.run(page, found, tmp_path, dict(os.environ), set())
    assert [problem.splitlines()[0] for problem in wrong] == ["page.md:4: echo more", "page.md:11: false  # fails"]
    assert options_of("$ corral request --gpuz 3 | jq .") != ""
    assert options_of("corral rekwest") != ""
    assert options_of("corral --context lab request --gpus 3  # so") == ""
