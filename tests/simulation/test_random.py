"""Random operations and faults against a reference model. What it finds is shrunk to the shortest story that fails.

``ATOLL_FAULT_STEPS`` is the number of steps in all; ``make faults`` sets it. Without it the same short run is made every time.
``ATOLL_FAULT_SEED`` makes a long run the same as another one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from simrandom import Walk, sizes

from atoll.model.objects import Instance, Volume
from atoll.model.units import GIB

pytestmark = pytest.mark.timeout(3600)
STEPS = int(os.environ.get("ATOLL_FAULT_STEPS", "0"))
SEED = int(os.environ.get("ATOLL_FAULT_SEED", "0"))
#: Steps of one story, and parts of a long run, which go side by side.
STORY, PARTS = 40, 8
NODES = st.sampled_from(["node1", "node2", "node3"])
SOME = st.integers(0, 7)
PAUSE = st.sampled_from([0.1, 1.0, 5.0, 12.0])
#: Seconds that pass after a step.
THEN = st.sampled_from([0.0, 0.0, 0.02, 0.1, 0.3, 0.6, 1.0, 3.0])
NEW = [f"vm{number}" for number in range(5)]


def step(**given: Any) -> Callable[[Any], Any]:
    """A rule after which some time passes."""

    def make(action: Callable[..., None]) -> Any:
        @functools.wraps(action)
        def act(self: Cluster, then: float, **chosen: Any) -> None:
            action(self, **chosen)
            self.here.do(self.here.wait(then))

        return rule(then=THEN, **given)(act)

    return make


class Cluster(RuleBasedStateMachine):
    """Operations, faults, and time."""

    walk: Walk | None = None

    @initialize(number=st.integers(0, 3), locking=st.booleans())
    def begin(self, number: int, locking: bool) -> None:
        self.walk = Walk(number, locking=locking)

    @property
    def here(self) -> Walk:
        assert self.walk is not None
        return self.walk

    def ask(self, operation: str, target: str = "", /, **fields: Any) -> None:
        self.here.do(self.here.ask(operation, target, **fields))

    def some(self, kind: type[Instance] | type[Volume], which: int) -> str:
        names = self.here.names(kind)
        return names[which % len(names)] if names else "nobody"

    # --- operations ---

    @step(name=st.sampled_from(NEW), pool=st.sampled_from(["shared", "shared", "local"]), disks=st.integers(0, 2), start=st.booleans())
    def add(self, name: str, pool: str, disks: int, start: bool) -> None:
        self.ask("instance.add", name=name, template=pool, disks=[{"size": GIB}] * disks, memory=GIB, start=start)

    @step(which=SOME, keep=st.booleans())
    def remove(self, which: int, keep: bool) -> None:
        self.ask("instance.remove", self.some(Instance, which), keep_disks=keep, timeout=1.0)

    @step(which=SOME, node=st.none() | NODES)
    def start(self, which: int, node: str | None) -> None:
        self.ask("instance.start", self.some(Instance, which), node=node)

    @step(which=SOME)
    def stop(self, which: int) -> None:
        self.ask("instance.stop", self.some(Instance, which), timeout=1.0)

    @step(which=SOME, node=st.none() | NODES)
    def migrate(self, which: int, node: str | None) -> None:
        self.ask("instance.migrate", self.some(Instance, which), node=node)

    @step(which=SOME, dead=st.booleans())
    def failover(self, which: int, dead: bool) -> None:
        # A person's word that a node is dead is refused for one that answers, and given here only for one that has no power.
        self.ask("instance.failover", self.some(Instance, which), node_is_dead=dead and self.here.no_power, timeout=1.0)

    @step(which=SOME, node=NODES)
    def move(self, which: int, node: str) -> None:
        self.ask("instance.move", self.some(Instance, which), node=node)

    @step(which=SOME, name=st.sampled_from(NEW))
    def rename(self, which: int, name: str) -> None:
        self.ask("instance.rename", self.some(Instance, which), new_name=name)

    @step(which=SOME, number=SOME)
    def modify(self, which: int, number: int) -> None:
        self.ask("instance.modify", self.some(Instance, which), memory=sizes(number))

    @step(which=SOME, hard=st.sampled_from(["hard", "full"]))
    def reboot(self, which: int, hard: str) -> None:
        self.ask("instance.reboot", self.some(Instance, which), type=hard)

    @step(which=SOME, index=st.integers(0, 2), number=SOME)
    def grow_disk(self, which: int, index: int, number: int) -> None:
        self.ask("instance.grow-disk", self.some(Instance, which), index=index, increment=sizes(number))

    @step(which=SOME)
    def add_disk(self, which: int) -> None:
        self.ask("instance.add-disk", self.some(Instance, which), disk={"size": GIB}, template="shared")

    @step(which=SOME, volume=SOME)
    def attach_disk(self, which: int, volume: int) -> None:
        self.ask("instance.attach-disk", self.some(Instance, which), volume=self.some(Volume, volume))

    @step(which=SOME, index=st.integers(0, 2), keep=st.booleans())
    def detach_disk(self, which: int, index: int, keep: bool) -> None:
        self.ask(f"instance.{'detach' if keep else 'remove'}-disk", self.some(Instance, which), index=index)

    @step(number=SOME)
    def create_volume(self, number: int) -> None:
        self.ask("volume.create", name=f"data{number}", pool="shared", size=sizes(number))

    @step(which=SOME)
    def delete_volume(self, which: int) -> None:
        self.ask("volume.delete", self.some(Volume, which))

    @step(which=SOME, number=SOME)
    def grow_volume(self, which: int, number: int) -> None:
        self.ask("volume.grow", self.some(Volume, which), increment=sizes(number))

    @step(which=SOME, number=SOME)
    def rename_volume(self, which: int, number: int) -> None:
        self.ask("volume.rename", self.some(Volume, which), new_name=f"data{number}")

    @step(node=NODES, verb=st.sampled_from(["evacuate", "migrate", "failover"]), to=st.none() | NODES)
    def move_all(self, node: str, verb: str, to: str | None) -> None:
        self.ask(f"node.{verb}", node, target=to, node_is_dead=verb == "failover" and self.here.no_power)

    @step(node=NODES, drained=st.booleans())
    def drain(self, node: str, drained: bool) -> None:
        self.ask("node.modify", node, drained=drained)

    @step(node=NODES, what=st.sampled_from(["nodes", "pool"]))
    def lock_much(self, node: str, what: str) -> None:
        """Operations that change nothing here, and want for themselves what many share."""
        if what == "nodes":
            self.ask("group.assign-nodes", "default", nodes=[node])
        else:
            self.ask("pool.check", "shared")

    @step(which=SOME, what=st.sampled_from(["cancel", "cancel", "resume", "undo"]))
    def steer(self, which: int, what: str) -> None:
        self.here.do(self.here.steer(what, which))

    # --- faults ---

    @step(who=st.sampled_from(["master", "agent", "both"]), node=NODES, pause=PAUSE)
    def crash(self, who: str, node: str, pause: float) -> None:
        self.here.do(self.here.crash(who, node, pause))

    @step(visits=st.integers(1, 40), who=st.sampled_from(["master", "agent", "both"]), pause=PAUSE)
    def arm(self, visits: int, who: str, pause: float) -> None:
        self.here.do(self.here.arm(visits, who, pause))

    @step(node=NODES, seconds=st.sampled_from([0.5, 4.0, 20.0, 200.0]))
    def cut(self, node: str, seconds: float) -> None:
        self.here.do(self.here.cut(node, seconds))

    @step(loss=st.sampled_from([0.0, 0.1]), doubled=st.sampled_from([0.0, 0.3]), slow=st.sampled_from([0.0, 0.2]), number=SOME)
    def bad_network(self, loss: float, doubled: float, slow: float, number: int) -> None:
        self.here.do(self.here.bad_network(loss, doubled, slow, number))

    @step(where=st.sampled_from(["guest", "storage"]), visits=st.integers(1, 8), times=st.sampled_from([1, 1, 30]))
    def failing(self, where: str, visits: int, times: int) -> None:
        self.here.do(self.here.failing(where, visits, times))

    @step(which=SOME, how=st.sampled_from(["kill", "power off"]))
    def lose_guest(self, which: int, how: str) -> None:
        self.here.do(self.here.lose_guest(which, how))

    @step(node=NODES)
    def power_cut(self, node: str) -> None:
        self.here.do(self.here.power_cut(node))

    @precondition(lambda self: self.here.no_power)
    @step()
    def power_on(self) -> None:
        self.here.do(self.here.power_on())

    @precondition(lambda self: self.here.no_power)
    @step(word=st.sampled_from(["node.declare-dead", "node.failover"]))
    def say_dead(self, word: str) -> None:
        for node in self.here.dead:
            self.ask(word, node, **({"node_is_dead": True} if word == "node.failover" else {}))

    @step(hours=st.sampled_from([1, -1, 24 * 365]))
    def jump(self, hours: int) -> None:
        self.here.do(self.here.jump(3600.0 * hours))

    @step()
    def depose(self) -> None:
        self.here.do(self.here.depose())

    # --- time, and what must hold ---

    @rule(seconds=st.sampled_from([10.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.here.do(self.here.wait(seconds))

    @rule()
    def quiesce(self) -> None:
        self.here.quiesce()

    @rule()
    def fail_over_master(self) -> None:
        self.here.fail_over_master()

    def teardown(self) -> None:
        if self.walk is None:
            return
        try:
            self.walk.quiesce()
        except BaseException as error:
            error.add_note("\n".join(self.walk.log[-60:]))
            raise
        finally:
            self.walk.close()


def play(steps: int, number: int) -> None:
    """``steps`` steps, the same ones for the same ``number``."""
    machine = seed(number)(type("SeededCluster", (Cluster,), {}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, steps // STORY),
            stateful_step_count=STORY,
            deadline=None,
            database=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.skipif(STEPS > 0, reason="the long run is made instead")
def test_short_run() -> None:
    play(200, 1)


@pytest.mark.skipif(STEPS == 0, reason="only in make faults: set ATOLL_FAULT_STEPS")
@pytest.mark.parametrize("part", range(PARTS))
def test_long_run(part: int) -> None:
    play(STEPS // PARTS, SEED * PARTS + part + 1000)
