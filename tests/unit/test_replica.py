"""A candidate's copy of the store on disk: whole at every moment, whatever comes late, twice, damaged, or is cut off in the middle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.agent.replica import Change, Replica
from atoll.model.errors import AtollError, Conflict, NotFound, StaleTerm
from atoll.model.messages import ReplicaState
from atoll.runtime import files


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def base(replica: Replica, stream: int, number: int, *parts: bytes, sha256: str = "") -> ReplicaState:
    about = {"sha256": sha256 or sha(b"".join(parts)), "at": 5.0, "master": "m"}
    for index, part in enumerate(parts):
        state = replica.part(stream, number, index, len(parts), part, about)
    return state


def change(after: int, number: int) -> tuple[Change, str]:
    data = b"change %d\nof it" % number
    return Change(number, after, data, float(number)), sha(data)


def numbers(replica: Replica) -> list[int]:
    return [found.number for found in replica.read()[2]]


def test_a_base_and_changes_are_there_after_opening_again(tmp_path: Path) -> None:
    replica = Replica(tmp_path / "r")
    with pytest.raises(NotFound, match="is not there"):
        replica.read()
    base(replica, 3, 10, b"one", b"two")
    assert replica.append(3, [change(10, 11), change(11, 15)]).number == 15
    state, body, changes = Replica(tmp_path / "r").read()
    assert (state.stream, state.number, state.at, state.master, body) == (3, 15, 15.0, "m", b"onetwo")
    assert [(c.number, c.after, c.data) for c in changes] == [(11, 10, b"change 11\nof it"), (15, 11, b"change 15\nof it")]
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "r").iterdir())


def test_late_and_doubled_changes_have_no_effect_and_a_gap_shows(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    base(replica, 3, 10, b"x")
    replica.append(3, [change(10, 11), change(11, 12)])
    assert replica.append(3, [change(10, 11)]).number == 12
    assert replica.append(3, [change(13, 14)]).number == 12
    assert replica.append(3, [change(11, 12), change(12, 13)]).number == 13
    assert base(replica, 3, 10, b"an old base, late").number == 13
    assert numbers(replica) == [11, 12, 13]
    assert replica.append(4, [change(13, 14)]).stream == 3


def test_an_older_master_is_refused(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    base(replica, 3, 10, b"x")
    base(replica, 4, 2, b"y")
    assert Replica(tmp_path).state.number == 2
    with pytest.raises(StaleTerm):
        replica.append(3, [change(2, 3)])
    with pytest.raises(StaleTerm):
        base(replica, 3, 99, b"z")


def test_damage_on_the_way_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    base(replica, 3, 10, b"x")
    with pytest.raises(Conflict):
        base(replica, 3, 20, b"y", sha256=sha(b"other"))
    with pytest.raises(Conflict):
        replica.part(3, 20, 1, 2, b"y", {"sha256": "", "at": 0.0, "master": ""})
    good, _ = change(10, 11)
    with pytest.raises(Conflict):
        replica.append(3, [(good, sha(b"other"))])
    assert Replica(tmp_path).state.number == 10


def test_a_log_cut_off_anywhere_counts_up_to_the_last_whole_change(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    base(replica, 3, 10, b"x")
    ends = [replica.state.log_size]
    for number in (11, 12, 13):
        ends.append(replica.append(3, [change(number - 1, number)]).log_size)
    whole = (tmp_path / "log").read_bytes()
    assert ends[-1] == len(whole)
    for length in range(len(whole) + 1):
        (tmp_path / "log").write_bytes(whole[:length])
        again = Replica(tmp_path)
        good = sum(end <= length for end in ends[1:])
        assert again.state.number == 10 + good, length
        # What comes next is not put behind the torn end.
        assert again.append(3, [change(10 + good, 14)]).number == 14
        assert Replica(tmp_path).state.number == 14


def test_a_byte_that_has_changed_ends_the_log_there(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    base(replica, 3, 10, b"x")
    replica.append(3, [change(10, 11), change(11, 12)])
    whole = bytearray((tmp_path / "log").read_bytes())
    at = whole.index(b"change 12")
    whole[at] ^= 1
    (tmp_path / "log").write_bytes(bytes(whole))
    assert numbers(Replica(tmp_path)) == [11]
    body = bytearray((tmp_path / "base").read_bytes())
    body[-1] ^= 1
    (tmp_path / "base").write_bytes(bytes(body))
    assert Replica(tmp_path).state.stream == 0
    with pytest.raises(NotFound, match="is damaged"):
        Replica(tmp_path).read()


def test_what_is_acknowledged_has_been_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(tmp_path)
    calls: list[tuple[str, str]] = []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(handle: int, *rest: Any) -> Any:
            calls.append((name, Path(os.readlink(f"/proc/self/fd/{handle}")).name))
            return real(handle, *rest)

        monkeypatch.setattr(os, name, call)

    base(replica, 3, 10, b"x")
    noted("write")
    noted("fsync")
    replica.append(3, [change(10, 11)])
    assert calls == [("write", "log"), ("fsync", "log")]


class PowerCut(BaseException):
    """From here on nothing reaches the disk."""


@pytest.mark.parametrize("step", range(40))
def test_power_lost_at_each_call_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Before the call that would be the ``step``-th, nothing happens any more; what was acknowledged must be there."""
    replica = Replica(tmp_path / "r")
    base(replica, 3, 10, b"x")
    acknowledged = replica.append(3, [change(10, 11)]).number
    left = step

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left <= 0:
                raise PowerCut
            left -= 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "open", "ftruncate"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(files, "fsync_dir", counted(files.fsync_dir))
        try:
            acknowledged = replica.append(3, [change(11, 12), change(12, 13)]).number
            acknowledged = base(replica, 3, 20, b"the", b"new").number
            acknowledged = replica.append(3, [change(20, 21)]).number
        except (PowerCut, AtollError):
            pass
    state, body, changes = Replica(tmp_path / "r").read()
    assert state.number >= acknowledged
    assert body == (b"thenew" if state.number >= 20 else b"x")
    first = 20 if state.number >= 20 else 10
    assert [c.after for c in changes] == [first, *(c.number for c in changes)][: len(changes)]
    Replica(tmp_path / "r").forget()
    assert not (tmp_path / "r").exists()
    Replica(tmp_path / "r").forget()
