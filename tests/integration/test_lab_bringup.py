"""How a lab's nodes become a cluster: the order of the commands, with a stand-in for the CLI that only keeps a record."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.lab import bringup, find
from atoll.lab.bringup import AnyLab
from atoll.lab.lab import Lab
from atoll.lab.process import ProcessLab
from atoll.model.errors import DeadlineExceeded, HostError
from atoll.runtime.config import load

NAME = f"b{os.getpid()}"

CLI = """
import json, os, sys
place = os.path.dirname(os.path.abspath(__file__))
words = sys.argv[1:]
with open(place + "/record", "a") as f:
    f.write(json.dumps([words, sys.stdin.read() if "--token-file" in words else ""]) + "\\n")
if words[:2] == ["node", "token"]:
    print("token-of-" + words[2])
if words[:2] == ["cluster", "init"] and os.path.exists(place + "/refuse"):
    sys.exit("error: there is a cluster already")
if words[:2] == ["node", "list"]:
    asked = sum('"list"' in line for line in open(place + "/record"))
    if asked == 1:
        sys.exit("error: the master does not answer yet")
    joined = ["node1"] + [json.loads(line)[0][5] for line in open(place + "/record") if '"join"' in line]
    print(json.dumps([{"name": n, "alive": asked > 3 and not os.path.exists(place + "/dead")} for n in joined]))
"""

real = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and loop devices need root")]


@pytest.fixture(params=[pytest.param("real", marks=real), "rootless"])
def lab(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyLab]:
    monkeypatch.setenv("ATOLL_LAB_DIR", str(tmp_path / "labs"))
    made: AnyLab = Lab.create(NAME, 3, binds=[str(tmp_path)]) if request.param == "real" else ProcessLab.create(NAME, 3)
    (tmp_path / "cli.py").write_text(CLI)
    monkeypatch.setattr(bringup, "ATOLL", [sys.executable, str(tmp_path / "cli.py")])
    # The services are started, whatever they do; their own tests tell whether they are daemons.
    monkeypatch.setattr(bringup, "daemon", lambda role, config: ["sleep", "1000"])
    yield made
    find.remove(NAME)


def test_nodes_become_a_cluster(lab: AnyLab, tmp_path: Path) -> None:
    said: list[str] = []
    bringup.make_cluster(lab, "fake", say=said.append)
    calls = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    one, two, three = lab.nodes
    init = ["cluster", "init", NAME, "--node", "node1", "--address", one.address, "--hypervisor", "fake", "--config", one.config_path]
    assert calls[0] == [init, ""]
    url = f"https://{one.address}:{one.spec.master_port}"
    joins = [call for call in calls if call[0][:2] == ["node", "join"]]
    for node, call in zip((two, three), joins, strict=True):
        wanted = ["node", "join", "--master", url, "--name", node.name, "--address", node.address]
        assert call == [[*wanted, "--token-file", "-", "--config", node.config_path], f"token-of-{node.name}\n"]
        # A token is a secret: it is on standard input only.
        assert "token-of" not in " ".join(call[0])
    assert {status.name for status in one.services()} == {"master", "agent"}
    assert {status.name for status in two.services()} == {"agent"}
    assert said[-1] == "all 3 nodes are alive"
    assert find.load(NAME).record.cluster == "fake"
    for node in lab.nodes:
        path = tmp_path / f"{node.name}.toml"
        path.write_text(node.exec(["cat", node.config_path]).stdout)
        config = load(path)
        assert (config.node, config.address, config.hypervisor) == (node.name, node.address, "fake")
        assert (config.agent_port, config.master_port) == (node.spec.agent_port, node.spec.master_port)


def test_a_command_that_fails_ends_it_with_its_words(lab: AnyLab, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(HostError, match="there is a cluster already"):
        bringup.make_cluster(lab)
    (tmp_path / "refuse").unlink()
    (tmp_path / "dead").touch()
    with pytest.raises(DeadlineExceeded, match="alive"):
        bringup.make_cluster(lab, deadline=2.0)
