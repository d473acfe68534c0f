#!/bin/sh
# Makes sure that the tests in a browser find one. A machine that has Chromium or Chrome is left alone; on Debian it is
# installed, as root; elsewhere this says how. Never fails: without a browser those tests are skipped, and say so.
set -eu

for name in "${LORIKEET_CHROMIUM:-chromium}" chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then exit 0; fi
done

say() { printf '%s\n' "$*" >&2; }
skip() {
  say "No Chromium found: $1, or set LORIKEET_CHROMIUM. The tests in a browser are skipped."
  exit 0
}

ID=
[ -r /etc/os-release ] && . /etc/os-release
# Ubuntu's package only starts the snap.
[ "$ID" = debian ] || skip "install it or Google Chrome"
command='apt-get install -y --no-install-recommends chromium'
root=
if [ "$(id -u)" != 0 ]; then
  sudo -n true 2>/dev/null || skip "as root: $command"
  root=sudo
fi

say "No Chromium found: installing it for the tests in a browser (about 100 MB)."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
options='-q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3'
{ $root apt-get $options update && $root env DEBIAN_FRONTEND=noninteractive $command $options; } >"$log" 2>&1 || {
  cat "$log" >&2
  skip "it could not be installed (see above); the command was: $command"
}
