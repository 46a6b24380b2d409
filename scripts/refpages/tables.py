"""Configuration, drivers and operations: what tables in the code say."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from atoll.api.rest.submit import address
from atoll.cli.main import atoll
from atoll.deploy import registry as kinds
from atoll.model.units import format_size
from atoll.operations import requests
from atoll.operations.all import OPERATIONS
from atoll.runtime import config
from atoll.storage import registry
from atoll.storage.contract import Option
from refpages.commands import walk
from refpages.markdown import cell, page, table

# --- from the source: fields and the comments before them ---


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> its ``#:`` comment."""
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                above: list[str] = []
                at = item.lineno - 2
                while at >= 0 and lines[at].strip().startswith("#:"):
                    above.insert(0, lines[at].strip()[2:].strip())
                    at -= 1
                if above:
                    found[node.name, item.target.id] = " ".join(above)
    return found


def type_name(annotation: Any) -> str:
    """A type in words, for people who do not know Python."""
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(parts[0])
    if origin is Literal:
        return " or ".join(f"`{p}`" if p != "" else "empty" for p in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(p) for p in parts if p is not type(None))
    if origin in (list, tuple):
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return f"{type_name(parts[0])} to {type_name(parts[1])}" if parts[1] is str else f"{type_name(parts[0])} to ({type_name(parts[1])})"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return {str: "text", int: "number", float: "number", bool: "true or false", Path: "path"}.get(annotation, str(annotation))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, list, tuple, dict)) and not value:
        return ""
    return f"`{value}`"


# --- the pages ---


def configuration() -> str:
    said = comments(inspect.getsource(config))
    rows = [
        (f"`{name}`", type_name(field.annotation), default(field), said.get(("Config", name), _SETTINGS.get(name, "")))
        for name, field in config.Config.model_fields.items()
    ]
    for name, *_, text in rows:
        assert text, f"the setting {name} has no #: comment"
    return page(
        "Configuration of a node",
        f"`{config.DEFAULT_PATH}`, in TOML. `atoll cluster init` and `atoll node join` write it. A setting that is not there has its",
        "default, an unknown one is an error. What the cluster decides (pools, groups, defaults) is in the store, not here.",
        "",
        "`--set KEY=VALUE` of `init`, `join` and `node add` writes a setting. After a change by hand: `systemctl restart atoll-agent`,",
        "on a master also `systemctl restart atoll-master`. Guests go on.",
        "",
        *table(("Setting", "Type", "Default", "Meaning"), rows),
        "## Environment of the command line",
        "",
        *table(("Variable", "Meaning"), ((f"`{name}`", text) for name, text in ENVIRONMENT.items())),
    )


_SETTINGS = {
    "log_dir": "Where the nodes of a lab log. Under systemd the journal has the logs: `journalctl -u atoll-agent`.",
    "agent_port": "The TCP port on which the agent takes the master's orders.",
    "master_port": "The TCP port of the master: the REST API, and the agents' heartbeats.",
    "hypervisor": "What runs guests: QEMU, or processes that only play guests (for trying out without root).",
    "log_level": "The least important messages that are logged.",
}
ENVIRONMENT = {
    "ATOLL_MASTER": "Base URLs of masters, with commas, such as `https://node1:7770`. Unset: the master's Unix socket on this machine.",
    "ATOLL_CA": "File with the cluster's CA certificate; default: this node's copy.",
    "ATOLL_TOKEN_FILE": "File (mode 600) with the API token.",
    "ATOLL_SOCKET": "The master's Unix socket, if it is not where this node's configuration says.",
    "ATOLL_CONFIG": "This node's configuration file.",
}


def drivers() -> str:
    lines = [
        "A driver is known by its capabilities: no code outside its own folder asks for its name. `atoll pool info POOL` shows the same.",
        "",
    ]
    columns: dict[str, Callable[[Any], object]] = {
        "Driver": lambda i: f"`{i.name}`",
        "Who keeps a second copy": lambda i: {"none": "nobody", "internal": "Atoll", "external": "the storage"}[i.mirroring],
        "Migrate, fail over": lambda i: "yes" if i.mirrored else "no; `move` copies",
        "Space is": lambda i: i.space,
        "Access": lambda i: ", ".join(sorted(i.access)),
        "Grow": lambda i: "online" if i.grow else "no",
        "Rename": lambda i: i.rename,
        "Adoption": lambda i: i.adoption,
        "Snapshots": lambda i: "yes" if i.snapshots else "no",
    }
    lines += table(columns, ([f(info) for f in columns.values()] for info in registry.drivers()))
    for info in registry.drivers():
        lines += [f"## {info.name}", "", f"{info.description[0].upper()}{info.description[1:]}.", ""]
        lines.append(f"Sizes are rounded up to a multiple of {info.granularity} bytes; the largest volume is {format_size(info.max_size)}.")
        lines += ["", "Options (`atoll pool add NAME -t DRIVER KEY=VALUE...`; defaults by `atoll cluster modify -D DRIVER:KEY=VALUE`):", ""]
        rows = []
        for option in info.options:
            takes = ", ".join(f"`{c}`" for c in option.choices) or "text"
            rows.append((f"`{option.name}`", takes, "required" if option.required else f"`{option.default}`", option.description))
        lines += table(("Option", "Values", "Default", "Meaning"), rows)
        if info.parameters:
            lines.append(
                "Disk parameters (`-D DRIVER:KEY=VALUE` of `atoll cluster init`, `cluster modify`, `group add` and `group modify`;"
            )
            lines += ["a group's go before the cluster's). They hold for each instance from its next start or migration on:", ""]
            takes = [", ".join(f"`{c}`" for c in option.choices) or "text" for option in info.parameters]
            rows = [(f"`{o.name}`", t, f"`{o.default}`", o.description) for o, t in zip(info.parameters, takes, strict=True)]
            lines += table(("Parameter", "Values", "Default", "Meaning"), rows)
    return page("Storage drivers", *lines)


def storage_clusters() -> str:
    lines = [
        "What `atoll storage init -s TYPE GROUP` makes, and what can be said of it before: `-S TYPE:KEY=VALUE` of `atoll cluster init`",
        "and `cluster modify` holds for all, that of `group modify` for a group, that of `node modify` for a node. Once the storage",
        "cluster is made, these can no longer change.",
        "",
    ]
    for info in kinds.kinds():
        lines += [f"## {info.name}", "", f"{info.description[0].upper()}{info.description[1:]}.", "", *_options(info.options)]
    return page("Storage clusters", *lines)


def _options(options: Iterable[Option]) -> list[str]:
    rows = []
    for option in options:
        takes = ", ".join(f"`{c}`" for c in option.choices) or "text"
        default = "required" if option.required else f"`{option.default}`" if option.default else ""
        rows.append((f"`{option.name}`", takes, default, option.description))
    return table(("Option", "Values", "Default", "Meaning"), rows)


def operations() -> str:
    said = comments(inspect.getsource(requests))
    lines = [
        "Everything that changes something is an operation. It becomes a job: `atoll job list`. The same table makes the REST routes, so",
        "the live description is at `/v1/openapi.json` of every master. Objects are named by name or id; sizes are bytes, times seconds.",
        "",
        "Send `Idempotency-Key: ANYTHING` with a request to be able to repeat it: the same key gives the same job again.",
        "`?wait=SECONDS` (60 at most) answers when the job has ended, with the job in `ended`; null when it takes longer.",
        "`?dry_run=true` checks and changes nothing. Roles: a *reader* sees everything,",
        "an *operator* works with instances and volumes, an *admin* may do all.",
        "",
    ]
    nested: dict[str, type[BaseModel]] = {}
    told = {path[1:]: cell(command.help or "") for path, command in walk(atoll, ("atoll",))}
    told |= {(noun, "tags"): "Add and remove tags." for noun in ("cluster", "group", "node", "pool", "volume", "instance")}
    # By name: the order of the table is that in which the modules happened to be imported.
    known = sorted(OPERATIONS.values(), key=lambda o: o.name)
    for noun in sorted({o.noun for o in known}):
        lines += [f"## {noun}", ""]
        for item in (o for o in known if o.public and o.noun == noun):
            method, path = address(item)
            # What the command of the same name says is meant for people; the request's own words tell of its fields.
            what = told.get((item.noun, item.verb), _first(item.request))
            lines += [f"### {item.name}", "", f"{what} Role: {item.role}. `{method} {path}`", ""]
            lines += _fields(item.request, said, nested)
    lines += ["## Parts of requests", ""]
    for name, model in sorted(nested.items()):
        lines += [f"### {name}", "", _first(model), "", *_fields(model, said, {})]
    lines += ["## Of the master alone", "", "These appear among the jobs, but nobody can ask for them.", ""]
    lines += table(("Operation", "What"), ((f"`{o.name}`", _first(o.run)) for o in known if not o.public))
    return page("Operations", *lines)


def _first(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").replace("``", "`").split())


def _fields(model: type[BaseModel], said: dict[tuple[str, str], str], nested: dict[str, type[BaseModel]]) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        for part in _models(field.annotation):
            nested[part.__name__] = part
        owner = next(c.__name__ for c in model.__mro__ if name in getattr(c, "__annotations__", {}))
        rows.append((f"`{name}`", type_name(field.annotation), default(field), said.get((owner, name), field.description or "")))
    if not rows:
        return ["No fields.", ""]
    if not any(row[3] for row in rows):
        return table(("Field", "Type", "Default"), (row[:3] for row in rows))
    return table(("Field", "Type", "Default", "Meaning"), rows)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
