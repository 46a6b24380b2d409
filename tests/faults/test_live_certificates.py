"""Certificates of real daemons: renewed and changed under a guest that writes; whose certificate opens which port."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_support import KillLab

from atoll.lab.bringup import ATOLL
from atoll.lab.process import ProcessNode
from atoll.runtime import certs, tls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("certificates")]
MIB = 1 << 20
REPORT = {"node": "x", "term": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[KillLab]:
    lab = KillLab("certs")
    body = {"name": "web", "template": "shared", "disks": [{"size": 16 * MIB}], "memory": 16 * MIB, "append": "ctr=vda"}
    try:
        lab.do("POST", "/v1/instances", node="node2", **body)
        yield lab
    finally:
        lab.close()


class Running:
    """While the block runs, the guest writes and no daemon or guest becomes another process."""

    def __init__(self, cluster: KillLab) -> None:
        self.cluster = cluster
        self.web = next(r for r in cluster.items("instances") if r["name"] == "web")

    def processes(self) -> dict[str, Any]:
        services = {f"{n.name}/{s.name}": s.pid for n in self.cluster.lab.nodes for s in n.services() if s.pid}
        return {**services, "guest": self.cluster.guests(self.web["id"])}

    def __enter__(self) -> None:
        self.before = self.processes()
        self.acknowledged = self.cluster.acknowledged(self.web["id"])

    def __exit__(self, kind: Any, *more: object) -> None:
        if kind is None:
            assert self.processes() == self.before
            end = time.monotonic() + 30
            while self.cluster.acknowledged(self.web["id"]) <= self.acknowledged + 20:
                assert time.monotonic() < end, "the guest does not write"
                time.sleep(0.05)
            self.cluster.nothing_lost(self.web["id"], self.web["disks"][0]["volume"])


def tls_dir(node: ProcessNode) -> Path:
    return Path(node.directory) / "etc" / "tls"


def shown(host: str, port: int, directory: Path | None, ca: str) -> str:
    """The serial of the certificate that a server shows to one with this certificate."""
    context = tls.client_context(directory) if directory else ssl.create_default_context(cadata=ca)
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
    connection.connect()
    try:
        found = certs.identity(connection.sock.getpeercert())  # type: ignore[union-attr]
        assert found is not None
        return found.serial
    finally:
        connection.close()


def ask(host: str, port: int, directory: Path | None, ca: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    context = tls.client_context(directory) if directory else ssl.create_default_context(cadata=ca)
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def copied(directory: Path, to: Path) -> Path:
    """The three files as they are now."""
    to.mkdir(parents=True)
    for name in certs.FILES:
        (to / name).write_text((directory / name).read_text())
    return to


def test_certificates_are_renewed_while_guests_run(cluster: KillLab) -> None:
    before = {row["name"]: row["certificate"] for row in cluster.items("nodes")}
    ca = (tls_dir(cluster.lab.node("node1")) / "ca.pem").read_text()
    one, two = cluster.lab.node("node1"), cluster.lab.node("node2")
    master = shown(one.address, one.spec.master_port, None, ca)
    with Running(cluster):
        time.sleep(1.1)  # certificates know whole seconds
        cluster.do("POST", "/v1/cluster/renew-certificates")
        after = {row["name"]: row["certificate"] for row in cluster.items("nodes")}
        assert all(before[name] != after[name] for name in before)
        assert shown(one.address, one.spec.master_port, None, ca) != master
        assert shown(two.address, two.spec.agent_port, tls_dir(one), ca) == after["node2"]
        cluster.settled()
    said = one.exec([*ATOLL, "node", "list"], check=True).stdout
    assert time.strftime("%Y-", time.localtime(time.time() + certs.DAYS * 86400)) in said


def test_the_ca_is_changed_while_guests_run_and_a_node_is_away(cluster: KillLab, tmp_path: Path) -> None:
    one, three = cluster.lab.node("node1"), cluster.lab.node("node3")
    old_ca = (tls_dir(one) / "ca.pem").read_text()
    stolen = copied(tls_dir(cluster.lab.node("node2")), tmp_path / "stolen")
    three.stop_service("agent")
    end = time.monotonic() + 30
    while (refused := cluster.request("POST", "/v1/cluster/rotate-ca?dry_run=true"))[0] == 200:
        assert time.monotonic() < end, "node3 never counts as silent"
        time.sleep(0.2)
    assert refused[1]["code"] == "node_unavailable"
    assert "node3" in refused[1]["detail"]
    with Running(cluster):
        job = cluster.do("POST", "/v1/cluster/rotate-ca", leave_behind=True)
        assert job["result"]["left_behind"] == ["node3"]
        new_ca = (tls_dir(one) / "ca.pem").read_text()
        assert certs.fingerprint(new_ca) == job["result"]["fingerprint"] == cluster.get("/v1/cluster")["ca_fingerprint"]
        assert (one.directory / "etc/master/ca.pem").read_text() == new_ca != old_ca
        assert "PRIVATE" in (one.directory / "etc/master/ca.key").read_text()
        for node in (one, cluster.lab.node("node2")):
            assert certs.issued_by((tls_dir(node) / "cert.pem").read_text(), new_ca)
        # Whoever has a certificate of the old CA speaks to nobody any more.
        (stolen / "ca.pem").write_text(new_ca)
        for port in (one.spec.master_port, one.spec.agent_port):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                ask(one.address, port, stolen, new_ca, "POST", "/agent/v1/report", REPORT)
    # The node that was away comes back by what the docs say, without a restart of what runs.
    three.start_service("agent")
    token = one.exec([*ATOLL, "node", "token", "node3", "--rejoin"], check=True).stdout
    url = f"https://{one.address}:{one.spec.master_port}"
    command = [
        "node",
        "join",
        "--master",
        url,
        "--name",
        "node3",
        "--address",
        three.address,
        "--token-file",
        "-",
        "--config",
        three.config_path,
    ]
    three.exec([*ATOLL, *command], input=token, check=True)
    cluster.wait_alive()
    cluster.settled()
    assert {row["name"] for row in cluster.items("nodes")} == {"node1", "node2", "node3"}
    # The master restarts with the new CA, too.
    one.stop_service("master")
    one.start_service("master")
    cluster.wait_alive()
    cluster.settled()


def test_whose_certificate_opens_which_port(cluster: KillLab, tmp_path: Path) -> None:
    one, two, three = cluster.lab.nodes
    ca = (tls_dir(one) / "ca.pem").read_text()
    node3 = copied(tls_dir(three), tmp_path / "node3")
    order = {"term": 10**6, "method": "guest.list"}
    # A node's certificate gives no orders, to no agent; nor does one that is not there.
    for node in (one, two, three):
        status, found = ask(node.address, node.spec.agent_port, node3, ca, "POST", "/call", order)
        assert (status, found["error"]["code"]) == (403, "forbidden")
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ask(node.address, node.spec.agent_port, None, ca, "POST", "/call", order)
    # The term in that order was not believed.
    assert cluster.get("/v1/cluster")["nodes_alive"] == 3
    # It opens nothing of the REST API; a master's certificate neither, nor does it report.
    for directory in (node3, one.directory / "etc/master"):
        for path in ("/v1/cluster", "/v1/nodes", "/v1/jobs"):
            status, found = ask(one.address, one.spec.master_port, directory, ca, "GET", path)
            assert (status, found["code"]) == (403, "forbidden")
    status, found = ask(one.address, one.spec.master_port, one.directory / "etc/master", ca, "POST", "/agent/v1/report", REPORT)
    assert (status, found["code"]) == (403, "forbidden")
    # A removed node is refused from then on, though its certificate is good for another year.
    three.stop_service("agent")
    cluster.do("DELETE", "/v1/nodes/node3")
    status, found = ask(one.address, one.spec.master_port, node3, ca, "POST", "/agent/v1/report", REPORT)
    assert (status, found["code"]) == (403, "forbidden")
    assert "--rejoin" in found["hint"] or "node add" in found["hint"]
