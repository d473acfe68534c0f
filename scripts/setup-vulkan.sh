#!/bin/sh
# Makes sure that this Linux machine has a WebGPU adapter. A machine that has one is left alone; a machine with a GPU but no
# driver is told which driver; a machine without a GPU gets Mesa's software Vulkan driver (Debian; elsewhere: what to install).
#
#   sh scripts/setup-vulkan.sh            do it
#   sh scripts/setup-vulkan.sh --check    only say what would be done (exit code 1 when something would)
#   LORIKEET_SOFTWARE=1                   the software driver, though the machine has a GPU
set -eu
cd "$(dirname "$0")/.."

check=no
[ "${1:-}" = --check ] && check=yes

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# --- 1. An adapter? Then there is nothing to do. ---

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Sets $adapter to its name, or returns 3 (none); what Dawn said stays in $log.
find_adapter() {
  status=0
  adapter=$(node scripts/adapter.mjs 2>"$log") || status=$?
  case $status in
    0 | 3) return $status ;;
    *)
      cat "$log" >&2
      say 'The npm package "webgpu" did not load (see above). If it is not found, install the dependencies first: npx pnpm@10 install.'
      die "Otherwise the system may be too old for it: it needs glibc 2.34 or newer (Debian 12, Ubuntu 22.04)."
      ;;
  esac
}

if find_adapter; then
  say "WebGPU adapter: $adapter"
  exit 0
fi

# --- 2. A GPU without a driver: the driver is the owner's choice. ---

missing_driver() {
  say "This machine has a GPU ($1) but no working Vulkan driver for it, so WebGPU finds no adapter."
  shift
  for line in "$@"; do say "  $line"; done
  say "To use Mesa's software driver instead (much slower): LORIKEET_SOFTWARE=1, and the same command again."
  exit 1
}

if [ "${LORIKEET_SOFTWARE:-}" != 1 ]; then
  if [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ]; then
    missing_driver NVIDIA \
      "Install the Vulkan part of the driver, of the same version as the kernel module (Debian: nvidia-vulkan-icd;" \
      "Ubuntu: libnvidia-gl-<version>) and libvulkan1. In a container: run it with NVIDIA_DRIVER_CAPABILITIES=all."
  fi
  if [ -e /dev/dxg ]; then
    missing_driver "Windows host, through WSL" \
      "Dawn needs Vulkan, and WSL's own layer (Mesa's dozen) does not pass; run Lorikeet in Windows itself to use the GPU."
  fi
  for node in /dev/dri/renderD*; do
    [ -e "$node" ] || continue
    vendor=$(cat "/sys/class/drm/${node##*/}/device/vendor" 2>/dev/null || echo unknown)
    case $vendor in
      0x10de) missing_driver NVIDIA "Install NVIDIA's own driver with its Vulkan part (Debian: nvidia-driver, nvidia-vulkan-icd) and libvulkan1." ;;
      # Displays of virtual machines and servers (virtio, VMware, VirtualBox, QEMU, ASPEED, Matrox, Cirrus): nothing to compute on.
      0x1af4 | 0x15ad | 0x80ee | 0x1234 | 0x1b36 | 0x1a03 | 0x102b | 0x1013) continue ;;
    esac
    if [ ! -r "$node" ] || [ ! -w "$node" ]; then
      missing_driver "$node, vendor $vendor" "You may not use $node. Join its group: sudo usermod -aG render $(id -un), then log in again."
    fi
    missing_driver "$node, vendor $vendor" \
      "Install Mesa's Vulkan drivers, 23 or newer (Debian, Ubuntu: mesa-vulkan-drivers libvulkan1; Debian 12: from bookworm-backports;" \
      "Fedora: mesa-vulkan-drivers vulkan-loader; Arch: vulkan-radeon or vulkan-intel)."
  done
fi

# --- 3. No GPU: Mesa's software driver (lavapipe), 25 or newer. ---

ID= VERSION_ID= VERSION_CODENAME= PRETTY_NAME=
[ -r /etc/os-release ] && . /etc/os-release

by_hand() {
  say "No WebGPU adapter and no GPU found. Install Mesa's software Vulkan driver (lavapipe), version 25 or newer, then run this again."
  say "  Ubuntu 24.04 or newer  apt-get install mesa-vulkan-drivers libvulkan1"
  say "  Fedora, RHEL           dnf install mesa-vulkan-drivers vulkan-loader"
  say "  Arch                   pacman -S vulkan-swrast vulkan-icd-loader"
  say "  openSUSE               zypper install libvulkan_lvp libvulkan1"
  say "Lorikeet does this by itself on Debian 12 and newer; this is ${PRETTY_NAME:-an unknown system}."
  exit 1
}

[ "$ID" = debian ] || by_hand
case $VERSION_ID in 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11) by_hand ;; esac

log_run() { "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }; }

# The addresses that apt has for a suite (whatever form its sources are written in), as far as it was updated.
repositories() {
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' "$@" 2>/dev/null || true
}

# bookworm's own Mesa is 22.3, too old for Dawn; its backports have 25. Sets $source_text if they have to be added.
suite=
source_file=/etc/apt/sources.list.d/lorikeet-bookworm-backports.sources
source_text=
plan() {
  if [ "$VERSION_CODENAME" = bookworm ]; then
    suite=bookworm-backports
    if [ -z "$(repositories "Codename: $suite")" ]; then
      mirror=$(repositories 'Codename: bookworm' 'Origin: Debian' | head -n 1)
      source_text="Types: deb
URIs: ${mirror:-http://deb.debian.org/debian}
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"
    fi
  fi
  install="apt-get install -y --no-install-recommends ${suite:+-t $suite }mesa-vulkan-drivers libvulkan1"
}

print_plan() {
  plan
  [ -z "$source_text" ] || printf "cat > %s <<'END'\n%s\nEND\n" "$source_file" "$source_text" >&2
  say "apt-get update"
  say "$install"
}

if [ $check = yes ]; then
  say "No WebGPU adapter and no GPU found. Would install Mesa's software Vulkan driver, as root:"
  print_plan
  exit 1
fi

root=
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    root=sudo
  else
    say "No WebGPU adapter and no GPU found. Mesa's software Vulkan driver is needed; run this as root, then the same command again:"
    print_plan
    exit 1
  fi
fi

say "No WebGPU adapter and no GPU found: installing Mesa's software Vulkan driver (about 55 MB)."
apt_options="-q -o APT::Update::Error-Mode=any -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3"
update() { log_run $root apt-get $apt_options update || say "apt-get update failed (see above); trying to install all the same."; }
update
plan
if [ -n "$source_text" ]; then
  printf '%s\n' "$source_text" | $root tee "$source_file" >/dev/null
  update
fi
log_run $root env DEBIAN_FRONTEND=noninteractive $install $apt_options || {
  [ -z "$source_text" ] || $root rm -f "$source_file"
  die "Mesa's software Vulkan driver could not be installed (see above). The command was: $install"
}
find_adapter || { cat "$log" >&2; die "Mesa's Vulkan driver is installed and there is still no WebGPU adapter; what Dawn said is above."; }
say "WebGPU adapter: $adapter"
