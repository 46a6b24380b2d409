"""Seeds for cloud-init in simulated clusters: what the guest finds, and who does not find it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from simsupport import check, dump, everything, settle

from atoll.lab.box import Box, simulate
from atoll.model.errors import AlreadyExists, InvalidInput
from atoll.model.objects import Instance, Job, Volume
from atoll.model.units import GIB, MIB

SECRET = "correct horse battery staple"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8 me@here"
SEED = {"user_data": f"#cloud-config\npassword: {SECRET}\n", "ssh_keys": [KEY]}


async def cluster(driver: str = "sharedfile") -> Box:
    box = await Box.make()
    await box.add_pool("shared", driver)
    return box


def seed_of(box: Box, name: str = "web1") -> dict[str, str]:
    volume = box.master.state.store.find(Volume, f"{name}-seed")
    found: dict[str, str] = next(i["content"] for images in box.disks.images.values() for i in images.values() if i["volume"] == volume.id)
    return found


@pytest.mark.parametrize("driver", ["sharedfile", "file", "fakemirror"])
def test_the_seed_is_the_last_disk_read_only_and_says_who_the_guest_is(driver: str) -> None:
    async def run() -> None:
        box = await cluster(driver)
        await box.do("instance.add", name="web1", disks=[{"size": GIB}, {"size": GIB}], memory=GIB, cloud_init=SEED)
        web1 = box.master.state.store.find(Instance, "web1")
        volume = box.master.state.store.find(Volume, "web1-seed")
        assert [disk.mode for disk in web1.disks] == ["rw", "rw", "ro"]
        assert (web1.disks[2].volume, volume.size) == (volume.id, 4 * MIB)
        found = seed_of(box)
        assert found["user-data"] == SEED["user_data"]
        assert yaml.safe_load(found["meta-data"]) == {"instance-id": web1.id, "local-hostname": "web1", "public-keys": [KEY]}
        check(box)
        await box.close()

    simulate(run)


def test_meta_data_of_ones_own_keeps_its_words() -> None:
    async def run() -> None:
        box = await cluster()
        meta = "local-hostname: other\nregion: east\n"
        await box.do("instance.add", name="web1", cloud_init={"meta_data": meta, "network_config": "version: 2\n"})
        found = seed_of(box)
        ident = box.master.state.store.find(Instance, "web1").id
        assert yaml.safe_load(found["meta-data"]) == {"instance-id": ident, "local-hostname": "other", "region": "east"}
        assert found["user-data"].startswith("#cloud-config")
        assert found["network-config"] == "version: 2\n"
        await box.do("instance.add", name="web2", cloud_init={"meta_data": '{"instance-id": "x"}'})
        assert json.loads(seed_of(box, "web2")["meta-data"]) == {"instance-id": "x"}
        await box.close()

    simulate(run)


def test_what_is_secret_is_in_no_store_and_no_journal_not_even_of_a_job_that_waits() -> None:
    async def run() -> None:
        box = await cluster()
        seen: list[str] = []

        async def look(phase: str, node: str, call: Any) -> None:
            seen.append(json.dumps(everything(box)))

        box.link_fault = look
        first = await box.submit("instance.add", name="web1", disks=[{"size": GIB}], cloud_init=SEED, key="one")
        second = await box.submit("instance.add", name="web2", disks=[{"size": GIB}], cloud_init=SEED)
        assert first.job
        assert second.job
        for number in (first.job, second.job):
            assert (await box.end_of(number)).state == "done"
        box.link_fault = None
        seen.append(json.dumps(everything(box)))
        assert len(seen) > 10
        for text in seen:
            assert SECRET not in text
            assert KEY not in text
        store = box.master.state.store
        journals = [step for job in store.all(Job) for step in await store.journal(job)]
        assert "atoll1:" in "".join(item.model_dump_json() for item in [*journals, *store.all(Job)])
        for database in box._databases.values():
            assert SECRET not in json.dumps(database.execute("SELECT * FROM step").fetchall())
        await box.close()

    simulate(run)


def test_a_restarted_master_opens_it_again_and_the_same_key_gives_the_same_job() -> None:
    async def run() -> None:
        box = await cluster()
        number = (await box.submit("instance.add", name="web1", disks=[{"size": GIB}], cloud_init=SEED, key="one")).job
        assert number
        await box.crash_master()
        await box.boot_master()
        assert (await box.end_of(number)).state == "done"
        assert SECRET in seed_of(box)["user-data"]
        again = await box.submit("instance.add", name="web1", disks=[{"size": GIB}], cloud_init=SEED, key="one")
        assert (again.job, again.repeated) == (number, True)
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


def test_it_goes_and_is_renamed_with_its_instance() -> None:
    async def run() -> None:
        box = await cluster()
        await box.do("instance.add", name="web1", start=False, disks=[{"size": GIB}], cloud_init={})
        await box.do("instance.rename", "web1", new_name="www")
        assert seed_of(box, "www")
        await box.do("instance.remove", "www")
        assert box.master.state.store.all(Volume) == []
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize(
    "wrong",
    [
        {"user_data": "password: x"},
        {"user_data": "#" * ((512 << 10) + 1)},
        {"ssh_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----"]},
        {"ssh_keys": ["ssh-ed25519 AAAA\nssh-rsa BBBB"]},
        {"ssh_keys": [KEY], "meta_data": "public-keys: []\n"},
        {"userdata": "#!/bin/sh"},
    ],
)
def test_what_is_not_understood_is_refused_without_repeating_it(wrong: dict[str, Any]) -> None:
    async def run() -> None:
        box = await cluster()
        before = everything(box)
        with pytest.raises(InvalidInput) as refused:
            await box.do("instance.add", name="web1", cloud_init=wrong)
        assert "PRIVATE" not in str(refused.value)
        assert everything(box) == before
        await box.close()

    simulate(run)


def test_a_seed_sealed_for_another_instance_or_by_another_key_is_not_taken() -> None:
    async def run() -> None:
        box = await cluster()
        sealed = box.secrets.seal(b"{}", "cloud-init:web1")
        before = dump(box)
        for name, text in (("web2", sealed), ("web1", sealed[:-4] + "AAAA"), ("web1", "x")):
            with pytest.raises(Exception, match=r"sealed|damaged"):
                await box.do("instance.add", name=name, cloud_init={"sealed": text})
        await box.do("volume.create", name="web1-seed", pool="shared", size=GIB)
        with pytest.raises(AlreadyExists):
            await box.do("instance.add", name="web1", cloud_init={})
        await box.do("volume.delete", "web1-seed")
        assert dump(box) == before
        await box.close()

    simulate(run)
