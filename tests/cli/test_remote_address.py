"""Addresses that hosts report are never taken for options or for words of a local command."""

import pytest
from corral.cli.exits import CommandError
from corral.cli.work.remote import Remote


@pytest.mark.parametrize("via", ["ssh", "ssh -p 2222 {address}", "sh -c 'ssh {address} $0'"])
@pytest.mark.parametrize("address", ["-oProxyCommand=touch /tmp/mine", "a b", "$(id)", "a;id", "", "a\n", "me@there"])
def test_an_address_that_is_none_is_refused_by_the_hosts_name(via: str, address: str) -> None:
    with pytest.raises(CommandError, match="host 'node-7'"):
        Remote(via, "node-7", address, terminal=False)


@pytest.mark.parametrize("address", ["node-7", "10.0.0.7", "gpu_7.rack.example", "2001:db8::7"])
def test_an_address_is_the_word_after_the_options(address: str) -> None:
    words = Remote("ssh", "node-7", address, terminal=True).start(["true"], {}, "lease", 1)
    assert words[:-1] == ["ssh", "-t", "--", address]
    assert Remote("pdsh -w {host}", "node-7", "-x", terminal=True).tell("lease", "TERM")[:-1] == [
        "pdsh",
        "-w",
        "node-7",
    ]


def test_a_name_that_is_none_is_refused_where_it_is_a_word() -> None:
    with pytest.raises(CommandError, match="-x"):
        Remote("pdsh -w {host}", "-x", "10.0.0.7", terminal=False)
