from __future__ import annotations

import configparser
import socket
from pathlib import Path

import pytest

from atoll.model.errors import HostError
from atoll.runtime import systemd


def _parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_units_restart_for_ever_and_tell_when_they_are_ready() -> None:
    units = systemd.units("/opt/atoll/bin", "/etc/other.toml")
    assert sorted(units) == ["atoll-agent.service", "atoll-master.service"]
    for name, text in units.items():
        unit = _parsed(text)
        assert unit["Service"]["ExecStart"] == f"/opt/atoll/bin/{name.removesuffix('.service')}"
        assert unit["Service"]["Environment"] == "ATOLL_CONFIG=/etc/other.toml"
        assert (unit["Service"]["Restart"], unit["Service"]["Type"]) == ("always", "notify")
        assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert "Environment" not in _parsed(systemd.units()["atoll-agent.service"])["Service"]


def test_guests_outlive_the_agent() -> None:
    agent = _parsed(systemd.units()["atoll-agent.service"])["Service"]
    assert (agent["KillMode"], agent["OOMPolicy"]) == ("process", "continue")


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@atoll-test-{tmp_path.name}-{id(tmp_path)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0" + address[1:] if abstract else address)
        server.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert systemd.notify_ready()
        assert server.recv(100) == b"READY=1"
    with pytest.raises(HostError):
        systemd.notify("STATUS=x")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not systemd.notify_ready()


def test_running_under_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "booted_with_systemd", lambda: True)
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert not systemd.running_under_systemd()
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    assert systemd.running_under_systemd()
    monkeypatch.setattr(systemd, "booted_with_systemd", lambda: False)
    assert not systemd.running_under_systemd()
