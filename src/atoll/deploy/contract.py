"""What a kind of storage cluster brings: its options, a planner, and the steps that agents carry out.

The planner is pure and runs on the master. It says what shall be where, and in which phases: all steps of a phase may run at the same
time, and the next phase begins when they have ended. Every step is idempotent, and has an undo that succeeds when nothing is there.
Secrets are in the arguments of steps only, never in those of an undo and never in results: the journal keeps these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from atoll.model.messages import Progress
from atoll.storage.contract import Option

#: A step as an agent carries it out: arguments, and whom to tell how far it is; a JSON-able result.
Step = Callable[[dict[str, Any], Callable[[Progress], None]], Awaitable[Any]]


class KindInfo(BaseModel):
    """A kind of storage cluster, as data."""

    model_config = ConfigDict(frozen=True)
    name: str
    description: str
    options: tuple[Option, ...] = ()


class Member(BaseModel):
    """A node as planners see it. ``options``: the cluster's, overridden by its group's and its own."""

    model_config = ConfigDict(frozen=True)
    id: str
    name: str
    address: str
    #: Whether it manages storage for the whole cluster.
    controller: bool = False
    #: Whether it belongs to the group that becomes the storage cluster; others are clients.
    inside: bool = True
    options: dict[str, str] = Field(default_factory=dict)


class Facts(BaseModel):
    """What a node says of itself before anything is done. ``problems``: everything that stands against it."""

    model_config = ConfigDict(extra="ignore")
    problems: list[str] = Field(default_factory=list)
    version: str = ""
    hostname: str = ""
    #: Its clock when it answered, in seconds since 1970.
    clock: float = 0.0
    addresses: list[str] = Field(default_factory=list)
    #: Device -> size in bytes.
    disks: dict[str, int] = Field(default_factory=dict)


class Planned(BaseModel):
    """A step of a plan: on which node (id), which of the kind's steps, with what, and how it is undone."""

    model_config = ConfigDict(frozen=True)
    key: str
    node: str
    step: str
    args: dict[str, Any] = Field(default_factory=dict)
    undo: str = ""
    undo_args: dict[str, Any] = Field(default_factory=dict)
    deadline: float = 120.0
    #: What people read while it runs.
    text: str = ""


class Preview(BaseModel):
    """A plan in words: what will be where, what the cluster survives, and what stops it."""

    lines: list[str] = Field(default_factory=list)
    survives: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


Results = Mapping[str, Any]


class Planner(Protocol):
    """The master's half of a kind. Pure: the same arguments give the same answer."""

    def check_options(self, options: Mapping[str, str]) -> None:
        """Errors: InvalidInput names the option and what it takes."""

    def name_of(self, options: Mapping[str, str]) -> str:
        """The storage cluster's name."""

    def questions(self, members: list[Member], layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Node id -> arguments of its preflight. ``layout``: that of the cluster which they join; empty for a new one."""

    def objections(self, members: list[Member], facts: Mapping[str, Facts]) -> list[str]:
        """What nodes' facts, taken together, stand against: versions that differ, names that are equal."""

    def layout(self, members: list[Member], facts: Mapping[str, Facts], uuid: Callable[[], str]) -> dict[str, Any]:
        """What a new cluster shall consist of. Errors: InvalidInput. ``facts`` may be empty, for a preview."""

    def preview(self, layout: Mapping[str, Any]) -> Preview:
        """It in words."""

    def roles(self, layout: Mapping[str, Any]) -> dict[str, list[str]]:
        """Node (name) -> its roles."""

    def tellers(self, layout: Mapping[str, Any]) -> list[str]:
        """The nodes (names) that can tell how the cluster is."""

    def secrets(self, layout: Mapping[str, Any]) -> dict[str, str]:
        """New keys for everything in the layout. Not pure, for once."""

    def make(self, members: list[Member], layout: dict[str, Any], secrets: Mapping[str, str], results: Results) -> Iterator[list[Planned]]:
        """The phases that make it. ``results``: key -> result of the steps of earlier phases, filled in between by the caller."""

    def grown(
        self, layout: Mapping[str, Any], members: list[Member], facts: Mapping[str, Facts], uuid: Callable[[], str]
    ) -> dict[str, Any]:
        """The layout with those members of the group that are not in it yet. Errors: InvalidInput."""

    def more_secrets(self, layout: Mapping[str, Any], grown: Mapping[str, Any]) -> dict[str, str]:
        """New keys for what has come. Not pure."""

    def grow(
        self,
        members: list[Member],
        layouts: tuple[Mapping[str, Any], Mapping[str, Any]],
        secrets: Mapping[str, str],
        results: Results,
        teller: str,
    ) -> Iterator[list[Planned]]:
        """The phases that lead from the first layout to the second, while clients go on. ``teller``: the id of a node that can tell."""

    def enter(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]], results: Results, teller: str) -> list[list[Planned]]:
        """The phases after the commit of ``grow``, in which what is new gets its data; before, nothing may be on it."""

    def disk_questions(self, member: Member, layout: Mapping[str, Any], disks: list[str]) -> dict[str, dict[str, Any]]:
        """Node id -> arguments of the preflight of a node that gives more disks."""

    def with_disks(self, layout: Mapping[str, Any], name: str, disks: list[str], uuid: Callable[[], str]) -> dict[str, Any]:
        """The layout with more disks of a node; those that it has already change nothing. Errors: InvalidInput."""

    def shrunk(self, layout: Mapping[str, Any], name: str, disks: list[str], *, dead: bool) -> dict[str, Any]:
        """The layout without these disks of the node, or (none named) without the node.

        ``dead``: they are gone already. Errors: NotFound, InUse."""

    def spare(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]], name: str, *, dead: bool) -> Planned:
        """The question what would be lost on the way from the first to the second; its answer has ``stops``, in words."""

    def shrink(
        self,
        members: list[Member],
        layouts: tuple[Mapping[str, Any], Mapping[str, Any]],
        name: str,
        secrets: Mapping[str, str],
        *,
        dead: bool,
    ) -> tuple[Iterator[list[Planned]], Iterator[list[Planned]]]:
        """The phases before the commit, which can all be undone, and those after it."""

    def changed(self, layouts: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Preview:
        """What comes and goes between two layouts, in words, and what the second survives."""

    def stops(self, layout: Mapping[str, Any], name: str, teller: str) -> Planned:
        """The question, for the node ``teller`` (id), what would stop for clients without the node; its answer has ``stops``, in words."""

    def rest(self, layout: Mapping[str, Any], name: str, teller: str, *, hold: bool, wait: bool) -> list[list[Planned]]:
        """The phases that stop a node's daemons and keep what they have.

        ``hold``: let its data not be copied elsewhere meanwhile; ``wait``: until the others have noticed."""

    def wake(self, layout: Mapping[str, Any], name: str, teller: str) -> list[list[Planned]]:
        """The phases that start them again."""

    def finished(self, layout: dict[str, Any], results: Results) -> dict[str, Any]:
        """The layout with what only the steps told."""

    def outcome(self, layout: Mapping[str, Any], results: Results) -> dict[str, Any]:
        """What the job tells people in the end."""

    def kept(self, secrets: Mapping[str, str]) -> dict[str, str]:
        """Those keys that are needed again."""
