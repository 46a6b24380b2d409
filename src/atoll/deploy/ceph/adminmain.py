"""A process of its own that puts commands to Ceph's monitors, as a user with a keyring: librados may hang, and this can be killed.

Reads ``{"conf", "user", "commands": [{"command", "input", "manager"}], "pool"}`` on stdin and prints ``[{"rc", "out", "err"}]``;
it stops after the first that fails. ``pool``: initialise it for RBD in the end.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """See above. Exit code 3: no monitor answers, with the words on stderr."""
    import rados

    wanted = json.load(sys.stdin)
    settings = {"admin_socket": "", "log_file": "", "rados_mon_op_timeout": str(wanted["timeout"])}
    cluster = rados.Rados(conffile=wanted["conf"], rados_id=wanted["user"], conf=settings)
    try:
        cluster.connect(timeout=wanted["timeout"])
    except rados.Error as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    answers: list[dict[str, Any]] = []
    for item in wanted["commands"]:
        ask = cluster.mgr_command if item["manager"] else cluster.mon_command
        rc, out, err = ask(json.dumps(item["command"]), item["input"].encode(), timeout=wanted["timeout"])
        answers.append({"rc": rc, "out": out.decode(errors="replace"), "err": err})
        if rc:
            break
    if wanted.get("pool") and all(answer["rc"] == 0 for answer in answers):
        import rbd

        with cluster.open_ioctx(wanted["pool"]) as ioctx:
            rbd.RBD().pool_init(ioctx, True)
    json.dump(answers, sys.stdout)
    cluster.shutdown()


if __name__ == "__main__":
    main()
