"""``make demo``: tell and show what Atoll is for, on real parts, in about a minute.

With root: three nodes in namespaces and a real guest under QEMU. Without: three nodes as plain processes and the fake hypervisor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from atoll.lab.bringup import ATOLL, AnyLab, make_cluster
from atoll.lab.find import remove
from atoll.lab.guest.ring import acks, check_ring
from atoll.lab.lab import Lab
from atoll.lab.process import ProcessLab
from atoll.model.errors import AtollError, HostError

NAME = "demo"
CACHE = Path("/var/cache/atoll")


class Writer:
    """Reads the guest's console on whatever node it is, and remembers when each acknowledgement was seen."""

    def __init__(self, lab: AnyLab) -> None:
        self._lab = lab
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.last, self.seen, self.gap, self.text = 0, 0.0, 0.0, ""
        self._read: dict[Path, int] = {}
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(0.005):
            for node in self._lab.nodes:
                for log in node.run_dir.glob("*/*/console.log"):
                    self._take(log)

    def _take(self, log: Path) -> None:
        try:
            with log.open("rb") as file:
                file.seek(self._read.get(log, 0))
                part = file.read()
        except OSError:
            return
        end = part.rfind(b"\n") + 1
        if not end:
            return
        self._read[log] = self._read.get(log, 0) + end
        text = part[:end].decode(errors="replace")
        self.text += text
        numbers = acks(text)
        if numbers and max(numbers) > self.last:
            now = time.monotonic()
            if self.seen:
                self.gap = max(self.gap, now - self.seen)
            self.last, self.seen = max(numbers), now

    def wait(self, beyond: int, seconds: float = 60.0) -> int:
        """Until a record above ``beyond`` is acknowledged; its number."""
        end = time.monotonic() + seconds
        while self.last <= beyond:
            if time.monotonic() > end:
                raise HostError(f"the guest acknowledged nothing beyond record {beyond} within {seconds:.0f} s")
            time.sleep(0.02)
        return self.last

    def wait_text(self, words: str, seconds: float = 20.0) -> str:
        """Until a line with these words is on the console; the line."""
        end = time.monotonic() + seconds
        while True:
            for line in self.text.splitlines():
                if words in line:
                    return line.strip()
            if time.monotonic() > end:
                raise HostError(f"the guest did not say {words!r} within {seconds:.0f} s")
            time.sleep(0.05)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()


class Demo:
    """The story."""

    def __init__(self, *, root: bool, keep: bool) -> None:
        self.root, self.keep = root, keep
        self.started = time.monotonic()
        self.colour = sys.stdout.isatty()
        self.step_number = 0
        self.lab: AnyLab
        self.environment: dict[str, str] = {}

    # --- telling ---

    def say(self, text: str) -> None:
        """A line of the story, with the time since its beginning."""
        print(f"  {time.monotonic() - self.started:5.1f} s  {text}", flush=True)

    def step(self, title: str, why: str) -> None:
        """A new chapter."""
        self.step_number += 1
        bold, plain = ("\033[1m", "\033[0m") if self.colour else ("", "")
        print(f"\n{bold}{self.step_number}. {title}{plain}\n   {why}", flush=True)

    def atoll(self, *words: str, fails: bool = False, quiet: bool = False) -> str:
        """Run a command as its reader would type it, and show it. ``fails``: it must refuse."""
        dim, plain = ("\033[36m", "\033[0m") if self.colour else ("", "")
        print(f"   {dim}$ atoll {' '.join(w if ' ' not in w else repr(w) for w in words)}{plain}", flush=True)
        done = subprocess.run([*ATOLL, *words], capture_output=True, text=True, timeout=120, env={**os.environ, **self.environment})
        shown = (done.stderr if done.returncode else done.stdout).strip()
        for line in [] if quiet else shown.splitlines():
            print(f"     {line}", flush=True)
        if (done.returncode != 0) is not fails:
            raise HostError(f"atoll {' '.join(words)} gave {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def info(self) -> dict[str, Any]:
        """The instance as the master sees it."""
        import json

        words = [*ATOLL, "instance", "info", "web1", "--format", "json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, env={**os.environ, **self.environment}, check=True)
        data = json.loads(done.stdout)
        found: dict[str, Any] = data[0] if isinstance(data, list) else data
        return found

    # --- the story ---

    def run(self) -> None:
        """From nothing to nothing (``keep`` leaves the lab)."""
        hypervisor = "qemu" if self.root else "fake"
        boot = self._guest_image() if self.root else []
        self._lab(hypervisor)
        writer = Writer(self.lab)
        try:
            self._tell(boot, writer)
        finally:
            writer.close()
        self._end()

    def _guest_image(self) -> list[str]:
        from atoll.lab.guest.build import append, build

        print("Building a small guest from Debian's packages (kernel + busybox), once ...", flush=True)
        image = build(CACHE)
        return ["--kernel", str(image.kernel), "--initrd", str(image.initrd), "--append", append(ctr="vda")]

    def _lab(self, hypervisor: str) -> None:
        kind = "network, process and mount namespaces" if self.root else "plain processes, as this user is not root"
        self.step("Three nodes on this machine", f"Each has its own disks and its own agent ({kind}). node1 is the master, too.")
        remove(NAME)
        self.lab = Lab.create(NAME, 3, binds=[str(CACHE)]) if self.root else ProcessLab.create(NAME, 3)
        make_cluster(self.lab, hypervisor, say=self.say)
        self.environment = {"ATOLL_SOCKET": str(self.lab.node("node1").run_dir / "api.sock")}
        self.atoll("node", "list")

    def _tell(self, boot: list[str], writer: Writer) -> None:
        self.step("A storage pool", "A directory on a file system that all three nodes mount. A bare mount point would be refused.")
        mount = [] if self.root else ["mount=none"]
        self.atoll("pool", "add", "shared", "-t", "sharedfile", f"path={self.lab.shared}", *mount, quiet=True)
        self.atoll("pool", "list")

        self.step("A virtual machine", "It writes numbered records to its disk and acknowledges each one once it is durable.")
        more = boot or ["--append", "ctr=vda"]
        self.atoll(
            "instance", "add", "web1", "-t", "sharedfile", "--disk", "0:size=1G", "-B", "maxmem=128M", "-n", "node2", *more, quiet=True
        )
        self.say("it boots ...")
        number = writer.wait(20)
        self.say(f"it writes: {number} records acknowledged so far")

        self.step("Live migration", "It moves to another node while it writes. Its memory travels over TLS; one node at a time may write.")
        before, writer.gap = writer.last, 0.0
        self.atoll("instance", "migrate", "web1", "-n", "node3")
        after = writer.wait(writer.last + 25)
        self.say(f"records {before} to {after} were written on the way; the longest silence of the writer was {writer.gap * 1000:.0f} ms")

        self.step("A disk grows, another comes and goes", "All while it runs.")
        self.atoll("instance", "grow-disk", "web1", "0", "1G", quiet=True)
        self.atoll("instance", "add-disk", "web1", "--disk", "size=512M", quiet=True)
        if self.root:
            self.say(f"the guest sees: {writer.wait_text('SIZE vda 2147483648')}")
            self.say(f"the guest sees: {writer.wait_text('SIZE vdb')}")
        self.atoll("instance", "remove-disk", "web1", "1", "-f", quiet=True)

        self.step("A power cut", "node3, where it runs, loses power: no goodbye, and what was not on disk is lost.")
        self.lab.node("node3").kill()
        promised = writer.last
        self.say(f"node3 is dark; the last record that was acknowledged is {promised}")
        self._wait_silent()
        self.atoll("instance", "list")
        print("   A node that does not answer may be alive. Nothing starts elsewhere without a proof:", flush=True)
        self.atoll("instance", "failover", "web1", fails=True)

        self.step("Failover", "You have looked: node3 is off. Your word is the proof.")
        self.atoll("instance", "failover", "web1", "--node-is-dead")
        resumed = writer.wait(promised + 25)
        self.say(f"it runs on {self.info()['node']} and writes again: record {resumed}")

        self.step("Was anything lost?", "The disk must hold every record that was ever acknowledged.")
        self.atoll("instance", "stop", "web1", quiet=True)
        image = next(p for p in self._shared_dir().glob("web1-disk0.*.raw"))
        last = writer.last
        report = check_ring(image, last)
        if not report.ok:
            raise HostError(f"records are missing: {report.missing[:10]}, top {report.top}, acknowledged {last}")
        self.say(f"all there: the newest record is {report.top}, {last} were acknowledged, none is missing")

        self.step("The node comes back", "It first promises to refuse what now runs elsewhere.")
        self.lab.node("node3").boot()
        self._wait_back()
        self.atoll("node", "list")
        self.atoll("cluster", "verify")

    def _shared_dir(self) -> Path:
        path = self.lab.shared
        return Path(path) if not self.root else Path(str(self.lab.node("node1").root) + path)

    def _wait_silent(self) -> None:
        self._poll("node3 counts as silent", lambda rows: any(r["name"] == "node3" and not r["alive"] for r in rows))

    def _wait_back(self) -> None:
        self._poll("node3 is back", lambda rows: any(r["name"] == "node3" and r["alive"] and r["state"] == "ok" for r in rows))

    def _poll(self, what: str, condition: Any, seconds: float = 60.0) -> None:
        import json

        end = time.monotonic() + seconds
        words = [*ATOLL, "node", "list", "--format", "json"]
        while True:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, env={**os.environ, **self.environment})
            if done.returncode == 0 and condition(json.loads(done.stdout)):
                self.say(what)
                return
            if time.monotonic() > end:
                raise HostError(f"still not: {what}")
            time.sleep(0.3)

    def _end(self) -> None:
        took = time.monotonic() - self.started
        if self.keep:
            print(f"\nThat was it, in {took:.0f} s. The lab is still there; try:\n", flush=True)
            print(f"  export ATOLL_SOCKET={self.environment['ATOLL_SOCKET']}")
            for words in ("instance start web1", "instance list", "job list", "lab status demo", "lab kill -L demo node2", "lab down demo"):
                print(f"  .venv/bin/atoll {words}")
        else:
            remove(NAME)
            print(f"\nThat was it, in {took:.0f} s; everything is gone again. Next:\n")
            print("  make demo KEEP=1           the same, and the lab stays for you to play with")
            print("  .venv/bin/atoll lab up     an empty lab; then: .venv/bin/atoll --help")
            print("  docs/tutorial/first-cluster.md   your own cluster")


def main() -> None:
    """``python -m atoll.lab.demo``; ``KEEP=1`` leaves the lab."""
    root = os.geteuid() == 0
    if not root:
        print("You are not root. Namespaces, loop devices and real guests need it; this is the same story with plain processes and")
        print("the fake hypervisor. For the real one: sudo make demo\n")
    if root and shutil.which("qemu-system-x86_64") is None:
        print("Error: qemu-system-x86_64 is not installed\nNext: make demo (it installs what it needs)", file=sys.stderr)
        sys.exit(9)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    demo = Demo(root=root, keep=keep)
    try:
        demo.run()
    except AtollError as error:
        print(f"\nError: {error.message}\nNext: {error.hint}", file=sys.stderr)
        if not keep:
            remove(NAME)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nStopped; cleaning up.")
        remove(NAME)
        sys.exit(130)


if __name__ == "__main__":
    main()
