"""OS definitions on real nodes: real scripts, real loop devices, and what is left when a script, its agent or its node dies."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import CACHE, MIB, PATIENCE, Cluster, until

from atoll.lab import debian

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("images-qemu"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real nodes need root"),
]
HOME = "/etc/atoll/os"
CREATE = """#!/bin/sh
set -eu
read nothing && exit 9
env | sort >&2
[ "$DISK_0_ACCESS$DISK_1_ACCESS$DISK_COUNT" = rwrw2 ]
mkfs.ext4 -q -F "$DISK_0_PATH"
mount "$DISK_0_PATH" /mnt
env | sort >/mnt/told
printf '\\377 not UTF-8\\n'
echo "$OSP_GREETING" >/mnt/greeting
echo "$INSTANCE_NAME" | dd of="$DISK_1_PATH" conv=notrunc status=none
# A daemon that keeps the output and the mounted disk: nothing waits for it, and nothing is left of it.
(cd /mnt; exec sleep 4242) &
"""
RENAME = """#!/bin/sh
set -eu
mount "$DISK_0_PATH" /mnt
echo "$OLD_INSTANCE_NAME $INSTANCE_NAME" >/mnt/renamed
"""
#: Tells that it has begun, writes for ever, and has a child that lets go of its output.
ENDLESS = """#!/bin/bash
echo "began on $DISK_0_PATH"
setsid sleep 4243 >/dev/null 2>&1 3>&- 4>&- 5>&- &
while :; do echo writing | dd of="$DISK_0_PATH" conv=notrunc status=none; sleep 0.05; done
"""
FAILING = "#!/bin/sh\nseq 1 300000\necho 'no such mirror' >&2\nexit 3\n"
VERIFY = '#!/bin/sh\n[ "$1" = parameters ] && [ "${OSP_GREETING:-}" != rude ] || { echo "not rude, please" >&2; exit 1; }\n'
DISKS = [{"size": 16 * MIB}, {"size": MIB}]


def define(cluster: Cluster, name: str, create: str, rename: str = RENAME, nodes: tuple[str, ...] = ("node1", "node2")) -> None:
    for node in nodes:
        place = cluster.node(node).root / HOME.lstrip("/") / name
        place.mkdir(parents=True)
        scripts = {"create": create, "rename": rename, "import": FAILING, "export": FAILING, "verify": VERIFY}
        for script, text in scripts.items():
            (place / script).write_text(text)
            (place / script).chmod(0o755)
        (place / "ganeti_api_version").write_text("20\n")
        (place / "variants.list").write_text("lean\nfull\n")
        (place / "parameters.list").write_text("greeting What it says.\n")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(f"os{os.getpid()}", 2, all_vm=True)
    try:
        define(made, "tiny", CREATE)
        define(made, "endless", ENDLESS)
        define(made, "failing", FAILING)
        define(made, "lonely", CREATE, nodes=("node1",))
        yield made
    finally:
        made.close()


def loops() -> list[str]:
    """The loop devices that this cluster has mapped, with the name that the kernel keeps."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = entry.read_text()
        except OSError:
            continue
        if re.search(r"vol-[0-9a-f]{17}\.raw", text):
            found.append(text.strip())
    return found


def sleepers(number: int) -> list[int]:
    done = subprocess.run(["pgrep", "-f", f"^sleep {number}$"], capture_output=True, text=True, check=False, timeout=30)
    return [int(pid) for pid in done.stdout.split()]


def nothing_left(cluster: Cluster) -> None:
    assert loops() == []
    assert sleepers(4242) + sleepers(4243) == []
    held = [f for f in cluster.findings() if f["severity"] == "error"]
    assert held == []


def image(cluster: Cluster, volume: str) -> Path:
    logical_id = cluster.get(f"/v1/volumes/{volume}")["logical_id"]
    return cluster.node("node1").root / cluster.lab.shared.lstrip("/") / str(logical_id)


def cat(disk: Path, name: str) -> str:
    argv = ["debugfs", "-R", f"cat {name}", str(disk)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def add(name: str, os: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "template": "shared", "disks": DISKS, "os": os, "start": False, "node": "node1", **more}


def test_scripts_install_rename_and_reinstall_with_the_disks_mapped(cluster: Cluster) -> None:
    made = cluster.do("POST", "/v1/instances", **add("web", "tiny+lean", os_parameters={"greeting": "hello there"}))
    disk = image(cluster, "web-disk0")
    told = dict(line.split("=", 1) for line in cat(disk, "told").splitlines())
    assert told["DISK_0_PATH"].startswith("/dev/loop")
    wanted = {"OS_API_VERSION": "20", "OS_NAME": "tiny", "OS_VARIANT": "lean", "INSTANCE_NAME": "web", "INSTANCE_OS": "tiny+lean"}
    wanted |= {"HYPERVISOR": "kvm", "DISK_COUNT": "2", "NIC_COUNT": "0", "DEBUG_LEVEL": "0", "DISK_0_BACKEND_TYPE": "block"}
    wanted |= {"DISK_0_FRONTEND_TYPE": "paravirtual", "DISK_1_ACCESS": "rw", "INSTANCE_PRIMARY_NODE": "node1"}
    assert wanted.items() <= told.items()
    assert not [name for name in told if name.startswith(("ATOLL", "LC_", "HOME"))], "the agent's own environment is not told"
    assert cat(disk, "greeting") == "hello there\n"
    assert image(cluster, "web-disk1").read_bytes()[:4] == b"web\n"
    nothing_left(cluster)
    log = cluster.node("node1").root / "var/log/atoll/os"
    assert any(b"\xff not UTF-8" in path.read_bytes() for path in log.glob("create-tiny-web-*.log"))
    steps = [step["key"] for step in made["steps"]]
    assert steps.index("run the create script") < steps.index("release claim for the create script")

    cluster.do("POST", "/v1/instances/web/rename", new_name="www")
    assert cat(image(cluster, "www-disk0"), "renamed") == "web www\n"
    cluster.do("POST", "/v1/instances/www/reinstall", os_parameters={"greeting": "again"})
    disk = image(cluster, "www-disk0")
    assert cat(disk, "greeting") == "again\n"
    assert "INSTANCE_REINSTALL=1" in cat(disk, "told")
    nothing_left(cluster)
    cluster.do("DELETE", "/v1/instances/www")


def test_what_a_definition_does_not_offer_is_refused_without_a_trace(cluster: Cluster) -> None:
    for name, more, word in (
        ("tiny", {}, "variant"),
        ("tiny+fat", {}, "lean, full"),
        ("tiny+lean", {"os_parameters": {"colour": "red"}}, "greeting"),
        ("tiny+lean", {"os_parameters": {"greeting": "rude"}}, "not rude, please"),
        ("missing", {}, "there is no OS definition missing"),
    ):
        job = cluster.end_of(cluster.submit("POST", "/v1/instances", **add("bad", name, **more)))
        assert job["state"] == "undone"
        assert word in job["error"]["message"], job["error"]
    assert cluster.items("instances") == []
    assert cluster.items("volumes") == []


def test_the_list_tells_what_every_node_has_and_diagnose_why_not(cluster: Cluster) -> None:
    names = [f"{name}+{variant}" for name in ("endless", "failing", "tiny") for variant in ("lean", "full")]
    assert cluster.type("atoll os list").split() == ["Name", *names]
    assert "greeting: What it says." in cluster.type("atoll os info tiny")
    said = cluster.type("atoll os diagnose")
    assert "OS: lonely [global status: invalid]" in said
    assert "node2: it is not there" in said
    assert "Error: not usable on every node: lonely" in said


def test_a_failing_script_undoes_all_and_its_last_words_are_told(cluster: Cluster) -> None:
    job = cluster.end_of(cluster.submit("POST", "/v1/instances", **add("bad", "failing+lean")))
    assert job["state"] == "undone"
    assert "failed with code 3: no such mirror" in job["error"]["message"]
    assert cluster.items("volumes") == []
    log = next((cluster.node("node1").root / "var/log/atoll/os").glob("create-failing-bad-*.log"))
    assert log.stat().st_size <= 1 << 20
    assert b"300000" in log.read_bytes()
    nothing_left(cluster)


def test_at_its_deadline_and_when_cancelled_all_of_it_is_gone(cluster: Cluster) -> None:
    job = cluster.end_of(cluster.submit("POST", "/v1/instances", **add("slow", "endless+lean", os_timeout=2.0)))
    assert job["state"] == "undone"
    assert "did not end within 2 s and was killed" in job["error"]["message"], job["error"]
    assert "began on /dev/loop" in job["error"]["message"]
    nothing_left(cluster)
    number = cluster.submit("POST", "/v1/instances", **add("slow", "endless+lean"))
    until(lambda: sleepers(4243), "the script runs")
    assert cluster.request("POST", f"/v1/jobs/{number}/cancel", {})[0] in (200, 202, 204)
    assert cluster.end_of(number)["state"] == "undone"
    nothing_left(cluster)


def test_a_script_dies_with_its_agent_and_the_job_goes_on_with_the_next(cluster: Cluster) -> None:
    number = cluster.submit("POST", "/v1/instances", **add("slow", "endless+lean"))
    first = until(lambda: sleepers(4243), "the script runs")
    cluster.node("node1").kill_service("agent", signal.SIGKILL)
    until(lambda: not set(first) & set(sleepers(4243)), "the script died with it")
    second = until(lambda: sleepers(4243), "the next agent runs it again", PATIENCE)
    assert set(first).isdisjoint(second)
    cluster.request("POST", f"/v1/jobs/{number}/cancel", {})
    assert cluster.end_of(number)["state"] == "undone"
    nothing_left(cluster)


def test_disks_of_a_stopped_instance_are_mapped_for_an_administrator(cluster: Cluster) -> None:
    disks = [{"size": MIB}, {"size": MIB, "mode": "ro"}]
    cluster.do("POST", "/v1/instances", name="db", template="shared", disks=disks, start=False, node="node1")
    paths = cluster.do("POST", "/v1/instances/db/activate-disks", node="node2")["result"]["paths"]
    assert len(loops()) == 2
    node = cluster.node("node2")
    for path, mode in zip(paths.values(), ("0", "1"), strict=True):
        assert node.exec(["blockdev", "--getro", path], check=True).stdout.strip() == mode
    assert cluster.refused("POST", "/v1/instances/db/start", node="node1") in ("wrong_state", "in_use", "disk_in_use")
    first = next(iter(paths.values()))
    node.exec(["sh", "-c", f"echo mapped | dd of={first} conv=notrunc status=none"], check=True)
    cluster.do("POST", "/v1/instances/db/deactivate-disks")
    assert loops() == []
    assert image(cluster, "db-disk0").read_bytes()[:7] == b"mapped\n"
    cluster.do("DELETE", "/v1/instances/db")


# --- Debian's own definition, unchanged ---

PACKAGE = "ganeti-instance-debootstrap"
SETTINGS = "SUITE=bookworm\nPARTITION_STYLE=none\n"


def unpacked(place: Path) -> Path:
    """Debian's package, from its archive at the first run."""
    deb = CACHE / f"{PACKAGE}.deb"
    if not deb.exists():
        done = subprocess.run(["apt-get", "download", PACKAGE], cwd=place, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            pytest.skip(f"the package {PACKAGE} cannot be had: {done.stderr.strip()[-200:]}")
        shutil.move(next(place.glob("*.deb")), deb)
    subprocess.run(["dpkg", "-x", deb, place / "root"], check=True, timeout=60)
    return place / "root"


@pytest.mark.qemu
@pytest.mark.skipif(not shutil.which("mmdebstrap") or not shutil.which("extlinux"), reason="mmdebstrap or extlinux is not installed")
def test_debians_own_definition_installs_what_boots(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.node("node1")
    package = unpacked(tmp_path)
    shutil.copytree(package / "usr/share/ganeti/os/debootstrap", node.root / HOME.lstrip("/") / "debootstrap", symlinks=True)
    shutil.copytree(package / "etc/ganeti", node.root / "etc/ganeti", dirs_exist_ok=True)
    (node.root / f"etc/default/{PACKAGE}").write_text(SETTINGS)
    (node.root / "etc/resolv.conf").touch()
    # What its debootstrap would fetch is in the definition's own cache: the nodes of a lab reach no archive.
    source = tmp_path / "debian"
    source.mkdir()
    subprocess.run(["mount", "-o", f"loop,ro,offset={MIB}", debian.build(), source], check=True, timeout=60)
    try:
        cache = node.root / f"var/cache/{PACKAGE}"
        cache.mkdir(parents=True)
        # A standard Debian has ifupdown; this small one has not.
        (tmp_path / "more/etc/network").mkdir(parents=True)
        tar = ["tar", "-cf", cache / "cache-bookworm-amd64.tar", "-C", source, ".", "-C", tmp_path / "more", "./etc/network"]
        subprocess.run(tar, check=True, timeout=120)
        boot = {}
        for name, file in (("kernel", "vmlinuz"), ("initrd", "initrd.img")):
            shutil.copy(next((source / "boot").glob(f"{file}-*")), node.root / f"var/lib/atoll/{name}")
            boot[name] = f"/var/lib/atoll/{name}"
    finally:
        subprocess.run(["umount", source], check=True, timeout=60)
    append = "root=/dev/vda rw console=ttyS0 quiet nokaslr mitigations=off panic=1 init=/sbin/atoll-init"
    body = add("deb", "debootstrap+default", os_parameters={"filesystem": "ext4"}, disks=[{"size": 640 * MIB}], memory=192 * MIB)
    job = cluster.do("POST", "/v1/instances", **{**body, **boot, "append": append, "start": True})
    console = node.run_dir / "logs" / job["result"]["instance"] / "console.log"

    def words() -> str:
        text = console.read_text(errors="replace") if console.exists() else ""
        return text if "DISK-READY" in text else ""

    said = until(words, "its boot", 180)
    assert "root /dev/vda ext4" in said
    cluster.do("POST", "/v1/instances/deb/stop", timeout=0)
    disk = image(cluster, "deb-disk0")
    assert cat(disk, "/etc/hostname") == "deb\n"
    assert "UUID=" in cat(disk, "/etc/fstab")
    cluster.do("POST", "/v1/instances/deb/rename", new_name="sid")
    assert cat(image(cluster, "sid-disk0"), "/etc/hostname") == "sid\n"
    nothing_left(cluster)
    cluster.do("DELETE", "/v1/instances/sid")


def test_a_power_cut_ends_what_was_mapped_and_the_word_of_a_person_frees_the_disks(cluster: Cluster) -> None:
    number = cluster.submit("POST", "/v1/instances", **add("gone", "endless+lean", node="node2"))
    until(lambda: sleepers(4243), "the script runs")
    cluster.node("node2").kill()
    assert loops() == []
    assert sleepers(4243) == []
    cluster.wait_silent("node2")
    cluster.do("POST", "/v1/nodes/node2/declare-dead")
    cluster.request("POST", f"/v1/jobs/{number}/cancel", {})
    ended = cluster.end_of(number)
    if ended["state"] == "needs-attention":
        cluster.request("POST", f"/v1/jobs/{number}/undo", {})
        ended = cluster.end_of(number)
    assert ended["state"] == "undone", ended
    assert cluster.items("instances") == []
    cluster.node("node2").boot()
    cluster.wait_alive()
    nothing_left(cluster)
