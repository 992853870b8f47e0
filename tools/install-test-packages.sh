#!/usr/bin/env bash
# Install the system packages that the tests use: a browser and a database server. Prints nothing where both are installed.
# Without root or password-free sudo, or without apt-get, it says in one line what to install, and the tests that need it are
# skipped.
set -euo pipefail

missing=()
command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ]; then
  as_root=()
elif sudo -n true 2>/dev/null; then
  as_root=(sudo)
else
  as_root=(false)
fi
install() {
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
if command -v apt-get >/dev/null && install; then
  exit 0
fi
echo "Not installed: ${missing[*]}. Tests that need them are skipped; run: sudo apt-get install ${missing[*]}" >&2
