#!/usr/bin/env bash
# Installs what Atoll needs to run, be tried and be tested on Debian 12: packages, and a virtual environment in .venv.
# Nothing is done twice. Without root and sudo it says what is missing and goes on as far as it can.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(python3-venv qemu-system-x86 qemu-utils iproute2 util-linux xfsprogs e2fsprogs kmod procps
  busybox-static lz4 cpio xz-utils binutils gcc libc6-dev openssh-client)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then as_root=(sudo)
    elif command -v sudo >/dev/null && [ -t 0 ]; then as_root=(sudo)
    else
      echo "Not root, and no sudo. These packages are missing: ${missing[*]}" >&2
      echo "Next: as root: apt-get install ${missing[*]}" >&2
      dpkg-query -W python3-venv >/dev/null 2>&1 || exit 9
      as_root=(false)
    fi
  fi
  if [ "${as_root[*]-}" != false ]; then
    echo "Installing ${#missing[@]} Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
fi

stamp=.venv/.installed
wanted=$(sha256sum pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Making the virtual environment .venv (once)"
  # The distribution's Python: bindings such as librbd's come only for it.
  /usr/bin/python3 -m venv --system-site-packages .venv
  for attempt in 1 2 3; do
    if .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,check]'; then break; fi
    [ "$attempt" -lt 3 ] || { echo "pip could not install Atoll's dependencies" >&2; exit 9; }
  done
  echo "$wanted" > "$stamp"
fi
