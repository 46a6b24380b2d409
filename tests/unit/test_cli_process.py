"""The command as people run it: a process, its output, its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rest_fakes import NODES, FakeLeader, Script, clean_environment, fake_leader, ident, served

from atoll.api.leader import Finding
from atoll.cli.reference import errors_page
from atoll.model.errors import NodeUnavailable, NotLeader, PoolFull
from atoll.model.messages import Progress
from atoll.model.objects import Hold, JobState
from atoll.runtime import certs

REPOSITORY = Path(__file__).parents[2]
ATOLL = [sys.executable, "-m", "atoll.cli.main"]


@dataclass
class Ended:
    """What a process left."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands against a served leader."""

    def __init__(self, leader: FakeLeader, path: str, port: int, directory: Path) -> None:
        self.leader, self.path, self.port, self.directory = leader, path, port, directory

    def environment(self, **more: str) -> dict[str, str]:
        return clean_environment(PYTHONPATH=str(REPOSITORY / "src"), ATOLL_SOCKET=self.path, **more)

    async def start(self, *words: str, env: dict[str, str] | None = None, **more: Any) -> asyncio.subprocess.Process:
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, **more}
        # Whoever runs the tests in the background may have Ctrl-C ignored, and children inherit that.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return await asyncio.create_subprocess_exec(*ATOLL, *words, env=env or self.environment(), **pipes)

    async def __call__(self, line: str, *, input: str = "", env: dict[str, str] | None = None) -> Ended:
        process = await self.start(*line.split(), env=env)
        out, err = await asyncio.wait_for(process.communicate(input.encode()), 60)
        assert process.returncode is not None
        assert "Traceback" not in err.decode(), err.decode()
        return Ended(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    ca = certs.create_ca("lagoon")
    server = certs.issue(ca, "master", ident("node", 1), "node1", ["127.0.0.1"])
    certs.save(tmp_path / "tls", ca.cert_pem, server.cert_pem, server.key_pem)
    leader = await fake_leader()
    async with served(leader, tmp_path, host="127.0.0.1", port=0, tls_dir=tmp_path / "tls") as (path, port):
        assert port
        yield Shell(leader, path, port, tmp_path)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


# --- reading ---


async def test_lists_are_aligned_tables(shell: Shell) -> None:
    ended = await shell("instance list")
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "Instance  State    Node   Memory  VCPUs  Disks  Pool",
        "db1       stopped  node2      1G      1     2G  local",
        "web1      running  node1    512M      2    10G  images",
    ]
    nodes = (await shell("node list")).out.splitlines()
    assert nodes[0].split() == ["Node", "Group", "State", "Memory", "Free", "Disk", "DFree", "Guests", "Address", "Roles"]
    assert nodes[1].split() == ["node1", "default", "ok", "8G", "6G", "?", "?", "1", "10.0.0.1", "vm"]


async def test_reasons_and_holds_appear_only_when_there_are_any(shell: Shell) -> None:
    shell.leader.health.dead.add(NODES[0].id)
    await shell.leader.state.store.write(
        put=[Hold(id=f"instance:{ident('i', 1)}", job=9, reason="silent", commands=("atoll job resume 9",))]
    )
    out = (await shell("instance list web1")).out
    assert "unreachable" in out
    assert "its node node1 does not answer" in out
    assert "job 9" in out


async def test_ganetis_output_options(shell: Shell) -> None:
    ended = await shell("instance list --no-headers --separator=| -o name,memory,disks,state")
    assert ended.out == "db1|1024|2048|stopped\nweb1|512|10240|running\n"
    assert (await shell("volume list spare --no-headers --units g -o name,size")).out == "spare  1.0\n"
    assert (await shell("node list --no-headers -o +cpus node3")).out.split()[-1] == "4"
    ended = await shell("node list node7")
    assert (ended.code, ended.err) == (5, "Error: there is no node node7\nNext: atoll node list\n")


async def test_json_and_yaml_have_all_fields_in_bytes(shell: Shell) -> None:
    rows = json.loads((await shell("instance list --format json")).out)
    assert [row["memory"] for row in rows] == [1 << 30, 512 << 20]
    assert rows[1]["disks"][0]["pool"] == "images"
    assert yaml.safe_load((await shell("instance list --format yaml")).out) == rows
    assert json.loads((await shell("instance list --format json -o name")).out) == [{"name": "db1"}, {"name": "web1"}]
    assert json.loads((await shell("cluster info --format json")).out)["name"] == "lagoon"


async def test_info_shows_disks_as_a_table(shell: Shell) -> None:
    out = (await shell("instance info web1")).out
    assert "Memory:" in out
    assert "512M" in out
    assert "Disks:\n  Index" in out
    pool = (await shell("pool info images")).out
    assert "mirroring external" in pool
    for line in ("cluster info", "node info node1", "group info default", "volume info spare"):
        assert (await shell(line)).code == 0


async def test_verify_says_what_to_type_and_fails_on_errors(shell: Shell) -> None:
    assert (await shell("cluster verify")).out == "Nothing is wrong.\n"
    shell.leader.findings = [Finding("warning", "strange image", "images/x.raw", "no record owns it", 7200.0, ("rm x.raw",))]
    ended = await shell("cluster verify")
    assert (ended.code, ended.out.splitlines()[0]) == (0, "warning: images/x.raw: strange image (for 2h)")
    assert "  $ rm x.raw" in ended.out
    shell.leader.findings.append(Finding("error", "guest is missing", "web1", "", None))
    assert (await shell("cluster verify")).code == 1


# --- jobs ---


async def test_a_command_waits_and_shows_progress_as_lines(shell: Shell) -> None:
    gate = asyncio.Event()
    script = Script(progress=[Progress(percent=10, text="copies memory"), Progress(percent=90, text="switches over")], gate=gate)
    shell.leader.script = script
    process = await shell.start("instance", "migrate", "web1", "-n", "node2")
    assert process.stderr
    told = b""
    while b"Job 1: instance migrate web1 90% - switches over" not in told:
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        assert line, f"it ended after {told!r}"
        told += line
    gate.set()
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out) == (0, b"Job 1 done: instance migrate web1 (3.2s)\n")


async def test_progress_on_a_terminal_is_one_line_written_over(shell: Shell) -> None:
    gate = asyncio.Event()
    shell.leader.script = Script(progress=[Progress(percent=n * 10, text="copies") for n in range(1, 6)], gate=gate)
    primary, secondary = pty.openpty()
    process = await shell.start("instance", "migrate", "web1", stderr=secondary)
    os.close(secondary)
    seen = asyncio.Event()
    asyncio.get_running_loop().add_reader(primary, seen.set)
    await asyncio.wait_for(seen.wait(), 60)
    asyncio.get_running_loop().remove_reader(primary)
    gate.set()
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    shown = b""
    with os.fdopen(primary, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(4096):
                shown += piece
        except OSError:
            pass
    assert b"done" in out
    assert b"\n" not in shown
    assert shown.count(b"\r\x1b[K") >= 2
    assert shown.endswith(b"\r\x1b[K")


async def test_submit_and_dry_run_do_not_wait(shell: Shell) -> None:
    ended = await shell("instance stop web1 --dry-run")
    assert (ended.code, ended.out) == (0, "Would instance stop web1.\n")
    shell.leader.script = Script(gate=asyncio.Event())
    ended = await shell("instance stop web1 --submit")
    assert (ended.code, ended.out) == (0, "1\n")
    assert "running" in (await shell("job list --active")).out
    ended = await shell("job cancel 1")
    assert (ended.code, ended.out) == (0, "Job 1 was cancelled; what it had done is undone: instance stop web1\n")


async def test_a_failed_job_is_an_error_with_its_exit_code(shell: Shell) -> None:
    shell.leader.script = Script(state=JobState.UNDONE, error=PoolFull("pool images has 1G free", hint="atoll pool info images"))
    ended = await shell("instance add w -s 10G -t images")
    assert ended.code == 7
    assert ended.err.splitlines()[-2:] == [
        "Error: instance add w: pool images has 1G free (job 1 was undone)",
        "Next: atoll pool info images",
    ]
    ended = await shell("job list")
    assert "pool images has 1G free" in ended.out


async def test_a_job_that_needs_attention_says_what_to_type(shell: Shell) -> None:
    commands = ("atoll job resume 1 --node-is-dead node1", "atoll job undo 1")
    shell.leader.script = Script(state=JobState.NEEDS_ATTENTION, reason="node1 does not answer", commands=commands)
    ended = await shell("instance failover web1")
    assert ended.code == 8
    assert ended.err.splitlines()[-2:] == [
        "Error: job 1 (instance failover web1) needs attention: node1 does not answer",
        "Next: atoll job resume 1 --node-is-dead node1; atoll job undo 1",
    ]
    shell.leader.script = Script()
    assert (await shell("job resume 1 --node-is-dead node1")).code == 0
    assert shell.leader.steered == [("resume", 1, "node1")]


async def test_what_is_refused_has_its_exit_code_and_hint(shell: Shell) -> None:
    shell.leader.refuse = NodeUnavailable("node2 is drained", hint="atoll node modify node2 --undrained")
    ended = await shell("instance migrate web1 -n node2")
    assert (ended.code, ended.out) == (7, "")
    assert ended.err == "Error: node2 is drained\nNext: atoll node modify node2 --undrained\n"
    ended = await shell("instance migrate")
    assert (ended.code, ended.err.splitlines()[-1]) == (2, "Next: atoll instance migrate --help")


async def test_ctrl_c_leaves_the_job_and_says_so(shell: Shell) -> None:
    shell.leader.script = Script(progress=[Progress(text="copies")], gate=asyncio.Event())
    process = await shell.start("instance", "migrate", "web1")
    assert process.stderr
    line = await asyncio.wait_for(process.stderr.readline(), 30)
    assert b"Job 1" in line
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert "Job 1 goes on. Watch it: atoll job watch 1. Stop it: atoll job cancel 1." in err.decode()
    assert shell.leader.steered == []


# --- connections ---


async def test_no_master_is_told_at_once(shell: Shell) -> None:
    began = time.monotonic()
    ended = await shell("instance list", env=shell.environment() | {"ATOLL_SOCKET": "/nonexistent/api.sock"})
    assert ended.code == 8
    assert "no master answers at /nonexistent/api.sock" in ended.err
    assert "Next: run this as root on a master" in ended.err
    ended = await shell("instance stop web1", env=shell.environment() | {"ATOLL_SOCKET": "/nonexistent/api.sock"})
    assert ended.code == 8
    assert time.monotonic() - began < 10


async def test_a_lost_answer_is_asked_for_again_with_the_same_key(shell: Shell) -> None:
    """A proxy passes the first request on and drops its answer: the job must be made once."""
    proxied = shell.directory / "proxy.sock"
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        drop = connections == 1
        up_reader, up_writer = await asyncio.open_unix_connection(shell.path)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, swallow: bool) -> None:
            while data := await source.read(65536):
                if swallow:
                    break
                sink.write(data)
                await sink.drain()

        both = [asyncio.create_task(pump(reader, up_writer, False)), asyncio.create_task(pump(up_reader, writer, drop))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        writer.close()
        up_writer.close()

    server = await asyncio.start_unix_server(handle, proxied)
    async with server:
        ended = await shell("instance stop web1", env=shell.environment() | {"ATOLL_SOCKET": str(proxied)})
    assert ended.code == 0
    assert connections >= 2
    keys = [key for _, _, _, _, key in shell.leader.asked]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert ended.out == "Job 1 done: instance stop web1 (3.2s)\n"


async def test_watching_goes_on_when_the_leader_changes(shell: Shell) -> None:
    shell.leader.script = Script(progress=[Progress(text="copies")], gate=asyncio.Event())
    process = await shell.start("instance", "stop", "web1")
    assert process.stderr
    await asyncio.wait_for(process.stderr.readline(), 30)
    shell.leader.refuse_state = NotLeader("this master was deposed")
    # The end of the job wakes the long poll, which then finds no leader; a moment later there is one again.
    shell.leader.script.gate.set()  # type: ignore[union-attr]
    await asyncio.sleep(0.5)
    assert process.returncode is None
    shell.leader.refuse_state = None
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, out) == (0, b"Job 1 done: instance stop web1 (3.2s)\n")


async def test_https_with_a_token_from_a_file(shell: Shell) -> None:
    token = shell.directory / "token"
    token.write_text("operate\n")
    token.chmod(0o600)
    env = shell.environment() | {
        "ATOLL_MASTER": f"https://127.0.0.1:{shell.port}",
        "ATOLL_CA": str(shell.directory / "tls" / "ca.pem"),
        "ATOLL_TOKEN_FILE": str(token),
    }
    assert (await shell("instance list", env=env)).code == 0
    assert (await shell("instance stop web1", env=env)).code == 0
    assert shell.leader.asked[-1][3].name == "olga"
    ended = await shell("group add g", env=env)
    assert (ended.code, ended.err.splitlines()[0]) == (3, "Error: olga has the role operator; this needs admin")
    token.chmod(0o644)
    ended = await shell("instance list", env=env)
    assert ended.code == 2
    assert f"Next: chmod 600 {token}" in ended.err
    token.chmod(0o600)
    other = shell.directory / "other.pem"
    other.write_text(certs.create_ca("other").cert_pem)
    ended = await shell("instance list", env=env | {"ATOLL_CA": str(other)})
    assert ended.code == 3
    assert "is not trusted" in ended.err
    ended = await shell("instance list", env=env | {"ATOLL_MASTER": "https://127.0.0.1:1,https://127.0.0.1:" + str(shell.port)})
    assert ended.code == 0


async def test_a_reader_that_went_away_is_told_by_the_exit_code_alone(shell: Shell) -> None:
    for line in ("node list", "node list --format json", "--help"):
        reading, writing = os.pipe()
        os.close(reading)
        process = await shell.start(*line.split(), stdout=writing)
        os.close(writing)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert err == b"", line
        assert process.returncode in (1, 141)


# --- nodes, tokens, console, completion ---


async def test_tokens_are_printed_alone_on_stdout(shell: Shell) -> None:
    assert (await shell("node token node4 -g default")).out == "fingerprint.secret-for-node4-in-default\n"
    ended = await shell("cluster token ci --role operator")
    assert ended.out == "token-of-ci-operator\n"
    assert "ATOLL_TOKEN_FILE" in ended.err


async def test_node_add_says_what_to_type(shell: Shell) -> None:
    ended = await shell("node add node4 --master https://10.0.0.1:7770")
    assert "atoll node join --master https://10.0.0.1:7770 --name node4 --address ADDRESS --token-file -" in ended.out
    assert "fingerprint.secret-for-node4-in-None" in ended.out
    ended = await shell("node add node4")
    assert (ended.code, "--master" in ended.err) == (2, True)


async def test_node_add_over_ssh_gives_the_token_through_stdin(shell: Shell) -> None:
    fake = shell.directory / "bin"
    fake.mkdir()
    (fake / "ssh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {shell.directory}/argv\ncat > {shell.directory}/stdin\n')
    (fake / "ssh").chmod(0o755)
    env = shell.environment() | {"PATH": f"{fake}:{os.environ['PATH']}"}
    ended = await shell("node add node4 --ssh root@10.0.0.4 --master https://10.0.0.1:7770 --set agent_port=7900", env=env)
    assert (ended.code, ended.out) == (0, "node4 has joined.\n")
    argv = (shell.directory / "argv").read_text()
    assert "--name node4 --address 10.0.0.4 --token-file - --set agent_port=7900" in argv
    assert "secret-for" not in argv
    assert (shell.directory / "stdin").read_text() == "fingerprint.secret-for-node4-in-None\n"
    (fake / "ssh").write_text("#!/bin/sh\nexit 255\n")
    ended = await shell("node add node4 --ssh root@10.0.0.4 --master https://10.0.0.1:7770", env=env)
    assert (ended.code, "exit code 255" in ended.err) == (9, True)


async def test_the_console_is_bridged_and_left_with_a_key(shell: Shell, stack: ExitStack) -> None:
    config = shell.directory / "atoll.toml"
    # Paths of Unix sockets have 107 characters at most; pytest's directories are longer than that with xdist.
    run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config.write_text(f'run_dir = "{run_dir}"\n')
    env = shell.environment() | {"ATOLL_CONFIG": str(config)}
    ended = await shell("instance console web1", env=env)
    assert (ended.code, ended.err.splitlines()[-1]) == (7, "Next: ssh -t node1 atoll instance console web1")
    ended = await shell("instance console db1", env=env)
    assert (ended.code, ended.err.splitlines()[-1]) == (6, "Next: atoll instance start db1")
    directory = run_dir / "guests" / ident("i", 1)
    directory.mkdir(parents=True)
    got = asyncio.get_running_loop().create_future()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"login: ")
        await writer.drain()
        got.set_result(await reader.readexactly(4))
        writer.write(b"welcome")
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(guest, directory / "console.sock")
    async with server:
        process = await shell.start("instance", "console", "web1", env=env)
        assert process.stdin
        assert process.stdout
        assert await asyncio.wait_for(process.stdout.readexactly(7), 30) == b"login: "
        process.stdin.write(b"root")
        await process.stdin.drain()
        assert await asyncio.wait_for(got, 30) == b"root"
        assert await asyncio.wait_for(process.stdout.readexactly(7), 30) == b"welcome"
        process.stdin.write(b"\x1d")
        _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert "Left the console." in err.decode()


async def test_on_a_terminal_the_console_passes_every_key_through(shell: Shell, stack: ExitStack) -> None:
    run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = run_dir / "atoll.toml"
    config.write_text(f'run_dir = "{run_dir}"\n')
    directory = run_dir / "guests" / ident("i", 1)
    directory.mkdir(parents=True)
    got = asyncio.get_running_loop().create_future()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ready")
        got.set_result(await reader.readexactly(3))
        await reader.read()
        writer.close()

    primary, secondary = pty.openpty()
    stack.callback(os.close, primary)
    stack.callback(os.close, secondary)
    before = termios.tcgetattr(secondary)
    server = await asyncio.start_unix_server(guest, directory / "console.sock")
    async with server:
        env = shell.environment() | {"ATOLL_CONFIG": str(config)}
        process = await shell.start("instance", "console", "web1", env=env, stdin=secondary, stdout=secondary)
        shown = b""
        while b"ready" not in shown:
            shown += await asyncio.to_thread(os.read, primary, 1024)
        # Ctrl-C, Ctrl-D and Ctrl-Z are the guest's.
        os.write(primary, b"\x03\x04\x1a")
        assert await asyncio.wait_for(got, 30) == b"\x03\x04\x1a"
        os.write(primary, b"\x1d")
        await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert termios.tcgetattr(secondary) == before


async def test_completion_knows_commands_and_names(shell: Shell) -> None:
    for name in ("bash", "zsh", "fish"):
        assert "_ATOLL_COMPLETE" in (await shell(f"completion {name}")).out
    assert "_GNT_INSTANCE_COMPLETE" in (await shell("completion bash --program gnt-instance")).out
    asked = {"_ATOLL_COMPLETE": "bash_complete", "COMP_WORDS": "atoll instance start w", "COMP_CWORD": "3"}
    assert "web1" in (await shell("", env=shell.environment() | asked)).out
    asked = {"_ATOLL_COMPLETE": "bash_complete", "COMP_WORDS": "atoll instance mig", "COMP_CWORD": "2"}
    assert "migrate" in (await shell("", env=shell.environment() | asked)).out


async def test_gnt_lists_speak_ganetis_field_names(shell: Shell) -> None:
    code = "import sys; from atoll.cli import ganeti; getattr(ganeti, sys.argv.pop(1))()"

    async def gnt(line: str) -> list[str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            *line.split(),
            env=shell.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err.decode()
        return out.decode().splitlines()

    assert await gnt("instance list --no-headers --separator=: -o name,pnode,status,disk.sizes,disk.size/0,nic.mac/0,oper_ram") == [
        "db1:node2:ADMIN_down:2048:2048:-:?",
        "web1:node1:running:10240:10240:52:54:00:00:00:01:512",
    ]
    assert (await gnt("instance list"))[0].split() == ["Instance", "Hypervisor", "OS", "Primary_node", "Status", "Memory"]
    assert (await gnt("node list"))[0].split() == ["Node", "DTotal", "DFree", "MTotal", "MNode", "MFree", "Pinst", "Sinst"]
    assert (await gnt("node list --no-headers node1"))[0].split() == ["node1", "?", "?", "8G", "2G", "6G", "1", "0"]
    assert (await gnt("node list-storage -t sharedfile --no-headers"))[0].split() == ["node1", "sharedfile", "images", "?", "?", "?", "Y"]
    assert (await gnt("group list --no-headers"))[0].split() == ["default", "3", "2", "preferred"]
    await shell("instance stop web1")
    assert (await gnt("job list --no-headers"))[0].split()[:2] == ["1", "success"]
    assert "pnode" in "\n".join(await gnt("instance list-fields"))
    assert await gnt("instance list-tags web1") == ["env:prod"]


# --- what it costs, and what is written about it ---

SERVER_LIBRARIES = ("pydantic", "fastapi", "starlette", "uvicorn", "aiohttp", "rich", "yaml", "structlog", "cryptography", "asyncio")


def test_ordinary_commands_import_no_server_library(tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(' '.join(sorted(sys.modules)), file=sys.stderr))\n"
        "from atoll.cli.main import main\nmain()\n"
    )
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "api.sock"))
    listener.listen(4)
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 29\r\nConnection: close\r\n\r\n{"items": [],  "after": null}'
    for line in ("--help", "instance --help", "instance list", "node list", "job list"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *line.split()],
            env=clean_environment(PYTHONPATH=str(REPOSITORY / "src"), ATOLL_SOCKET=str(tmp_path / "api.sock")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if "list" in line:
            listener.settimeout(30)
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
        _, err = process.communicate(timeout=60)
        loaded = {name.partition(".")[0] for name in err.split()}
        assert process.returncode == 0, err
        assert "click" in loaded
        assert not loaded & set(SERVER_LIBRARIES), (line, loaded & set(SERVER_LIBRARIES))
    listener.close()


def test_the_page_of_errors_is_what_the_code_says() -> None:
    page = REPOSITORY / "docs" / "reference" / "errors.md"
    assert page.read_text() == errors_page(), "run: python -m atoll.cli.reference docs/reference/errors.md"
