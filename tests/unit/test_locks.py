"""The lock table: the same grants as the plain rule gives, and quickly with thousands of jobs that want the same things."""

from __future__ import annotations

import random
import time
from collections import defaultdict

import pytest

from atoll.jobs.locks import LockTable
from atoll.model.objects import Locks


class Plain:
    """The rule itself: a job waits for all who hold what it wants, or asked before; what both share does not count. A child of another job
    waits for holders only."""

    def __init__(self) -> None:
        self.wants: dict[int, tuple[Locks, int | None]] = {}
        self.granted: set[int] = set()

    def blockers(self, job: int) -> list[int]:
        locks, parent = self.wants[job]
        found = set()
        for other, (theirs, _) in self.wants.items():
            if other == job or not (other in self.granted or (other < job and parent is None)):
                continue
            if set(locks.exclusive) & {*theirs.shared, *theirs.exclusive} or set(locks.shared) & set(theirs.exclusive):
                found.add(other)
        return sorted(found)

    def grantable(self) -> list[int]:
        got = []
        for job in sorted(self.wants):
            if job not in self.granted and not self.blockers(job):
                self.granted.add(job)
                got.append(job)
        return got


@pytest.mark.parametrize("seed", range(60))
def test_it_grants_what_the_plain_rule_grants(seed: int) -> None:
    rng = random.Random(seed)
    table, plain = LockTable(), Plain()
    names = [f"volume:{n}" for n in range(rng.choice((2, 4, 8)))]
    free = list(range(1, 400))
    for _ in range(250):
        what = rng.random()
        if what < 0.5 or not plain.wants:
            # Not always a larger number: a job that queues again keeps its own.
            job = free.pop(0 if rng.random() < 0.8 else rng.randrange(min(5, len(free))))
            chosen = rng.sample(names, rng.randint(0, min(3, len(names))))
            alone = rng.randint(0, len(chosen))
            locks = Locks(exclusive=tuple(chosen[:alone]), shared=tuple(chosen[alone:]))
            parent = rng.choice([None, None, *[j for j in plain.wants if j < job]])
            table.add(job, locks, parent=parent)
            plain.wants[job] = (locks, parent)
        elif what < 0.9:
            job = rng.choice([*plain.wants])
            table.remove(job)
            plain.granted.discard(job)
            locks, parent = plain.wants.pop(job)
            if rng.random() < 0.2:
                table.add(job, locks, parent=parent)
                plain.wants[job] = (locks, parent)
        elif plain.granted:
            job = rng.choice(sorted(plain.granted))
            more = (rng.choice(names),)
            holders = [j for j in plain.granted if j != job and {*plain.wants[j][0].shared, *plain.wants[j][0].exclusive} & {*more}]
            assert table.extend(job, more) is (not holders)
            if not holders:
                locks, parent = plain.wants[job]
                plain.wants[job] = (
                    Locks(shared=tuple(r for r in locks.shared if r not in more), exclusive=tuple(sorted({*locks.exclusive, *more}))),
                    parent,
                )
        assert table.grantable() == plain.grantable()
        for job in plain.wants:
            assert table.blockers(job) == plain.blockers(job)
        for name in names:
            held = [j for j in plain.granted if name in {*plain.wants[j][0].shared, *plain.wants[j][0].exclusive}]
            assert table.holders(name) == sorted(held)


def test_a_child_does_not_wait_for_who_waits_for_its_parent() -> None:
    """An evacuation shares a node; somebody waits for that node and its group; a move of the evacuation shares the group."""
    table = LockTable()
    table.add(1, Locks(shared=("node:1",)))
    table.add(2, Locks(exclusive=("group:1", "node:1")))
    assert table.grantable() == [1]
    table.add(3, Locks(shared=("group:1",), exclusive=("instance:1",)), parent=1)
    assert table.grantable() == [3]
    table.remove(3)
    table.remove(1)
    assert table.grantable() == [2]


def test_a_child_waits_for_holders_though_its_parent_waits_again() -> None:
    table = LockTable()
    table.add(4, Locks(exclusive=("node:1",)), granted=True)
    table.add(2, Locks(shared=("node:1",)))
    table.add(3, Locks(shared=("node:1",)), parent=2)
    assert table.grantable() == []
    table.remove(4)
    assert table.grantable() == [2, 3]


def test_five_thousand_jobs_on_fifty_volumes_go_in_order_and_soon() -> None:
    """Each wants one to three volumes for itself and shares their pool; now and then one wants the whole pool."""
    rng = random.Random(1)
    table = LockTable()
    wanted: dict[int, list[str]] = {}
    for job in range(1, 5001):
        if job % 500 == 0:
            wanted[job] = ["pool"]
            table.add(job, Locks(exclusive=("pool",)))
        else:
            wanted[job] = sorted(rng.sample([f"volume:{n}" for n in range(50)], rng.randint(1, 3)))
            table.add(job, Locks(shared=("pool",), exclusive=tuple(wanted[job])))
    began = time.process_time()
    order: dict[str, list[int]] = defaultdict(list)
    running: list[int] = []
    ended = 0
    while True:
        for job in table.grantable():
            running.append(job)
            for resource in wanted[job]:
                order[resource].append(job)
        if not running:
            break
        # Whoever runs ends in any order.
        table.remove(running.pop(rng.randrange(len(running))))
        ended += 1
    assert ended == len(wanted), "every job had its turn"
    assert all(jobs == sorted(jobs) for jobs in order.values())
    assert time.process_time() - began < 10
