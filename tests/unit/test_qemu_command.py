"""The command line: the same machine on both sides of a migration, whatever was plugged when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.hypervisor.qemu.command import SLOTS, command, disk_device, disk_node, disk_path
from atoll.hypervisor.qemu.files import GuestFiles
from atoll.model.errors import InvalidInput
from atoll.model.messages import Attached, GuestDisk, GuestSpec
from atoll.model.objects import Boot, Nic

MIB = 1 << 20


def disk(slot: int, volume: str = "", **changes: Any) -> GuestDisk:
    volume = volume or f"vol-{slot}"
    attached = Attached(volume=volume, path=f"/pool/{volume}", blockdev={"driver": "file", "filename": f"/pool/{volume}", "locking": "on"})
    return GuestDisk(volume=volume, slot=slot, size=MIB, attached=attached).model_copy(update=changes)


def spec(*disks: GuestDisk, **changes: Any) -> GuestSpec:
    return GuestSpec(instance="i-1", name="web", generation=1, memory=128 * MIB, disks=list(disks)).model_copy(update=changes)


def argv(wanted: GuestSpec, run_dir: str = "/run/x", taps: tuple[int | None, ...] = (), incoming: bool = False) -> list[str]:
    return command(wanted, GuestFiles(Path(run_dir), wanted.instance), taps, incoming=incoming)


def values(words: list[str], option: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == option]


def devices(words: list[str]) -> dict[str, dict[str, Any]]:
    found = [json.loads(text) for text in values(words, "-device") if text.startswith("{")]
    return {device["id"]: device for device in found}


def test_both_sides_of_a_migration_are_the_same_machine() -> None:
    source, target = argv(spec(disk(0), disk(7))), argv(spec(disk(0), disk(7)), "/run/y", incoming=True)
    assert target[-2:] == ["-incoming", "defer"]
    assert [word.replace("/run/y", "/run/x") for word in target[:-2]] == source


def test_a_disk_is_at_the_same_place_plugged_or_there_at_start() -> None:
    at_start = devices(argv(spec(disk(0), disk(5))))["vol-5"]
    assert at_start == disk_device(disk(5))
    assert (at_start["bus"], at_start["addr"]) == ("slot5", "0x0")
    assert (at_start["werror"], at_start["rerror"]) == ("stop", "stop")
    # ... and what else is plugged changes nothing for it, nor does the order.
    assert devices(argv(spec(disk(9), disk(5), disk(0))))["vol-5"] == at_start


def test_every_root_port_is_there_from_the_start_at_an_address_of_its_own() -> None:
    ports = [text for text in values(argv(spec()), "-device") if text.startswith("pcie-root-port")]
    assert len(ports) == SLOTS
    assert len({text.split("addr=")[1].split(",")[0] for text in ports}) == SLOTS
    assert all(f"id=slot{number},bus=pcie.0" in text for number, text in enumerate(ports))
    assert ports == [text for text in values(argv(spec(disk(3))), "-device") if text.startswith("pcie-root-port")]


def test_it_starts_stopped_confined_and_without_anything_of_this_machine() -> None:
    words = argv(spec())
    assert {"-S", "-nodefaults", "-no-user-config", "-no-shutdown", "-only-migratable"} <= set(words)
    assert values(words, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert [text for text in values(words, "-mon")] == ["chardev=qmp0,mode=control", "chardev=qmp1,mode=control"]


def test_disks_are_opened_past_the_page_cache_and_as_the_connector_says() -> None:
    node = disk_node(disk(0))
    assert node["driver"] == "raw"
    assert (node["node-name"], node["file"]["node-name"]) == ("vol-0", "vol-0-file")
    assert node["cache"] == node["file"]["cache"] == {"direct": True, "no-flush": False}
    assert (node["file"]["locking"], node["read-only"]) == ("on", False)
    assert disk_node(disk(0, mode="ro"))["file"]["read-only"] is True
    other = Attached(volume="v", blockdev={"driver": "rbd", "cache": {"direct": False}, "discard": "ignore"})
    assert disk_node(disk(0, attached=other))["cache"] == {"direct": False}
    kernel = Attached(volume="v", path="/dev/rbd0")
    assert disk_node(disk(0, attached=kernel))["file"]["driver"] == "host_device"
    assert (disk_path(disk(0)), disk_path(disk(0, attached=kernel)), disk_path(disk(0, attached=other))) == ("/pool/vol-0", "/dev/rbd0", "")


def test_the_first_disk_boots_unless_a_kernel_is_given() -> None:
    assert [d.get("bootindex") for d in devices(argv(spec(disk(4), disk(2)))).values()] == [1, None]
    direct = argv(spec(disk(0), boot=Boot(kernel="/k", initrd="/i", append="a=1 b")))
    assert "bootindex" not in devices(direct)["vol-0"]
    assert (values(direct, "-kernel"), values(direct, "-initrd"), values(direct, "-append")) == (["/k"], ["/i"], ["a=1 b"])


def test_network_cards() -> None:
    nics = [Nic(mac="52:54:00:00:00:01"), Nic(mac="52:54:00:00:00:02", mode="bridged", link="br0")]
    words = argv(spec(nics=nics), taps=(None, 7))
    assert values(words, "-netdev") == ["user,id=net0", "tap,id=net1,fd=7"]
    cards = [text for text in values(words, "-device") if text.startswith("virtio-net")]
    assert ["addr=0x8" in cards[0], "addr=0x9" in cards[1]] == [True, True]


def test_commas_do_not_end_a_value() -> None:
    assert any("path=/run/a,,b/guests/i-1/qmp," in text for text in argv(spec(), "/run/a,b"))


def test_memory_need_not_be_whole_mebibytes() -> None:
    assert values(argv(spec(memory=128 * MIB)), "-m") == ["size=128M"]
    assert values(argv(spec(memory=128 * MIB + 4096)), "-m") == [f"size={128 * MIB + 4096}B"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec(disk(SLOTS)), "does not exist"),
        (spec(disk(-1)), "does not exist"),
        (spec(disk(0, "no,name")), "cannot be the name"),
        (spec(disk(0, "v" * 27)), "cannot be the name"),
        (spec(disk(0, attached=None)), "not attached"),
        (spec(disk(0, attached=Attached(volume="vol-0"))), "not attached"),
        (spec(nics=[Nic(mac="52:54:00:00:00:01")] * 9), "network cards"),
    ],
)
def test_what_cannot_be(wanted: GuestSpec, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        argv(wanted, taps=(None,) * len(wanted.nics))
