"""Real daemons that look at themselves, and a support bundle of them: secrets are planted everywhere, and looked for in all of it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from kill_support import KillLab

from atoll.lab.bringup import ATOLL
from atoll.runtime.config import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("looks")]
MIB = 1 << 20
PASSWORD = "Sesame-opens-91+up/now"
USER_DATA = f"#cloud-config\nchpasswd: {{list: 'root:{PASSWORD}'}}\nwrite_files: [{{content: the-lighthouse-keeper-sleeps-at-nine}}]\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[KillLab]:
    lab = KillLab("looks")
    try:
        yield lab
    finally:
        lab.close()


def typed(cluster: KillLab, node: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command on a node."""
    place = cluster.lab.node(node)
    sock = cluster.lab.node("node1").run_dir / "api.sock"
    environment = {**os.environ, "ATOLL_CONFIG": str(place.config_path), "ATOLL_SOCKET": str(sock)}
    return subprocess.run([*ATOLL, *words], capture_output=True, text=True, timeout=120, env=environment, check=False, **more)


def looked(cluster: KillLab, node: str, *words: str) -> list[dict[str, Any]]:
    done = typed(cluster, node, "doctor", "--json", *words)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    levels = {item["level"] for item in found}
    assert done.returncode == (1 if "error" in levels else 11 if "warning" in levels else 0), done.stderr
    return found


def of(found: list[dict[str, Any]], about: str) -> list[tuple[str, str]]:
    return [(item["level"], item["what"]) for item in found if item["about"].startswith(about)]


def etc(cluster: KillLab, node: str) -> Path:
    return Path(cluster.lab.node(node).directory) / "etc"


def test_a_node_finds_itself_in_order_and_what_was_spoiled(cluster: KillLab) -> None:
    found = looked(cluster, "node2")
    for about in ("master https", "certificate of this node", "certificate of the CA", "clock", "agent", "way to node1", "secrets"):
        assert [level for level, _ in of(found, about)] == ["ok"], (about, of(found, about))
    # In this lab the pool is a plain directory.
    assert [level for level, what in of(found, "pool shared") if "root file system" in what] == ["warning"]
    key = next(etc(cluster, "node2").rglob("key.pem"))
    key.chmod(0o644)
    try:
        mended = [item for item in looked(cluster, "node2") if item["about"].startswith("secret ")]
        assert mended
        assert all(item["level"] == "error" and "chmod 600" in item["commands"][0] for item in mended)
    finally:
        key.chmod(0o600)


def test_every_node_is_asked_and_one_that_is_silent_is_named(cluster: KillLab) -> None:
    node = cluster.lab.node("node3")
    found = looked(cluster, "node1", "--all")
    assert {item["node"] for item in found} == {"node1", "node2", "node3"}
    assert sum(item["about"] == "pool shared" and item["level"] == "warning" for item in found) == 3
    node.stop_service("agent")
    try:
        found = looked(cluster, "node1", "--all")
        silent = [item for item in found if item["node"] == "node3"]
        assert [(item["level"], item["about"]) for item in silent] == [("error", "agent")]
        # The machine itself can still look, without its daemon.
        assert ("error", "agent") in {(item["level"], item["about"]) for item in looked(cluster, "node3")}
    finally:
        node.start_service("agent")
        cluster.wait_alive()


def test_a_process_that_was_left_behind_is_found_by_verify(cluster: KillLab) -> None:
    run_dir = load(cluster.lab.node("node2").config_path).run_dir
    words = ["qemu-nbd", "-c", "import time; print(flush=True); time.sleep(300)", f"--pid-file={run_dir}/copies/vol-1/nbd.pid"]
    # Daemons of the test before may just have been started again.
    cluster.settled()
    assert cluster.get("/v1/cluster/verify")["findings"] == []
    with subprocess.Popen(words, executable=sys.executable, stdout=subprocess.PIPE) as left:
        try:
            assert left.stdout is not None
            left.stdout.readline()
            (finding,) = cluster.get("/v1/cluster/verify")["findings"]
            assert (finding["what"], finding["commands"]) == ("an export was left behind", [f"on node2: kill {left.pid}"])
        finally:
            left.kill()
    assert cluster.get("/v1/cluster/verify")["findings"] == []


def forms(secret: str) -> set[bytes]:
    raw = secret.encode()
    found = {raw, json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode(), raw.hex().encode(), base64.b64encode(raw)}
    for shift in range(3):
        found.add(base64.b64encode(b"-" * shift + raw)[4:-4])
        found.add(base64.urlsafe_b64encode(b"-" * shift + raw)[4:-4])
    return {form for form in found if len(form) >= 8}


def planted(cluster: KillLab) -> dict[str, str]:
    """Secrets, where they are made and where somebody may have put them. By name."""
    tokens = {n: json.loads(typed(cluster, "node1", "cluster", "token", n, "--format", "json").stdout)["token"] for n in ("ci", "backup")}
    _, made = cluster.request("POST", "/v1/nodes/token", {"name": "node9"})
    secrets = {"api token": tokens["ci"], "other token": tokens["backup"], "join token": made["token"], "password": PASSWORD}
    secrets["user data"] = "the-lighthouse-keeper-sleeps-at-nine"
    user_data = Path(cluster.lab.directory) / "user-data"
    user_data.write_text(USER_DATA)
    added = ("instance", "add", "seeded", "-t", "shared", "--disk", "0:size=16M", "-B", "memory=16M", "--no-start")
    done = typed(cluster, "node1", *added, "--user-data", str(user_data), "--meta-data", str(user_data))
    assert done.returncode == 0, done.stderr
    body = {"name": "web", "template": "shared", "disks": [{"size": 16 * MIB}], "memory": 16 * MIB}
    cluster.do("POST", "/v1/instances", node="node2", append=f"ctr=vda root_password={PASSWORD}", **body)
    # Refused requests are in the audit log, too.
    cluster.request("POST", "/v1/instances", {**body, "password": PASSWORD, "cloud_init": {"user_data": USER_DATA + "\0"}})
    cluster.request("GET", f"/v1/jobs?token={tokens['ci']}")
    for node in ("node1", "node2", "node3"):
        for path in etc(cluster, node).rglob("*key*"):
            if path.is_file():
                lines = [line for line in path.read_text().splitlines() if line and "-----" not in line]
                secrets |= {f"{path.name} of {node}, line {number}": line for number, line in enumerate(lines)}
        config = load(cluster.lab.node(node).config_path)
        config.log_dir.mkdir(parents=True, exist_ok=True)
        keys = [secret for name, secret in secrets.items() if f"of {node}" in name]
        known = "\n".join(f"leaked {form.decode()} here" for key in keys for form in forms(key))
        words = [
            f'{{"event": "login", "password": "{PASSWORD}", "token": "{tokens["ci"]}"}}',
            f'request: {{\\"password\\": \\"{PASSWORD}\\"}}',
            f"Authorization: Bearer {tokens['backup']}",
            f"curl https://admin:{quote(PASSWORD, safe='')}@node1/ --token {tokens['ci']}",
            f"join with {made['token']}, or base64 {base64.b64encode(tokens['ci'].encode()).decode()}",
            f"hex {tokens['ci'].encode().hex()}",
            next(etc(cluster, node).rglob("key.pem")).read_text(),
            known,
        ]
        (config.log_dir / "agent.log").write_text("\n".join(words) + "\n")
        guest = config.run_dir / "logs" / "i-00000000000000001"
        guest.mkdir(parents=True, exist_ok=True)
        (guest / "qemu.log").write_text(f"-object secret,id=a,data=x,passphrase={PASSWORD}\n")
        (guest / "console.log").write_text(f"the guest's own words: {USER_DATA}\n")
    config_file = Path(cluster.lab.node("node1").config_path)
    config_file.write_text(config_file.read_text() + f'# ceph: secret_key = "{PASSWORD}"; token={tokens["ci"]}\n')
    return secrets


def test_no_secret_is_in_a_support_bundle(cluster: KillLab, tmp_path: Path) -> None:
    secrets = planted(cluster)
    target = tmp_path / "bundle.tar.gz"
    token_file = tmp_path / "token"
    token_file.write_text(secrets["api token"])
    token_file.chmod(0o600)
    done = typed(cluster, "node1", "cluster", "support-bundle", str(target))
    assert done.returncode == 0, done.stderr
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob(".*")) == [], "nothing half-made stays"
    with tarfile.open(fileobj=io.BytesIO(target.read_bytes())) as archive:
        files = {m.name.removeprefix("atoll-support/"): archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
    assert files["problems.txt"] == b"none\n"
    for name in ("versions.json", "doctor.json", "verify.json", "cluster.json", "store.json", "objects/instances.json", "audit.json"):
        assert json.loads(files[name]), name
    assert {f"logs/{node}/agent.log" for node in ("node1", "node2", "node3")} <= set(files)
    jobs = [json.loads(data) for name, data in files.items() if name.startswith("jobs/") and name != "jobs/all.json"]
    assert any(job["operation"] == "instance.add" and job["steps"] for job in jobs)
    assert b"login" in files["logs/node3/agent.log"], "what is no secret stays"
    # The whole of it, and each name.
    everything = b"\n".join([*files.values(), *(name.encode() for name in files)])
    seen = {name for name, secret in secrets.items() if any(form in everything for form in forms(secret))}
    assert not seen
    assert b"PRIVATE KEY" not in everything
    # What is searched for would be found: unscrubbed it is there.
    raw = (load(cluster.lab.node("node2").config_path).log_dir / "agent.log").read_bytes()
    assert all(any(form in raw for form in forms(secrets[name])) for name in ("api token", "join token", "password"))


def test_a_bundle_is_made_without_a_master(cluster: KillLab, tmp_path: Path) -> None:
    done = typed(cluster, "node3", "--socket", str(tmp_path / "none"), "cluster", "support-bundle", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "only a master knows" in done.stderr
    (target,) = tmp_path.glob("atoll-support-node-*.tar.gz")
    with tarfile.open(target) as archive:
        names = set(archive.getnames())
    assert {"atoll-support/doctor-here.json", "atoll-support/versions.json"} <= names
    assert any(name.startswith("atoll-support/logs/node3/") for name in names)
