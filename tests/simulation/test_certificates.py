"""Certificates of a simulated cluster: renewed in time and by command, and a change of the CA through every crash."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import Striker, bounce_agents, bounce_master

from atoll.lab.box import Box, simulate
from atoll.master.authority import DAY, opened
from atoll.model.errors import AtollError, Forbidden, NodeUnavailable, TokenInvalid, WrongState
from atoll.model.objects import Authority, Cluster, Hold, Job, JobState, Node
from atoll.runtime import certs
from atoll.runtime.keeping import KeptInMemory


def node(box: Box, name: str) -> Node:
    return box.master.state.store.require(Node, box.nodes[name])


def used(box: Box, name: str) -> str:
    """The serial of the certificate that lies on the node."""
    return certs.serial(box.kept[name].read()[1])


def accepted(box: Box, serial: str) -> bool:
    try:
        box.master.node_of_serial(serial)
    except Forbidden:
        return False
    return True


def authorities(box: Box) -> list[Authority]:
    return box.master.state.store.all(Authority)


async def pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def whole(box: Box, *, left: tuple[str, ...] = ()) -> None:
    """One CA; every certificate is by it, fits its key, and is accepted; everybody trusts that CA alone."""
    await asyncio.sleep(40.0)
    (authority,) = authorities(box)
    assert authority.state == "current"
    assert box.master.state.cluster.ca_fingerprint == certs.fingerprint(authority.certificate)
    assert certs.same_key(authority.certificate, opened(box.secrets, authority).key_pem)
    for name, kept in box.kept.items():
        if name in left:
            continue
        ca, certificate, key = kept.read()
        assert certs.same_key(certificate, key), name
        assert certs.issued_by(certificate, authority.certificate), name
        assert ca == authority.certificate, name
        assert kept.next_key() is None, name
        if name != "master":
            assert accepted(box, certs.serial(certificate)), name
            assert node(box, name).previous_serial == "", name
    assert not box.master.state.store.all(Hold)
    assert [f for f in box.master.keeper.findings() if f.about not in left] == []


# --- renewal ---


def test_a_node_gets_a_new_key_and_the_old_certificate_is_refused() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        before = box.kept["node2"].read()
        await box.do("node.renew", "node2")
        after = box.kept["node2"].read()
        assert before[0] == after[0]
        assert before[1] != after[1]
        assert before[2] != after[2]
        assert accepted(box, used(box, "node2"))
        assert not accepted(box, certs.serial(before[1]))
        await whole(box)
        await box.close()

    simulate(story)


def test_certificates_are_renewed_by_themselves_months_before_they_end() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        first = {name: kept.read()[1] for name, kept in box.kept.items()}
        box.clock.offset += (certs.DAYS * 2 / 3 - 2) * DAY
        await pause(120)
        assert {name: kept.read()[1] for name, kept in box.kept.items()} == first
        box.clock.offset += 4 * DAY
        await pause(120)
        for name, kept in box.kept.items():
            assert kept.read()[1] != first[name], name
            assert certs.expires(kept.read()[1]) > box.clock.now() + (certs.DAYS - 1) * DAY
        jobs = [job for job in box.master.state.store.all(Job) if job.operation == "node.renew"]
        assert {job.who for job in jobs} == {"master"}
        assert len(jobs) == 3
        await whole(box)
        await box.close()

    simulate(story)


def test_a_node_that_cannot_be_renewed_is_told_of() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        box.cut.add("node3")
        await pause(10)
        box.clock.offset += (certs.DAYS - 10) * DAY
        await pause(120)
        found = {f.about: f for f in box.master.keeper.findings()}
        assert set(found) == {"node3"}
        assert "9 days" in found["node3"].what or "10 days" in found["node3"].what
        assert found["node3"].commands == ("atoll node token node3 --rejoin",)
        box.cut.clear()
        await pause(120)
        await whole(box)
        await box.close()

    simulate(story)


def test_a_renewal_that_never_arrives_shuts_nobody_out() -> None:
    """The new certificate is signed, but the node never gets it; again and again. What it uses stays good."""

    async def story() -> None:
        box = await Box.make(certificates=True)
        mine = used(box, "node2")

        async def lost(phase: str, where: str, call: Any) -> None:
            if call.method == "certificate.install" and phase == "request":
                raise WrongState("lost")

        box.link_fault = lost
        for _ in range(3):
            with pytest.raises(AtollError):
                await box.do("node.renew", "node2")
            assert accepted(box, mine)
        box.link_fault = None
        await box.do("node.renew", "node2")
        assert not accepted(box, mine)
        await whole(box)
        await box.close()

    simulate(story)


def test_all_are_renewed_by_one_command_and_the_silent_are_named() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        first = {name: kept.read()[1] for name, kept in box.kept.items()}
        await pause(5)
        await box.crash_agent("node3")
        await pause(10)
        found = await box.do("cluster.renew-certificates")
        assert found == {"renewed": ["node1", "node2"], "silent": ["node3"]}
        changed = {name for name, kept in box.kept.items() if kept.read()[1] != first[name]}
        assert changed == {"master", "node1", "node2"}
        await box.boot_agent("node3")
        await whole(box)
        await box.close()

    simulate(story)


# --- another CA ---


def test_the_ca_changes_and_the_storage_still_knows_the_cluster() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        await box.add_pool()
        (old,) = authorities(box)
        mark = box.master.state.identity
        result = await box.do("cluster.rotate-ca")
        (new,) = authorities(box)
        assert (result["fingerprint"], result["left_behind"]) == (certs.fingerprint(new.certificate), [])
        assert new.id != old.id
        assert new.number == 2
        assert box.master.state.identity == mark != box.master.state.cluster.ca_fingerprint
        await box.do("instance.add", name="web1", template="shared", disks=[{"size": 1 << 30}], memory=1 << 28)
        await whole(box)
        await box.close()

    simulate(story)


def points() -> list[str]:
    """The fault points of a change of the CA, in order."""

    async def story() -> list[str]:
        box = await Box.make(nodes=2, certificates=True)
        with Striker(box) as striker:
            await box.do("cluster.rotate-ca")
        await box.close()
        return [name for name in striker.seen if "rotate-ca" in name or "certificate." in name]

    return list(dict.fromkeys(simulate(story)))


POINTS = points()


def test_there_are_points() -> None:
    assert len(POINTS) > 40
    assert any(name.startswith("agent:certificate.install") for name in POINTS)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("who", ["master", "agents", "both"])
def test_it_goes_on_after_a_crash_at_every_point(who: str, part: int) -> None:
    for name in POINTS[part::4]:

        async def story(name: str = name) -> None:
            box = await Box.make(nodes=2, certificates=True)

            async def crash(box: Box, point: str) -> None:
                async def fall() -> None:
                    if who != "master":
                        await bounce_agents(box, list(box.agents))
                    if who != "agents":
                        await bounce_master(box)

                task = asyncio.ensure_future(fall())
                striker.tasks.add(task)
                task.add_done_callback(striker.tasks.discard)
                await asyncio.sleep(0.2)

            striker = Striker(box, name, crash)
            with striker:
                submission = await box.submit("cluster.rotate-ca")
                assert submission.job
                job = await box.end_of(submission.job)
                await striker.settle()
            assert striker.struck, name
            assert job.state is JobState.DONE, (name, job.error, job.reason)
            await whole(box)
            await box.close()

        simulate(story)


def test_a_cancel_before_the_switch_takes_all_back() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        before = {name: kept.read() for name, kept in box.kept.items()}

        async def cut(phase: str, where: str, call: Any) -> None:
            if call.method == "certificate.trust" and where == "node3" and not call.undo:
                await box.master.cancel_job(call.job)
                raise WrongState("not now")

        box.link_fault = cut
        with pytest.raises(AtollError):
            await box.do("cluster.rotate-ca")
        box.link_fault = None
        await whole(box)
        assert {name: kept.read() for name, kept in box.kept.items()} == before
        await box.close()

    simulate(story)


def test_a_node_that_was_away_comes_back_by_a_token() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        box.cut.add("node3")
        await pause(10)
        with pytest.raises(NodeUnavailable, match="node3"):
            await box.do("cluster.rotate-ca")
        result = await box.do("cluster.rotate-ca", leave_behind=True)
        assert result["left_behind"] == ["node3"]
        await whole(box, left=("node3",))
        old = used(box, "node3")
        # A real transport would refuse it now; the token is for a node that is silent, and it works once.
        token = await box.master.join_token("node3", None, True)
        key, csr = certs.make_key_and_csr("node3", ["127.0.0.1"])
        answer = await box.master.join(token, "node3", "127.0.0.1", 7771, csr)
        assert answer.node == box.nodes["node3"]
        box.kept["node3"].save(answer.ca, answer.certificate, key)
        with pytest.raises(TokenInvalid):
            await box.master.join(token, "node3", "127.0.0.1", 7771, csr)
        box.cut.clear()
        await pause(10)
        assert not accepted(box, old)
        with pytest.raises(AtollError, match="answers"):
            await box.master.join_token("node3", None, True)
        await whole(box)
        await box.close()

    simulate(story)


def test_one_that_falls_silent_past_the_switch_waits_for_a_person() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)

        async def cut(phase: str, where: str, call: Any) -> None:
            if call.method == "certificate.install" and where == "node3":
                box.cut.add("node3")

        box.link_fault = cut
        submission = await box.submit("cluster.rotate-ca")
        assert submission.job
        job = await box.end_of(submission.job)
        assert job.state is JobState.NEEDS_ATTENTION
        assert "node3" in job.reason
        # Everybody else goes on meanwhile: both CAs are trusted.
        assert len(authorities(box)) == 2
        assert any("declare-dead node3" in command for command in job.commands)
        await box.do("node.declare-dead", "node3")
        await box.master.resume_job(submission.job)
        job = await box.end_of(submission.job)
        assert job.state is JobState.DONE
        assert job.result["left_behind"] == ["node3"]
        await whole(box, left=("node3",))
        await box.close()

    simulate(story, limit=20_000)


def test_a_node_that_joins_meanwhile_is_not_forgotten() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        joined: list[str] = []

        async def join(box: Box, point: str) -> None:
            token = await box.master.join_token(f"new{len(joined)}", None)
            key, csr = certs.make_key_and_csr(f"new{len(joined)}", ["127.0.0.1"])
            answer = await box.master.join(token, f"new{len(joined)}", "127.0.0.1", 7771, csr)
            name = f"new{len(joined)}"
            joined.append(name)
            box.nodes[name] = answer.node
            pair = certs.KeyPair(answer.certificate, key)
            box.kept[name] = KeptInMemory(answer.ca, pair)
            await box.boot_agent(name)

        with Striker(box, "agent:certificate.trust:before", join, times=3):
            await box.do("cluster.rotate-ca")
        assert len(joined) == 3
        await whole(box)
        await box.close()

    simulate(story)


def test_a_store_from_before_a_renewal_accepts_what_the_ca_has_signed_since() -> None:
    async def story() -> None:
        box = await Box.make(certificates=True)
        before = node(box, "node2")
        await pause(5)
        await box.do("node.renew", "node2")
        new = certs.serial(box.kept["node2"].read()[1])
        issued = certs.issued(box.kept["node2"].read()[1])
        await box.master.state.store.write(put=[before])  # as a backup has it
        with pytest.raises(Forbidden):
            box.master.node_of_serial(new)
        assert box.master.node_of_serial(new, before.id, issued) == before.id
        with pytest.raises(Forbidden):
            box.master.node_of_serial("abc", before.id, before.certificate_issued)
        with pytest.raises(Forbidden):
            box.master.node_of_serial("abc", "node-00000000000000099", issued)
        await box.close()

    simulate(story)


def test_masters_that_lead_later_have_the_ca_of_the_store() -> None:
    """A candidate's files are from before the change; what it leads with is in the store."""

    async def story() -> None:
        box = await Box.make(certificates=True)
        old = box.kept["master"].read()
        await box.do("cluster.rotate-ca")
        await box.crash_master()
        box.kept["master"].save(*old)
        await box.boot_master()
        await whole(box)
        assert box.master.state.store.require(Cluster, "cluster").identity
        await box.close()

    simulate(story)
