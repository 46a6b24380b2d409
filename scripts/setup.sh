#!/bin/bash
# Installs what Atoll needs on Debian 12 or later, and only what is missing. Made for `make`; may be run by hand, and again at any time.
#
#   scripts/setup.sh demo     programs of the host (QEMU, file systems, ...) and a virtual environment in .venv
#   scripts/setup.sh test     the same, and what the tests need
#   scripts/setup.sh model    only the virtual environment, and the model checker with its compiler
#   scripts/setup.sh check    only the virtual environment, with what tests and checkers need
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(python3 python3-venv)
host=(mount util-linux qemu-system-x86 qemu-utils busybox-static xfsprogs iproute2 lz4 cpio binutils gcc libc6-dev openssl procps openssh-client mmdebstrap extlinux e2fsprogs)
case ${1:-demo} in
    demo) extras="" packages+=("${host[@]}") ;;
    test) extras="[test]" packages+=("${host[@]}" bindfs spin
        ceph-mon ceph-osd ceph-mgr ceph-common ceph-base python3-rbd python3-rados qemu-block-extra
        kmod udev rbd-nbd) ;;
    model) extras="" packages+=(spin gcc libc6-dev) ;;
    check) extras="[test,check]" ;;
    docs) extras="[docs]" ;;
    *) echo "usage: scripts/setup.sh demo|test|model|check|docs" >&2; exit 2 ;;
esac

# Two makes at the same time take turns.
exec 9<scripts/setup.sh
flock 9

log=$(mktemp "${TMPDIR:-/tmp}/atoll-setup.XXXXXX")
trap 'rm -f "$log"' EXIT

# quietly TEXT COMMAND...: say what is done, a dot for every 2 seconds, and how long it took; after a failure the end of its output.
quietly() {
    local text=$1 began=$SECONDS dots status=0
    shift
    printf '%s ' "$text"
    (while sleep 2; do printf .; done) 9<&- &
    dots=$!
    "$@" >"$log" 2>&1 </dev/null 9<&- || status=$?
    kill "$dots" 2>/dev/null || true
    wait "$dots" 2>/dev/null || true
    if [ "$status" -eq 0 ]; then
        echo "done ($((SECONDS - began)) s)"
    else
        echo "failed"
        tail -n 12 "$log" | sed 's/^/    /'
    fi
    return "$status"
}

# Networks have bad moments.
thrice() {
    "$@" || { sleep 3; "$@"; } || { sleep 10; "$@"; }
}

# --- programs of the host ---

missing=()
if command -v dpkg-query >/dev/null; then
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
    done
else
    echo "This is not Debian. Install what these packages bring there: ${packages[*]}"
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && [ "${#missing[@]}" -gt 0 ] && sudo -v; }; } || as_root=(no)
fi
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)

if [ "${#missing[@]}" -gt 0 ]; then
    if [ "${as_root[*]}" = no ]; then
        echo "These packages are missing, and only root can install them: ${missing[*]}"
        echo "    sudo apt-get install --no-install-recommends ${missing[*]}"
        case " ${missing[*]} " in
            *" python3 "* | *" python3-venv "*) echo "Nothing works without python3-venv." >&2; exit 1 ;;
        esac
        echo "Going on without them: what needs them is left out (the demo plays with the fake hypervisor)."
    else
        thrice quietly "Reading the lists of Debian's packages" "${apt[@]}" update
        thrice quietly "Installing ${missing[*]}" "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
    fi
elif [ "${1:-demo}" != check ] && [ "${as_root[*]}" != no ] && command -v apt-get >/dev/null &&
    ! ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1; then
    # The kernel of the demo's guest is downloaded later: apt has to know where from.
    thrice quietly "Reading the lists of Debian's packages" "${apt[@]}" update
fi

# --- the virtual environment ---

# Debian's own Python: storage libraries such as librbd have bindings for that one only.
python=/usr/bin/python3
[ -x "$python" ] || python=python3
wanted="$("$python" -V) $(pwd) $extras $(sha256sum pyproject.toml)"
stamp=.venv/.stamp
if [ -e .venv ] && [ ! -w .venv ]; then
    echo "Another user made .venv. Next: sudo rm -r .venv, and make again; or make as that user" >&2
    exit 1
fi
# A richer environment serves a smaller wish too.
for rich in "$extras" "[test]" "[test,check]"; do
    [ "${#rich}" -ge "${#extras}" ] || continue
    [ "$extras" != "[docs]" ] || [ "$rich" = "[docs]" ] || continue
    [ "$(cat "$stamp" 2>/dev/null || true)" = "${wanted/" $extras "/" $rich "}" ] && exit 0
done
if [ ! -x .venv/bin/pip ] || ! .venv/bin/python -c '' 2>/dev/null; then
    quietly "Making a virtual environment in .venv" "$python" -m venv --clear --system-site-packages .venv
fi
thrice quietly "Installing Python packages into .venv" .venv/bin/pip install --quiet --disable-pip-version-check --retries 5 -e ".$extras"
echo "$wanted" >"$stamp"
