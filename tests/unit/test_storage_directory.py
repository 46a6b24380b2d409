"""Whose a directory is, and which mount it lies on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from atoll.model.errors import Conflict, InvalidInput, PoolUnavailable
from atoll.model.messages import PoolRef
from atoll.model.places import lies_in
from atoll.storage import registry
from atoll.storage.contract import PoolDriver
from atoll.storage.files import directory, marker, mountinfo
from atoll.storage.files import pool as files_pool

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /srv/a\040b\134c rw,nosuid shared:9 master:3 - nfs4 server:/x\040y rw
31 22 0:4 net:[4026532281] /run/netns/x rw - nsfs nsfs rw
"""


def made(path: Path | str, ident: str = "pool-a", driver: str = "file", cluster: str = "c", **options: str) -> PoolDriver:
    ref = PoolRef(id=ident, name=ident[-1], driver=driver, options={"path": str(path), **options}, node="node1", cluster=cluster)
    return registry.pool(ref)


def test_the_kernels_list_of_mounts_is_read() -> None:
    found = mountinfo.parse(MOUNTS)
    assert found["30"] == mountinfo.Mount("30", "/srv/a b\\c", "nfs4")
    assert (found["22"].point, found["31"].fstype) == ("/", "nsfs")


def test_an_open_directory_knows_its_mount() -> None:
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert mountinfo.mount_of(fd).point == "/proc"
        assert mountinfo.mount_of(fd).fstype == "proc"
    finally:
        os.close(fd)


@pytest.mark.parametrize("below", ["", "/pool", "/a/../pool", "/./pool/"])
def test_a_directory_that_operators_read_is_no_pools(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_pool, "OPEN_DIRECTORY", str(tmp_path / "images"))
    for name in ("images/pool", "images/a", "images-too"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InvalidInput, match="operators may take images from") as refused:
        made(f"{tmp_path}/images{below}").prepare(create=True)
    assert "another directory" in refused.value.hint
    assert not list(tmp_path.rglob(".atoll-pool"))
    # Nor by way of a link; a name that only begins so is fine.
    (tmp_path / "link").symlink_to(tmp_path / "images/pool")
    with pytest.raises(InvalidInput, match="operators"):
        made(tmp_path / "link").prepare(create=True)
    assert made(tmp_path / "images-too").prepare(create=True).ok


def test_what_lies_in_a_directory() -> None:
    assert lies_in("/a/b", "/a/b")
    assert lies_in("//a//b/c/", "/a/b")
    assert not lies_in("/a/b/../bc", "/a/b")


def test_the_mark_says_whose_and_where(tmp_path: Path) -> None:
    assert made(tmp_path).prepare(create=True).ok
    mark = json.loads((tmp_path / ".atoll-pool").read_text())
    fd = os.open(tmp_path, os.O_RDONLY)
    mount = mountinfo.mount_of(fd)
    os.close(fd)
    assert mark == {"pool": "pool-a", "cluster": "c", "name": "a", "mount": mount.point, "fstype": mount.fstype}
    assert os.listdir(tmp_path) == [".atoll-pool"]


def test_another_cluster_is_named(tmp_path: Path) -> None:
    made(tmp_path).prepare(create=True)
    with pytest.raises(Conflict, match=r"belongs to pool a \(pool-a\) of another cluster"):
        made(tmp_path, "pool-b", cluster="d").prepare(create=True)
    with pytest.raises(Conflict, match=r"belongs to pool a \(pool-a\)$"):
        made(tmp_path, "pool-b").volumes()


def test_of_two_pools_that_mark_at_once_one_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, first = os.link, []

    def slow(*args: Any, **kwargs: Any) -> None:
        if not first:
            first.append(True)
            made(tmp_path, "pool-b").prepare(create=True)
        real(*args, **kwargs)

    monkeypatch.setattr(marker.os, "link", slow)
    with pytest.raises(Conflict, match="belongs to pool b"):
        made(tmp_path).prepare(create=True)
    assert os.listdir(tmp_path) == [".atoll-pool"]


def test_a_file_system_without_hard_links_is_marked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(marker.os, "link", refused)
    assert made(tmp_path).prepare(create=True).ok


def test_what_is_no_mark_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    made(tmp_path / "elsewhere").prepare(create=True)
    mark = tmp_path / ".atoll-pool"
    for plant in (
        lambda: mark.write_text("not json"),
        lambda: mark.write_text('["pool-a"]'),
        lambda: mark.write_text(""),
        lambda: mark.symlink_to("elsewhere/.atoll-pool"),
        lambda: os.mkfifo(mark),
    ):
        plant()
        with pytest.raises(Conflict, match="not the mark of a pool"):
            made(tmp_path).prepare(create=True)
        assert not made(tmp_path).check().ok
        mark.unlink()


def test_forget_leaves_another_pools_mark_and_probe(tmp_path: Path) -> None:
    pool = made(tmp_path)
    pool.prepare(create=True)
    pool.probe_writers("look")
    made(tmp_path, "pool-b").forget()
    assert sorted(os.listdir(tmp_path)) == [".atoll-pool", ".atoll-probe"]
    pool.forget()
    assert os.listdir(tmp_path) == []


def test_a_shared_pool_needs_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "mount_of", lambda fd: mountinfo.Mount("1", "/", "ext4"))
    with pytest.raises(PoolUnavailable, match="lies on the root file system"):
        made(tmp_path, driver="sharedfile").prepare(create=True)
    assert os.listdir(tmp_path) == []
    assert made(tmp_path, driver="sharedfile", mount="none").prepare(create=True).ok
    assert made(tmp_path / "x", driver="file").check().reason
    monkeypatch.setattr(directory, "mount_of", lambda fd: mountinfo.Mount("2", "/srv", "nfs4"))
    assert made(tmp_path, driver="sharedfile").check().ok
    with pytest.raises(PoolUnavailable, match="must be on /mnt/share, which is not mounted"):
        made(tmp_path, driver="sharedfile", mount="/mnt/share").volumes()
    assert made(tmp_path, driver="sharedfile", mount="/srv/").check().ok


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": ""}, "not absolute"),
        ({"path": "relative/x"}, "not absolute"),
        ({"mount": "srv"}, "auto, none or an absolute path"),
        ({"locking": "maybe"}, "locking is one of on, off"),
        ({"preallocation": "lots"}, "preallocation is one of off, falloc, full"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, str], words: str) -> None:
    for driver in [d.name for d in registry.drivers() if any(o.name == "path" for o in d.options)]:
        ref = PoolRef(id="pool-a", name="a", driver=driver, options={"path": str(tmp_path), **options}, node="node1")
        with pytest.raises(InvalidInput, match=words):
            registry.pool(ref).prepare(create=True)
        assert words.split()[0] in registry.pool(ref).check().reason
    assert os.listdir(tmp_path) == []


def test_the_mirror_makes_nothing_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PoolUnavailable, match="No such file"):
        made(tmp_path / "gone", driver="fakemirror").prepare(create=True)
    with pytest.raises(PoolUnavailable):
        made(tmp_path, driver="fakemirror", mount="/mnt/share").prepare(create=True)
    assert os.listdir(tmp_path) == []
