#!/usr/bin/env bash
# Prepares a Debian machine for building, testing and demonstrating vnic.
#
# Installs only what is missing, changes only what is not yet as it should be, and says which was which.
# With --check it changes nothing and exits with 1 if something is missing.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/setup-environment.sh [--check] [--huge-pages N]

  --check          say what is there and what is missing; change nothing (exit status 1 if something is missing)
  --huge-pages N   how many 2 MiB huge pages to reserve at least (default 512; 0 leaves them alone)
TEXT
}

check_only=no
huge_pages=512
while [ $# -gt 0 ]; do
    case "$1" in
        --check) check_only=yes ;;
        --huge-pages)
            [ $# -ge 2 ] || { echo "error: --huge-pages needs a number" >&2; exit 2; }
            huge_pages=$2
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case "$huge_pages" in
    '' | *[!0-9]*) echo "error: --huge-pages '$huge_pages' is not a number" >&2; exit 2 ;;
esac

missing_something=no
present() { printf '  ok        %s\n' "$*"; }
changed() { printf '  changed   %s\n' "$*"; }
missing() { printf '  missing   %s\n' "$*"; missing_something=yes; }
warning() { printf '  warning   %s\n' "$*"; }

command -v apt-get >/dev/null 2>&1 && command -v dpkg-query >/dev/null 2>&1 || {
    echo "error: this script needs Debian's apt-get and dpkg. On another distribution install the equivalents of:" >&2
    echo "       QEMU (x86), a static busybox, cpio, iproute2, ethtool, clang, llvm, libbpf headers, xz, zstd, a C compiler" >&2
    exit 1
}
if [ "$check_only" = no ] && [ "$(id -u)" -ne 0 ]; then
    echo "error: installing packages and reserving huge pages needs root: run it with sudo, or use --check" >&2
    exit 1
fi

# Which package serves what: the build (a C linker for crates, clang and BPF headers for the XDP program), the guest
# (QEMU, busybox, cpio, xz, zstd), and the tests (ip, ethtool; systemd for systemd-socket-activate and systemd-analyze;
# libvirt for the domain that a real libvirtd starts, by hand and in a folder of the test: no service of it is needed;
# dpdk-dev for testpmd: 33 MB with its libraries).
packages="build-essential clang llvm libbpf-dev qemu-system-x86 busybox-static cpio xz-utils zstd iproute2
    iputils-ping ethtool util-linux ca-certificates systemd libvirt-daemon libvirt-clients libvirt-daemon-driver-qemu
    dpdk-dev"

echo "Packages"
to_install=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    if [ "$state" = installed ]; then
        present "$package"
    elif [ "$check_only" = yes ]; then
        missing "$package"
    else
        to_install="$to_install $package"
    fi
done
if [ -n "$to_install" ]; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    export DEBIAN_FRONTEND=noninteractive
    echo "  installing$to_install (this can take a minute)"
    # shellcheck disable=SC2086 # a list of package names
    {
        apt-get update </dev/null &&
            apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 $to_install </dev/null
    } >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        echo "error: apt-get failed (see above). Check the network and /etc/apt/sources.list, then run this again." >&2
        exit 1
    }
    for package in $to_install; do changed "installed $package"; done
fi

echo "Rust"
wanted_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../Cargo.toml")
if command -v cargo >/dev/null 2>&1 && command -v rustc >/dev/null 2>&1; then
    # "rustc 1.95.0 (...)"; pre-releases have a suffix such as 1.95.0-nightly.
    have_rust=$(rustc --version 2>/dev/null | cut -d ' ' -f 2 | cut -d - -f 1) || true
    if [ "$(printf '%s\n' "$wanted_rust" "$have_rust" | sort -V | head -n 1)" = "$wanted_rust" ]; then
        present "$(rustc --version)"
    else
        missing "Rust $wanted_rust or later (this is ${have_rust:-none}): install rustup (https://rustup.rs), then 'rustup default stable'"
    fi
elif [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
    present "cargo in ${CARGO_HOME:-$HOME/.cargo}/bin (add that to PATH)"
else
    missing "Rust $wanted_rust or later: install rustup (https://rustup.rs), then 'rustup default stable'"
fi

echo "Huge pages (2 MiB; without them vnicd uses ordinary pages)"
pages_file=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
if [ "$huge_pages" -eq 0 ]; then
    present "left alone"
elif [ ! -r "$pages_file" ]; then
    warning "this kernel offers no 2 MiB huge pages"
else
    have=$(cat "$pages_file")
    if [ "$have" -ge "$huge_pages" ]; then
        present "$have reserved"
    elif [ "$check_only" = yes ]; then
        warning "$have reserved, $huge_pages wanted (optional)"
    else
        # Never take more than a quarter of what is free: a small machine must stay usable.
        available_kib=$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)
        affordable=$((have + available_kib / 4 / 2048))
        target=$huge_pages
        [ "$target" -le "$affordable" ] || target=$affordable
        [ "$target" -le "$have" ] || echo "$target" >"$pages_file" 2>/dev/null || true
        now=$(cat "$pages_file")
        if [ "$now" -gt "$have" ]; then
            changed "reserved $now (had $have; until the next boot)"
        fi
        [ "$now" -ge "$huge_pages" ] || warning "only $now of $huge_pages reserved: memory is scarce or fragmented"
    fi
fi

echo "Kernel"
if [ -c /dev/net/tun ]; then
    present "/dev/net/tun"
elif [ "$check_only" = no ] && modprobe tun 2>/dev/null && [ -c /dev/net/tun ]; then
    changed "loaded module tun"
else
    missing "/dev/net/tun (module tun): the tests' peers need it"
fi
if [ "$(sed -n 's/^\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' /proc/sys/kernel/osrelease | awk '{ print $1 * 1000 + $2 }')" -ge 5018 ]; then
    present "Linux $(cat /proc/sys/kernel/osrelease)"
else
    missing "a kernel of 5.18 or newer (this is $(cat /proc/sys/kernel/osrelease)): vnicd needs AF_XDP and XDP programs for frames of several buffers"
fi
if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
    present "/dev/kvm (qemu/launch.sh probes whether guests truly boot on it)"
else
    warning "no access to /dev/kvm: guests run on QEMU's emulation (TCG), which is slower"
fi

if [ "$missing_something" = yes ]; then
    echo "Something is missing (see above)."
    exit 1
fi
echo "Ready."
