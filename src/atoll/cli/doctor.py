"""``atoll doctor``."""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from atoll.cli.client import Client
from atoll.cli.options import format_option
from atoll.cli.output import print_data
from atoll.cli.settings import config_option

#: The exit code when there are warnings, and no errors.
ONLY_WARNINGS = 11
_COLORS = {"error": "red", "warning": "yellow", "ok": "green"}


@click.command()
@click.option("--all", "everywhere", is_flag=True, help="Let every node look at itself, by way of the master.")
@click.option("--master", default="", metavar="URL", help="A master that this machine shall reach, before it joins.")
@click.option("--quiet", "-q", is_flag=True, help="Only what is to mend.")
@format_option
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@config_option
@click.pass_context
def doctor(ctx: click.Context, everywhere: bool, master: str, quiet: bool, format: str, as_json: bool, config: str) -> None:
    """Look at this machine, before or after it joins: what would keep it from being a good node. It changes nothing.

    The exit code is 0 if nothing is to mend, 1 if there is an error, and 11 if there are only warnings. No daemon needs to run.
    """
    findings = Client().get("/v1/cluster/doctor", timeout=150.0)["findings"] if everywhere else here(config, master)
    if quiet:
        findings = [item for item in findings if item["level"] != "ok"]
    if as_json or format != "table":
        print_data(findings, "json" if as_json else format)
    else:
        tell(findings)
    levels = {item["level"] for item in findings}
    ctx.exit(1 if "error" in levels else ONLY_WARNINGS if "warning" in levels else 0)


def here(config: str, master: str = "") -> list[dict[str, Any]]:
    """What this machine finds. A configuration that cannot be read is a finding, too."""
    runtime, work = import_module("atoll.runtime.config"), import_module("atoll.monitor.doctor")
    broken: list[dict[str, Any]] = []
    try:
        known = runtime.load(config if Path(config).exists() or "ATOLL_CONFIG" in os.environ else None)
    except (import_module("atoll.model.errors").AtollError, OSError) as error:
        known = runtime.Config()
        why = "the daemons do not start; what follows was looked at with the default settings"
        what = getattr(error, "message", str(error))
        broken = [{"level": "error", "about": "configuration", "what": what, "why": why, "commands": [f"mend {config}"]}]
    found: list[dict[str, Any]] = asyncio.run(work.examine(known, config, master=master))["findings"]
    return [*broken, *found]


def tell(findings: list[dict[str, Any]]) -> None:
    """A few lines for each finding, the worst first."""
    for item in findings:
        head = click.style(item["level"], fg=_COLORS.get(item["level"]), bold=item["level"] != "ok")
        where = f"{item['node']}: " if item.get("node") else ""
        click.echo(f"{head}: {where}{item['about']}: {item['what']}")
        if item["why"]:
            click.echo(f"  {item['why']}")
        for command in item["commands"]:
            click.echo(f"  $ {command}")
    errors, warnings = (sum(item["level"] == level for item in findings) for level in ("error", "warning"))
    if not errors and not warnings:
        click.echo("Nothing is to mend.")
    else:
        click.echo(f"{errors} error{'s' if errors != 1 else ''}, {warnings} warning{'s' if warnings != 1 else ''}")
