"""The Ceph user that makes the users of volumes: it can do that, and nothing else, whatever it is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.lab.smallceph import missing
from atoll.model.errors import PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.storage import registry
from atoll.storage.contract import FencingPool, SnapshotPool, VolumeSpec
from atoll.storage.rbd import mintcaps
from ceph_support import Ceph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("storage-rbd"),
    pytest.mark.skipif(bool(missing()), reason="Ceph is not installed"),
]
MIB = 1 << 20
VOLUME, COPY = "vol-" + "1" * 17, "vol-" + "2" * 17
SNAP = "snap-" + "a" * 17
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "adopt-a-ceph-cluster.md"
DENIED = -13


class Mint:
    """A pool whose managing user may make no users, and the minter's own connection to the monitors."""

    def __init__(self, ceph: Ceph, run_dir: Path) -> None:
        import rados

        self.ceph = ceph
        given = ceph.pool_ref("mint", isolation="volume")
        word = given.options["pool"]
        mon = 'profile rbd, allow command "osd blocklist" with blocklistop=rm'
        manager = ceph.user(f"client.{word}-manager", mon=mon, osd=f"profile rbd pool={word}")
        keyring = ceph.user(f"client.{word}-minter", mon=mintcaps.mon_caps((word,)))
        options = {**given.options, "user": f"{word}-manager", "keyring": str(manager)}
        options |= {"mint_user": f"{word}-minter", "mint_keyring": str(keyring)}
        self.ref = PoolRef(id=given.id, name="mint", driver="rbd", options=options, node="node1", cluster="c")
        self.pool: Any = registry.pool(self.ref)
        self.pool.prepare(create=True)
        self.word = word
        self.cluster = rados.Rados(conffile=str(ceph.conf), rados_id=f"{word}-minter", conf={"keyring": str(keyring)})
        self.cluster.connect(timeout=10)

    def ask(self, prefix: str, **arguments: Any) -> int:
        code, _, _ = self.cluster.mon_command(json.dumps({"prefix": prefix, **arguments}), b"", timeout=15)
        return int(code)

    def rights(self, **changed: str | None) -> list[str]:
        """Good ones for a volume's user, but for what is changed; None leaves a part out."""
        osd = f'allow rwx pool={self.word} namespace="" object_prefix rbd_header.1234'
        wanted: dict[str, str | None] = {"mon": mintcaps.MON, "osd": osd, "mgr": mintcaps.MGR, "mds": mintcaps.MDS, **changed}
        return [word for part, words in wanted.items() if words is not None for word in (part, words)]


@pytest.fixture(scope="module")
def mint(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mint]:
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("run")
        patch.setenv("ATOLL_RUN_DIR", str(place))
        made = Mint(ceph, place)
        yield made
        made.cluster.shutdown()


def test_volumes_and_clones_get_users_by_the_minter_and_lose_them(mint: Mint) -> None:
    """With all that an image needs: of itself, and of what it was made from."""
    assert isinstance(mint.pool, FencingPool)
    assert isinstance(mint.pool, SnapshotPool)
    image = mint.pool.create(VolumeSpec(volume=VOLUME, name="web", size=8 * MIB))
    taken = mint.pool.snapshot(image, SNAP)
    copy = mint.pool.clone(VolumeSpec(volume=COPY, name="copy", size=8 * MIB), taken.logical_id)
    for name, volume in ((image, VOLUME), (copy, COPY)):
        connection = mint.pool.connection(name, volume, 8 * MIB, "node2")
        attached = registry.connector("rbd").attach(connection, "userspace")
        assert attached.secrets
        user = f"client.{connection.data['user']}"
        assert user == f"client.atoll-node2.{volume}"
        assert mint.ceph.ask("auth", "get", user)[0]["caps"]["mgr"] == mintcaps.MGR
        # Again, and after a change of rights.
        mint.pool.connection(name, volume, 8 * MIB, "node2")
        mint.ceph.run("ceph", "auth", "caps", user, "mon", "allow r")
        mint.pool.connection(name, volume, 8 * MIB, "node2")
        mint.pool.revoke(volume, "node2")
        assert user not in mint.ceph.run("ceph", "auth", "ls")


GOOD = "client.atoll-node1.vol-" + "7" * 17


def test_the_minter_can_do_nothing_else(mint: Mint) -> None:
    assert mint.ask("auth get-or-create", entity=GOOD, caps=mint.rights()) == 0, "what it is for"
    every = f"allow rwx pool={mint.word}"
    bad: list[dict[str, str | None]] = [
        {"mon": "allow *"},
        {"mon": "allow r, allow *"},
        {"mgr": "allow *"},
        {"mds": "allow *"},
        # What is left out could be filled with anything another time, or is the whole of something.
        {"mgr": None},
        {"mds": None},
        {"osd": None},
        {"osd": "allow *"},
        {"osd": every},
        {"osd": f'{every} namespace="" object_prefix rbd_'},
        {"osd": f'{every} namespace="" object_prefix rbd_header.'},
        {"osd": f'{every} namespace="" object_prefix rbd_header.12, allow *'},
        {"osd": f'allow *, {every} namespace="" object_prefix rbd_header.12'},
        {"osd": f'{every}other namespace="" object_prefix rbd_header.12'},
        {"osd": f"profile rbd pool={mint.word}"},
        {"osd": 'allow rwx pool=.mgr namespace="" object_prefix rbd_header.12'},
        {"osd": f'allow rwx pool={mint.word} namespace="" object_prefix atoll_pool'},
    ]
    for changed in bad:
        for command in ("auth get-or-create", "auth caps"):
            assert mint.ask(command, entity=GOOD, caps=mint.rights(**changed)) == DENIED, (command, changed)
    others = [
        "client.admin",
        f"client.{mint.word}-minter",
        f"client.{mint.word}-manager",
        "client.atoll-node1",
        "client.atoll-x",
        "osd.0",
        "mon.",
    ]
    for entity in [*others, f"{GOOD}0", f"x{GOOD}", "client.other.vol-" + "7" * 17]:
        for command in ("auth get-or-create", "auth caps"):
            assert mint.ask(command, entity=entity, caps=mint.rights()) == DENIED, (command, entity)
        assert mint.ask("auth del", entity=entity) == DENIED, entity
    # No keys of others, no other way to make users, and nothing of Ceph itself.
    for command, arguments in {
        "auth ls": {},
        "auth get": {"entity": GOOD},
        "auth get-key": {"entity": "client.admin"},
        "auth export": {},
        "auth add": {"entity": GOOD, "caps": mint.rights()},
        "auth import": {},
        "auth get-or-create-key": {"entity": GOOD, "caps": mint.rights()},
        "osd blocklist": {"blocklistop": "add", "addr": "10.0.0.1:0/1"},
        "osd blocklist ls": {},
        "osd pool rm": {"pool": mint.word, "pool2": mint.word, "yes_i_really_really_mean_it": True},
        "osd pool ls": {},
        "osd out": {"ids": ["0"]},
        "config set": {"who": "global", "name": "debug_osd", "value": "1"},
        "config-key set": {"key": "x", "val": "y"},
        "status": {},
    }.items():
        assert mint.ask(command, **arguments) == DENIED, command
    assert mint.ask("auth del", entity=GOOD) == 0


def test_the_minter_has_nothing_to_show_to_anybody_but_the_monitors(mint: Mint) -> None:
    found = mint.ceph.ask("auth", "get", f"client.{mint.word}-minter")[0]["caps"]
    assert found == {"mon": mintcaps.mon_caps((mint.word,))}


def test_without_the_minter_the_managing_user_makes_none(mint: Mint) -> None:
    options = {key: value for key, value in mint.ref.options.items() if not key.startswith("mint_")}
    pool: Any = registry.pool(mint.ref.model_copy(update={"options": options}))
    image = mint.pool.create(VolumeSpec(volume="vol-" + "3" * 17, name="other", size=8 * MIB))
    with pytest.raises(PoolUnavailable, match="cannot make the Ceph user"):
        pool.connection(image, "vol-" + "3" * 17, 8 * MIB, "node2")


def test_the_docs_show_these_rights() -> None:
    found = re.search(r"<<'CAPS'\n(.*?)\nCAPS", HOWTO.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == mintcaps.mon_caps(("vms",))
