"""Every command that changes something: what it sends, checked against the operations' own request models."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rest_fakes import SHARED, FakeLeader, fake_leader, served

from atoll.cli import ganeti
from atoll.cli.main import GROUPS, atoll
from atoll.model.errors import AtollError, Held, NotFound
from atoll.model.health import Health, HealthCheck, Rates, Refusal
from atoll.model.units import GIB, MIB
from atoll.operations.all import OPERATIONS
from atoll.operations.health import Seen

Sent = tuple[str, str, dict[str, Any]]


class Cli:
    """The served leader; a call runs a command in a thread, and gives what was submitted."""

    def __init__(self, leader: FakeLeader) -> None:
        self.leader = leader

    async def invoke(self, line: list[str], input: str = "") -> Any:
        root: click.Command = atoll
        if line[0].startswith("gnt-"):
            root, line = ganeti.PROGRAMS[line[0].removeprefix("gnt-")](), line[1:]
        elif line[0] == "atoll":
            line = line[1:]
        return await asyncio.to_thread(CliRunner().invoke, root, line, input=input)

    async def sent(self, line: str) -> list[Sent]:
        before = len(self.leader.asked)
        result = await self.invoke(line.split())
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        found = []
        for operation, target, request, _, key in self.leader.asked[before:]:
            assert len(key) >= 32
            defaults = _defaults(OPERATIONS[operation].request)
            found.append((operation, target, {k: v for k, v in request.items() if k not in defaults or v != defaults[k]}))
        return found


def _defaults(model: Any) -> dict[str, Any]:
    return {name: info.get_default(call_default_factory=True) for name, info in model.model_fields.items() if not info.is_required()}


@pytest.fixture
async def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cli]:
    for name in [name for name in os.environ if name.startswith("ATOLL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATOLL_CONFIG", "/nonexistent/atoll.toml")
    leader = await fake_leader()
    async with served(leader, tmp_path) as (path, _):
        monkeypatch.setenv("ATOLL_SOCKET", path)
        yield Cli(leader)


def _disk(**given: Any) -> dict[str, Any]:
    return {"size": None, "pool": None, "adopt": None, "image": None, "name": None, "mode": "rw", "options": {}, **given}


def _image(node: str, path: str, pool: str | None, size: int | None = None) -> dict[str, Any]:
    return _disk(size=size, pool=pool, image={"node": node, "path": path, "format": None})


CASES: list[tuple[str, Sent]] = [
    (
        "atoll cluster modify --hypervisor fake -D file:path=/a,locking=off",
        ("cluster.modify", "", {"hypervisor": "fake", "driver_options": {"file": {"path": "/a", "locking": "off"}}}),
    ),
    ("atoll group add east --accelerator tcg", ("group.add", "", {"name": "east", "accelerator": "tcg"})),
    (
        "atoll group modify default --cpu-model qemu64 --default-pool file=local",
        ("group.modify", "default", {"cpu_model": "qemu64", "default_pools": {"file": "local"}}),
    ),
    ("atoll group rename default west", ("group.rename", "default", {"new_name": "west"})),
    ("atoll group assign-nodes default node1 node2", ("group.assign-nodes", "default", {"nodes": ["node1", "node2"]})),
    ("atoll group remove default", ("group.remove", "default", {})),
    ("atoll node modify node1 --offline", ("node.modify", "node1", {"offline": True})),
    ("atoll node modify --drained no --role vm node1", ("node.modify", "node1", {"drained": False, "roles": ["vm"]})),
    ("atoll node migrate node1 -n node2", ("node.migrate", "node1", {"target": "node2"})),
    ("atoll node failover node1 --node-is-dead", ("node.failover", "node1", {"node_is_dead": True})),
    ("atoll node evacuate node1", ("node.evacuate", "node1", {})),
    ("atoll node declare-dead node1 -f", ("node.declare-dead", "node1", {})),
    ("atoll node declare-dead node1 -f --disks-are-lost", ("node.declare-dead", "node1", {"disks_are_lost": True})),
    ("atoll node renew node1", ("node.renew", "node1", {})),
    ("atoll cluster renew-certificates", ("cluster.renew-certificates", "", {})),
    ("atoll cluster rotate-ca --leave-behind", ("cluster.rotate-ca", "", {"leave_behind": True})),
    ("gnt-cluster renew-crypto --new-cluster-certificate", ("cluster.rotate-ca", "", {})),
    ("gnt-cluster renew-crypto --new-node-certificates", ("cluster.renew-certificates", "", {})),
    ("atoll node remove node1 -f", ("node.remove", "node1", {})),
    (
        "atoll pool add p1 -t sharedfile -O path=/srv locking=off -g default",
        ("pool.add", "", {"name": "p1", "driver": "sharedfile", "options": {"path": "/srv", "locking": "off"}, "groups": ["default"]}),
    ),
    (
        "atoll pool add p1 -t rbd --observe pool=vms",
        ("pool.add", "", {"name": "p1", "driver": "rbd", "options": {"pool": "vms"}, "observe": True}),
    ),
    ("atoll pool connect images default", ("pool.connect", "images", {"group": "default"})),
    ("atoll pool disconnect images default", ("pool.disconnect", "images", {"group": "default"})),
    ("atoll pool check images", ("pool.check", "images", {})),
    ("atoll pool mark images -n node2", ("pool.mark", "images", {"node": "node2"})),
    ("atoll pool modify images --close --reason full", ("pool.modify", "images", {"state": "closed", "reason": "full"})),
    ("atoll pool remove images -f", ("pool.remove", "images", {})),
    (
        "atoll volume create v1 -p images -s 10G --tags a,b -O preallocation=full",
        ("volume.create", "", {"name": "v1", "pool": "images", "size": 10 * GIB, "tags": ["a", "b"], "options": {"preallocation": "full"}}),
    ),
    (
        "atoll volume create -p local --adopt old.img -n node1",
        ("volume.create", "", {"pool": "local", "adopt": "old.img", "node": "node1"}),
    ),
    (
        "atoll volume create v1 -p images --image node1:/srv/a.qcow2 --image-format qcow2",
        ("volume.create", "", {"name": "v1", "pool": "images", "image": {"node": "node1", "path": "/srv/a.qcow2", "format": "qcow2"}}),
    ),
    (
        "atoll volume create v1 --from-snapshot then -s 20G",
        ("volume.create", "", {"name": "v1", "snapshot": "then", "size": 20 * GIB}),
    ),
    (
        "atoll snapshot create spare --name then --tags a,b",
        ("snapshot.create", "", {"volume": "spare", "name": "then", "tags": ["a", "b"]}),
    ),
    ("atoll snapshot tag then a=b", ("snapshot.tags", "then", {"add": ["a=b"]})),
    ("atoll snapshot delete then -f", ("snapshot.delete", "then", {})),
    ("atoll volume flatten spare", ("volume.flatten", "spare", {})),
    ("atoll volume grow spare 512", ("volume.grow", "spare", {"increment": 512 * MIB})),
    ("atoll volume grow spare 2G --absolute", ("volume.grow", "spare", {"size": 2 * GIB})),
    ("atoll volume rename spare v9", ("volume.rename", "spare", {"new_name": "v9"})),
    ("atoll volume tag spare a=b c", ("volume.tags", "spare", {"add": ["a=b", "c"]})),
    ("atoll volume untag spare c", ("volume.tags", "spare", {"remove": ["c"]})),
    ("atoll volume delete spare -f", ("volume.delete", "spare", {})),
    (
        "atoll instance add w -t sharedfile --disk 0:size=10G,pool=images "
        "--disk 1:size=512,mode=ro,name=logs,preallocation=full -n node1:node2 "
        "-B maxmem=1G,vcpus=2 -H kvm:kernel_path=/vmlinuz,initrd_path=/initrd --append ro "
        "--net 0:mode=bridged,link=br0,mac=52:54:00:AA:00:01 "
        "-o debian --tags x,y --no-start",
        (
            "instance.add",
            "",
            {
                "name": "w",
                "template": "sharedfile",
                "disks": [
                    _disk(size=10 * GIB, pool="images"),
                    _disk(size=512 * MIB, name="logs", mode="ro", options={"preallocation": "full"}),
                ],
                "nics": [{"mode": "bridged", "link": "br0", "mac": "52:54:00:aa:00:01"}],
                "node": "node1",
                "secondary": "node2",
                "memory": GIB,
                "vcpus": 2,
                "kernel": "/vmlinuz",
                "initrd": "/initrd",
                "append": "ro",
                "os": "debian",
                "tags": ["x", "y"],
                "start": False,
            },
        ),
    ),
    (
        "atoll instance add w -t file -s 3G -g default",
        (
            "instance.add",
            "",
            {
                "name": "w",
                "template": "file",
                "group": "default",
                "disks": [_disk(size=3 * GIB)],
            },
        ),
    ),
    (
        "atoll instance add w --image node2:/srv/a.raw --disk 0:pool=images --disk 1:image=node1:/b",
        ("instance.add", "", {"name": "w", "disks": [_image("node2", "/srv/a.raw", "images"), _image("node1", "/b", None)]}),
    ),
    (
        "atoll instance add w -s 2G --image node2:/srv/a.raw",
        ("instance.add", "", {"name": "w", "disks": [_image("node2", "/srv/a.raw", None, 2 * GIB)]}),
    ),
    ("atoll instance add w -t diskless --kernel /k", ("instance.add", "", {"name": "w", "kernel": "/k"})),
    ("atoll instance start web1 -n node2 --node-is-dead", ("instance.start", "web1", {"node": "node2", "node_is_dead": True})),
    ("atoll instance stop web1 --timeout 5", ("instance.stop", "web1", {"timeout": 5.0})),
    ("atoll instance resume web1", ("instance.resume", "web1", {})),
    ("atoll instance reboot web1 --type full", ("instance.reboot", "web1", {"type": "full"})),
    ("atoll instance migrate web1 -n node2 --allow-failover", ("instance.migrate", "web1", {"node": "node2", "allow_failover": True})),
    ("atoll instance failover web1 --node-is-dead --timeout 3", ("instance.failover", "web1", {"node_is_dead": True, "timeout": 3.0})),
    ("atoll instance move db1 -n node3 --pool local", ("instance.move", "db1", {"node": "node3", "pool": "local"})),
    (
        "atoll instance modify web1 -B memory=2G --kernel /k -o bsd",
        ("instance.modify", "web1", {"memory": 2 * GIB, "kernel": "/k", "os": "bsd"}),
    ),
    ("atoll instance modify web1 --net none", ("instance.modify", "web1", {"nics": []})),
    ("atoll instance rename web1 web9", ("instance.rename", "web1", {"new_name": "web9"})),
    (
        "atoll instance add w -s 1G -o debian+lean -O suite=trixie,arch=amd64 -O proxy=none --os-timeout 60",
        (
            "instance.add",
            "",
            {
                "name": "w",
                "disks": [_disk(size=GIB)],
                "os": "debian+lean",
                "os_parameters": {"suite": "trixie", "arch": "amd64", "proxy": "none"},
                "os_timeout": 60.0,
            },
        ),
    ),
    ("atoll instance add w -o note --no-install", ("instance.add", "", {"name": "w", "os": "note", "no_install": True})),
    ("atoll instance rename web1 web9 --no-script", ("instance.rename", "web1", {"new_name": "web9", "run_script": False})),
    ("gnt-instance reinstall -f -o noop web1", ("instance.reinstall", "web1", {"os": "noop"})),
    (
        "atoll instance reinstall web1 -f -O suite=sid --os-timeout 9",
        ("instance.reinstall", "web1", {"os_parameters": {"suite": "sid"}, "os_timeout": 9.0}),
    ),
    (
        "atoll instance export web1 node2:/srv/w.atoll --shutdown --timeout 5",
        ("instance.export", "web1", {"node": "node2", "path": "/srv/w.atoll", "shutdown": True, "timeout": 5.0}),
    ),
    (
        "atoll instance import w node2:/srv/w.atoll -t images --no-start",
        ("instance.import", "", {"name": "w", "node": "node2", "path": "/srv/w.atoll", "template": "images", "start": False}),
    ),
    (
        "gnt-backup export -n node1 web1",
        (
            "instance.export",
            "web1",
            {"node": "node1", "path": "/var/lib/atoll/exports/web1.atoll", "overwrite": True, "shutdown": True},
        ),
    ),
    (
        "gnt-backup import --src-node node1 -t images w",
        ("instance.import", "", {"name": "w", "node": "node1", "path": "/var/lib/atoll/exports/w.atoll", "template": "images"}),
    ),
    ("atoll instance tag web1 a", ("instance.tags", "web1", {"add": ["a"]})),
    ("atoll instance untag web1 a b", ("instance.tags", "web1", {"remove": ["a", "b"]})),
    ("atoll instance remove web1 -f --keep-disks", ("instance.remove", "web1", {"keep_disks": True})),
    ("atoll instance grow-disk web1 0 5G", ("instance.grow-disk", "web1", {"increment": 5 * GIB})),
    ("atoll instance grow-disk web1 1 20G --absolute", ("instance.grow-disk", "web1", {"index": 1, "size": 20 * GIB})),
    (
        "atoll instance add-disk web1 -s 1G -p images --name data",
        (
            "instance.add-disk",
            "web1",
            {"disk": _disk(size=GIB, pool="images", name="data")},
        ),
    ),
    (
        "atoll instance add-disk web1 --disk size=1G -t sharedfile",
        (
            "instance.add-disk",
            "web1",
            {"disk": _disk(size=GIB), "template": "sharedfile"},
        ),
    ),
    ("atoll instance attach-disk web1 spare --mode ro", ("instance.attach-disk", "web1", {"volume": "spare", "mode": "ro"})),
    ("atoll instance detach-disk web1 0", ("instance.detach-disk", "web1", {"index": 0})),
    ("atoll instance detach-disk web1 web1-0 --timeout 5", ("instance.detach-disk", "web1", {"volume": "web1-0", "timeout": 5.0})),
    ("atoll instance remove-disk web1 0 -f", ("instance.remove-disk", "web1", {"index": 0})),
    ("atoll instance activate-disks db1 -n node2", ("instance.activate-disks", "db1", {"node": "node2"})),
    ("atoll instance deactivate-disks db1", ("instance.deactivate-disks", "db1", {})),
    ("atoll instance recreate db1 --disk 0", ("instance.recreate", "db1", {"disks": [0]})),
    ("atoll cluster tag a", ("cluster.tags", "", {"add": ["a"]})),
    ("atoll node tag node1 a", ("node.tags", "node1", {"add": ["a"]})),
    ("atoll group untag default a", ("group.tags", "default", {"remove": ["a"]})),
    ("atoll pool tag images a", ("pool.tags", "images", {"add": ["a"]})),
    ("gnt-cluster add-tags a", ("cluster.tags", "", {"add": ["a"]})),
    ("gnt-node remove-tags node1 a", ("node.tags", "node1", {"remove": ["a"]})),
    ("gnt-instance startup web1", ("instance.start", "web1", {})),
    ("gnt-instance shutdown --timeout 0 web1", ("instance.stop", "web1", {"timeout": 0.0})),
    ("gnt-instance recreate-disks web1", ("instance.recreate", "web1", {})),
    (
        "gnt-instance add -t sharedfile -s 1024 -B memory=256,vcpus=1 -o noop -n node1 w",
        (
            "instance.add",
            "",
            {
                "name": "w",
                "template": "sharedfile",
                "memory": 256 * MIB,
                "os": "noop",
                "node": "node1",
                "disks": [_disk(size=GIB)],
            },
        ),
    ),
    (
        "gnt-instance modify web1 --disk add:size=1G,pool=images",
        ("instance.add-disk", "web1", {"disk": _disk(size=GIB, pool="images")}),
    ),
    ("gnt-instance modify web1 --disk attach:name=spare", ("instance.attach-disk", "web1", {"volume": "spare"})),
    ("gnt-instance modify web1 --disk 0:remove", ("instance.remove-disk", "web1", {"index": 0})),
    ("gnt-instance modify web1 --disk detach", ("instance.detach-disk", "web1", {"index": 0})),
    ("gnt-instance add-tags web1 x", ("instance.tags", "web1", {"add": ["x"]})),
    ("gnt-instance remove-tags web1 x", ("instance.tags", "web1", {"remove": ["x"]})),
    ("gnt-node modify -O yes -D no node1", ("node.modify", "node1", {"offline": True, "drained": False})),
    ("gnt-node evacuate node1", ("node.evacuate", "node1", {})),
    (
        "gnt-cluster modify --shared-file-storage-dir /srv/ganeti",
        ("cluster.modify", "", {"driver_options": {"sharedfile": {"path": "/srv/ganeti"}}}),
    ),
    ("gnt-group assign-nodes default node1", ("group.assign-nodes", "default", {"nodes": ["node1"]})),
    ("atoll storage init default -s ceph", ("storage.init", "default", {"type": "ceph"})),
    ("gnt-storage init-distributed-storage -s ceph default", ("storage.init", "default", {"type": "ceph"})),
    (
        "gnt-cluster modify -S ceph:disk=/dev/sdb:/dev/sdc,size=2",
        ("cluster.modify", "", {"storage_options": {"ceph": {"disk": "/dev/sdb:/dev/sdc", "size": "2"}}}),
    ),
    ("atoll cluster modify -S ceph:size=", ("cluster.modify", "", {"storage_options": {"ceph": {"size": ""}}})),
    ("gnt-group modify -S ceph:name=slow default", ("group.modify", "default", {"storage_options": {"ceph": {"name": "slow"}}})),
    ("gnt-node modify -S ceph:disk=/dev/sdd node1", ("node.modify", "node1", {"storage_options": {"ceph": {"disk": "/dev/sdd"}}})),
    ("atoll node modify node1 --offline yes --io-may-stop", ("node.modify", "node1", {"offline": True, "io_may_stop": True})),
    ("atoll storage join node1", ("node.join-storage", "node1", {})),
    ("atoll node modify node1 --drain", ("node.leave-storage", "node1", {})),
    ("gnt-node modify --drain node1", ("node.leave-storage", "node1", {})),
    ("atoll node remove node1 --dead --force", ("node.remove", "node1", {"dead": True})),
    ("atoll storage replace-node node1 node2", ("node.replace-storage", "node1", {"node": "node2"})),
    ("gnt-storage replace-node node1 node2", ("node.replace-storage", "node1", {"node": "node2"})),
    ("atoll storage add-disks node1 /dev/sdd /dev/sde", ("node.add-storage-disks", "node1", {"disks": ["/dev/sdd", "/dev/sde"]})),
    ("atoll storage remove-disks node1 /dev/sdd", ("node.remove-storage-disks", "node1", {"disks": ["/dev/sdd"]})),
    ("atoll storage remove-disks node1 /dev/sdd --dead", ("node.remove-storage-disks", "node1", {"disks": ["/dev/sdd"], "dead": True})),
    ("gnt-node add --readd node1", ("node.modify", "node1", {"offline": False})),
    ("gnt-storage check images", ("pool.check", "images", {})),
]


async def test_what_every_command_sends(cli: Cli) -> None:
    for line, wanted in CASES:
        assert await cli.sent(line) == [wanted], line


def test_every_public_operation_has_a_command() -> None:
    covered = {operation for _, (operation, _, _) in CASES}
    public = {operation.name for operation in OPERATIONS.values() if operation.public}
    assert public == covered


async def test_several_instances_are_submitted_at_once_and_the_first_error_is_the_exit(cli: Cli) -> None:
    found = await cli.sent("atoll instance start web1 db1 web1")
    assert [(operation, target) for operation, target, _ in found] == [("instance.start", "web1"), ("instance.start", "db1")]
    cli.leader.refuse = Held("web1 is held")
    result = await cli.invoke(["instance", "start", "web1", "db1"])
    assert isinstance(result.exception, Held)
    assert len(cli.leader.asked) == 4


BAD = [
    ("instance add w --disk 0:size=-1G", "is not positive"),
    ("instance add w --disk 0:size=0", "is not positive"),
    ("instance add w --disk 0:size=2000000T", "larger than 1 EiB"),
    ("instance add w --disk 0:size=ten", "is not a size"),
    ("instance add w --ssh-key /etc/hostname", "SSH key"),
    ("instance add w --image disk.img", "this machine is no node of the cluster"),
    ("instance add w --image node1:disk.img", "not an absolute path"),
    ("instance add w --image node1:/a --disk 0:adopt=b", "cannot be made from two images"),
    ("instance add w --disk 0:pool=images", "neither size, image nor adopt"),
    ("instance add w --disk 1:size=1G", "numbers must be 0, 1, 2"),
    ("instance add w --disk 0:size=1G --disk 0:size=2G", "given twice"),
    ("instance add w --disk 0:size=1G,size=2G", "given twice"),
    ("instance add w --disk 0:size=1G,fast", "has no value"),
    ("instance add w -s 1G --disk 0:size=1G", "exclude each other"),
    ("instance add w -B cores=2", "there is no 'cores'"),
    ("instance add w -B vcpus=two", "is not a number"),
    ("instance add w -H acpi=no", "there is no 'acpi'"),
    ("instance add w --net 0:ip=10.0.0.1", "there is no ip"),
    ("instance modify web1", "nothing to change"),
    ("instance modify web1 --disk 0:shrink", "is not understood"),
    ("instance remove web1", "no terminal"),
    ("node modify node1", "nothing to change"),
    ("node declare-dead node1", "no terminal"),
    ("pool add p -t file path", "key=value"),
    ("volume create v1 -s 1G", "Missing option '-p' / '--pool'"),
    ("snapshot delete then", "no terminal"),
    ("volume delete spare", "no terminal"),
    ("volume grow spare -5G", ""),
    ("instance list -o name,colour", "there is no field 'colour'"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
async def test_bad_input_is_refused_before_anything_is_sent(cli: Cli, line: str, words: str) -> None:
    result = await cli.invoke(line.split())
    if isinstance(result.exception, AtollError):
        assert result.exception.exit_code == 2
        assert words in result.exception.message
        assert result.exception.hint
    else:
        assert result.exit_code == 2
    assert cli.leader.asked == []


async def test_help_of_every_command_says_what_it_does() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        context = click.Context(command, info_name=path[-1])
        assert command.get_short_help_str(), path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.is_flag and not isinstance(parameter.type, click.Choice):
                assert parameter.help or parameter.name in ("initrd",), (path, parameter.name)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                if name != "lab":
                    found = command.get_command(context, name)
                    assert found is not None
                    walk(found, [*path, name])

    walk(atoll, ["atoll"])
    for name, make in ganeti.PROGRAMS.items():
        walk(make(), [f"gnt-{name}"])
    nouns = {"cluster", "node", "group", "pool", "storage", "volume", "snapshot", "instance", "os", "job"}
    assert set(GROUPS) == {*nouns, "doctor", "lab", "completion"}


async def test_a_seed_is_read_from_files_and_stdin(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# mine\nssh-ed25519 AAAA me\n\nssh-rsa BBBB\n")
    (tmp_path / "net").write_text("version: 2\n")
    line = f"instance add w --user-data - --ssh-key {tmp_path}/keys --network-config {tmp_path}/net"
    result = await cli.invoke(line.split(), input="#!/bin/sh\necho secret\n")
    assert result.exit_code == 0, result.output
    _, _, request, _, _ = cli.leader.asked[-1]
    assert request["cloud_init"] == {
        "user_data": "#!/bin/sh\necho secret\n",
        "meta_data": "",
        "network_config": "version: 2\n",
        "ssh_keys": ["ssh-ed25519 AAAA me", "ssh-rsa BBBB"],
        "sealed": "",
    }
    assert "secret" not in result.output
    (tmp_path / "private").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    refused = await cli.invoke(["instance", "add", "w", "--ssh-key", str(tmp_path / "private")])
    assert "private half" in refused.exception.message
    await cli.invoke(["instance", "add", "w", "--cloud-init"])
    assert cli.leader.asked[-1][2]["cloud_init"]["user_data"] == ""


async def test_what_lies_in_a_pool_is_listed(cli: Cli) -> None:
    lines = (await cli.invoke(["pool", "images", "looked-at"])).output.splitlines()
    assert lines[0].split()[:3] == ["Image", "Size", "Volume"]
    assert lines[1].split()[:2] == ["old", "4M"]
    assert "the Ceph client at 10.0.0.9:0/1" in lines[1]
    assert isinstance((await cli.invoke(["pool", "images", "nothing"])).exception, NotFound)


async def test_storage_status_says_how_the_pools_are(cli: Cli) -> None:
    pools = cli.leader.state.pools_health
    nothing = await cli.invoke(["storage", "status"])
    assert nothing.exit_code == 0
    told = Health(
        status="warning",
        checks=(HealthCheck(code="POOL_NEARFULL", severity="warning", summary="1 pool(s) nearfull", details=("pool 'vms' is nearfull",)),),
        refusals=(Refusal(code="POOL_NEARFULL", reason="Ceph pool vms is nearly full", hint="ceph osd df"),),
        monitors=3,
        quorum=("a", "b"),
        osds=6,
        osds_up=5,
        osds_in=6,
        pgs={"active+clean": 30, "stale": 2},
        pgs_inactive=2,
        total=100 * GIB,
        used=86 * GIB,
        nearfull_ratio=0.85,
        full_ratio=0.95,
        figures="Ceph has no active manager",
        client=Rates(read_bytes=MIB, write_bytes=2 * MIB, reads=3, writes=4),
    )
    pools[SHARED.id] = Seen(0.0).followed(told, 1e9)
    table = (await cli.invoke(["storage", "status"])).output.splitlines()
    assert table[0].split()[:2] == ["Pool", "Storage"]
    assert table[1].split()[:7] == ["images", "warning", "5/6", "30/32", "86%", "1M", "/"]
    assert "Ceph pool vms is nearly full (POOL_NEARFULL)" in table[1]
    whole = (await cli.invoke(["storage", "status", "images"])).output
    for words in (
        "Storage: warning",
        "no new volumes, because Ceph pool vms is nearly full (POOL_NEARFULL)",
        "  Next: ceph osd df",
        "warning: POOL_NEARFULL: 1 pool(s) nearfull (since 2001-09-0",
        "    pool 'vms' is nearfull",
        "monitors: 2 of 3 agree: a, b",
        "OSDs: 6, of which 5 run and 6 count",
        "placement groups: 30 active+clean, 2 stale",
        "raw space: 86G of 100G used, 86%; nearly full at 85%, full at 95%",
        "this pool, in a second: 3 reads (1M), 4 writes (2M)",
        "mind: Ceph has no active manager",
    ):
        assert words in whole
    assert whole.strip() in (await cli.invoke(["pool", "info", "images"])).output
    data = json.loads((await cli.invoke(["storage", "status", "images", "--format", "json"])).output)
    assert (data["state"], data["sample"]["osds"]) == ("warning", 6)
    pools[SHARED.id] = replace(pools[SHARED.id], problem="node1: nobody answers")
    silent = (await cli.invoke(["storage", "status", "images"])).output
    assert "Storage: unknown" in silent
    assert "no sample: node1: nobody answers; what follows is of 2001-09-0" in silent
    assert "no new volumes" not in silent
