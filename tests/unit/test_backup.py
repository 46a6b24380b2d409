"""``atoll cluster backup``: consistent, private, and of no use without the master key."""

from __future__ import annotations

import asyncio
import json
import tarfile
from pathlib import Path

import pytest

from atoll.master import backup as backups
from atoll.master.setup import init, read_keyring
from atoll.model.errors import InvalidInput
from atoll.model.objects import Group
from atoll.runtime.config import Config, dump, load
from atoll.store import image
from atoll.store.cache import LeaderStore
from atoll.store.sqlite import SqliteStore


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A cluster of one node in directories of its own."""
    made = Config(etc_dir=tmp_path / "etc", state_dir=tmp_path / "state", run_dir=tmp_path / "run", log_dir=tmp_path / "log", guest_user="")
    path = tmp_path / "etc" / "atoll.toml"
    path.parent.mkdir()
    path.write_text(dump(made))
    init("test", "node1", "127.0.0.1", path, "fake", {})
    return path


async def groups(leader: LeaderStore, count: int) -> None:
    for number in range(count):
        pair = [Group(id=f"group-{side}{number}", name=f"{side}{number}") for side in ("a", "b")]
        await leader.write(put=pair)
        await asyncio.sleep(0)


def test_it_is_consistent_while_the_master_writes(config: Path, tmp_path: Path) -> None:
    async def work() -> None:
        store = await SqliteStore.open(load(config).store_dir)
        leader = await LeaderStore.open(store)
        writing = asyncio.create_task(groups(leader, 200))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(backups.backup, config, str(tmp_path / "saved"))
        await writing
        await store.close()

    asyncio.run(work())
    manifest, parts = backups.read(tmp_path / "saved")
    found = image.unpack(parts["store"])
    # The cluster's own group has a longer, random id.
    ids = {key.removeprefix("groups/group-") for key in found if key.startswith("groups/group-") and len(key) < len("groups/group-") + 10}
    # Each transaction wrote two: whole or not at all.
    assert {i[1:] for i in ids if i.startswith("a")} == {i[1:] for i in ids if i.startswith("b")}
    assert manifest["cluster"] == "test"
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o600


def test_no_key_is_in_it(config: Path, tmp_path: Path) -> None:
    backups.backup(config, str(tmp_path / "saved"))
    content = (tmp_path / "saved").read_bytes()
    for name, text in read_keyring(load(config)).items():
        assert text.encode() not in content, name
        for line in text.splitlines():
            assert "-----" in line or line.encode() not in content, name


@pytest.mark.parametrize("harm", ["cut", "byte", "text", "newer"])
def test_a_damaged_one_is_refused(config: Path, tmp_path: Path, harm: str) -> None:
    saved = tmp_path / "saved"
    backups.backup(config, str(saved))
    content = saved.read_bytes()
    with tarfile.open(saved) as archive:
        at = archive.getmember("atoll-backup/store").offset_data
    if harm == "cut":
        saved.write_bytes(content[: at + 20])
    elif harm == "text":
        saved.write_text("not a backup")
    elif harm == "byte":
        saved.write_bytes(content[: at + 20] + bytes([content[at + 20] ^ 1]) + content[at + 21 :])
    else:
        saved.write_bytes(content.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(InvalidInput):
        backups.read(saved)


def test_without_the_right_master_key_nothing_is_touched(config: Path, tmp_path: Path) -> None:
    backups.backup(config, str(tmp_path / "saved"))
    key = load(config).etc_dir / "master.key"
    kept = key.read_text()
    before = sorted(str(path) for path in tmp_path.rglob("*"))

    def again(master_key: Path | None = None) -> None:
        backups.restore(config, tmp_path / "saved", (), master_key=master_key, node="", address="")

    key.unlink()
    with pytest.raises(InvalidInput, match="without the master key"):
        again()
    other = tmp_path / "other.key"
    from atoll.runtime.secrets import SecretBox

    SecretBox.load_or_create(other)
    with pytest.raises(InvalidInput, match="does not open this backup"):
        again(other)
    other.unlink()
    key.write_text(kept)
    key.chmod(0o600)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_it_is_restored_on_the_same_machine_and_everything_jumps(config: Path, tmp_path: Path) -> None:
    backups.backup(config, str(tmp_path / "saved"))
    lines = backups.restore(config, tmp_path / "saved", (), master_key=None, node="", address="")
    assert lines[0].startswith("The backup of cluster test is of")

    async def look() -> None:
        store = await SqliteStore.open(load(config).store_dir)
        leader = await LeaderStore.open(store)
        assert leader.term > 1_000_000
        assert leader.by_name(Group, "default")
        await store.close()

    asyncio.run(look())
    assert len(list((tmp_path / "state").glob("store.before-*"))) == 1
    assert json.loads((tmp_path / "state" / "masters.json").read_text())["masters"] == ["https://127.0.0.1:7770"]
    assert not (tmp_path / "state" / "store.new").exists()


def test_a_bare_store_is_restored_where_its_keys_are(config: Path, tmp_path: Path) -> None:
    from atoll.store.sqlite_file import backup as copy_database

    copy_database(load(config).store_dir / "atoll.db", tmp_path / "before-layout-1.db")
    backups.restore(config, tmp_path / "before-layout-1.db", (), master_key=None, node="", address="")
    assert len(list((tmp_path / "state").glob("store.before-*"))) == 1
