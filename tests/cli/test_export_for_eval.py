"""`eval "$(corral request --export)"`: it shows this host's devices, or fails with no GPU visible."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
from corral.client.leases.environment import NONE_VISIBLE
from support.local_cluster import CORRAL, LocalCluster, environment, invoke, wait_for

NOWHERE = "nats://127.0.0.1:1"
SHOW = 'echo "$?|$CUDA_VISIBLE_DEVICES|$ROCR_VISIBLE_DEVICES|$HIP_VISIBLE_DEVICES|${CORRAL_LEASE-none}"'


def evaluated(text: str, *, options: str = "") -> subprocess.CompletedProcess[str]:
    """A script that was started with every GPU visible and evaluates a text."""
    return subprocess.run(
        ["sh", "-c", f'{options}\neval "$1"\n{SHOW}', "script", text],
        env=os.environ | dict.fromkeys(NONE_VISIBLE, "0,1") | {"CORRAL_LEASE": "an outer one"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_no_gpu(text: str, code: int) -> None:
    assert evaluated(text).stdout == f"{code}|||-1|none\n"
    stopped = evaluated(text, options="set -e")
    assert (stopped.returncode, stopped.stdout) == (code, "")


@pytest.mark.parametrize("host", ["sim-0001", "sim-0002"])
def test_it_is_an_environment_of_this_host(cluster: LocalCluster, host: str) -> None:
    done = cluster.corral("request", "--export", "--ttl", "1m", CORRAL_HOST=host)
    code, cuda, rocr, hip, lease = evaluated(done.stdout).stdout.strip().split("|")
    try:
        [held] = cluster.json("leases", "--lease", lease)["leases"]
        assert [(grant["host"], grant["device"]) for grant in held["grants"]] == [(host, cuda)]
        assert (code, rocr, hip) == ("0", "", "-1")
    finally:
        cluster.corral("release", lease)


def test_devices_of_other_hosts_are_not_taken_for_those_of_this_one(cluster: LocalCluster) -> None:
    done = cluster.corral("request", "--export", "--host", "any", "--ttl", "1m", CORRAL_HOST="elsewhere")
    code, *visible, lease = evaluated(done.stdout).stdout.strip().split("|")
    assert (code, visible) == ("0", ["", "", "-1"])
    assert "none is visible here, on elsewhere" in done.stderr
    assert cluster.corral("release", lease).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "values", "code"),
    [
        (["--gpus", "64", "--host", "any"], {}, 4),
        (["--gpus", "1"], {"CORRAL_HOST": "no-host-of-the-fleet"}, 4),
        (["--gpus", "many"], {}, 2),
        (["--no-such-option"], {}, 2),
        (["--json"], {}, 2),
        (["--memory", "20 parsecs"], {}, 2),
        (["--gpus", "1"], {"CORRAL_NATS_URL": NOWHERE}, 3),
        (["--gpus", "1"], {"CORRAL_NATS_CREDS": "/no/such/file"}, None),
    ],
)
def test_where_it_fails_eval_fails_and_no_gpu_is_visible(
    cluster: LocalCluster, arguments: list[str], values: dict[str, str], code: int | None
) -> None:
    done = invoke("request", "--export", *arguments, url=values.get("CORRAL_NATS_URL", cluster.url), **values)
    assert done.returncode == (code or done.returncode) != 0
    assert_no_gpu(done.stdout, done.returncode)
    assert done.stderr


def test_a_signal_in_line_withdraws_it_and_eval_fails(cluster: LocalCluster) -> None:
    words = [*CORRAL, "request", "--export", "--gpus", "8", "--placement", "fewest_hosts", "--host", "any"]
    blocker = cluster.json("request", "--gpus", "1", "--ttl", "1m")["lease"]["lease_id"]
    try:
        process = subprocess.Popen(
            [*words, "--wait", "1m", "--name", "exporting"],
            env=environment(CORRAL_NATS_URL=cluster.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: "exporting" in json.dumps(cluster.json("queue")))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM
        assert_no_gpu(out, 128 + signal.SIGTERM)
        assert "exporting" not in json.dumps(cluster.json("queue"))
    finally:
        cluster.corral("release", blocker)
