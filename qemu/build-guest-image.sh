#!/usr/bin/env bash
# Builds the small guest that the demo and the end-to-end tests boot: Debian's cloud kernel and an initramfs with a
# static busybox, the virtio-net modules and the guest agent. Nothing is installed on the machine; all of it lands in
# the cache directory, and is built again only when an input changed.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: qemu/build-guest-image.sh [--newest] [--agent BINARY] [--force] [--refresh-kernel]

  --newest           with the newest kernel that Debian has (trixie-backports), instead of this machine's release's
  --agent BINARY     a static guest agent (default: built here, with cargo, in target/guest)
  --force            build the initramfs even if no input changed
  --refresh-kernel   look for a newer kernel package instead of using the one in the cache

Environment:
  VNIC_CACHE         the cache directory (default: .cache/guest in the source tree, .cache/newest with --newest)

Prints the paths of the kernel and the initramfs when they are ready.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=""
newest=no
agent=""
force=no
refresh=no
while [ $# -gt 0 ]; do
    case "$1" in
        --agent)
            [ $# -ge 2 ] || { echo "error: --agent needs a path" >&2; exit 2; }
            agent=$2
            shift
            ;;
        --newest) newest=yes ;;
        --force) force=yes ;;
        --refresh-kernel) refresh=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

if [ "$newest" = yes ]; then cache=$root/.cache/newest; else cache=$root/.cache/guest; fi
cache=${VNIC_CACHE:-$cache}

say() { printf 'guest image: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

for tool in cpio gzip dpkg-deb apt-get apt-cache sha256sum flock timeout; do
    command -v "$tool" >/dev/null 2>&1 || fail "'$tool' is missing: run scripts/setup-environment.sh"
done
busybox=$(command -v busybox || true)
[ -n "$busybox" ] || fail "busybox is missing: run scripts/setup-environment.sh (package busybox-static)"
# The dynamic busybox of a default Debian would find no libraries in the initramfs.
if head -c 4096 "$busybox" | grep -q 'ld-linux'; then
    fail "$busybox is not static: install busybox-static (scripts/setup-environment.sh does)"
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock --wait 600 9 || fail "another build of the guest image holds $cache/lock"

# --- the kernel -------------------------------------------------------------------------------------------------
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt downloads as its own user where it can.
chmod 755 "$work"

# With --newest apt works in a directory of its own, on one more suite of the mirror that this machine uses, so that neither the
# machine's package lists nor its choice of packages change.
apt_options=()
private_apt() {
    local mirror state=$cache/apt
    mirror=$(apt-get indextargets --format '$(SITE)|$(RELEASE)' 'Created-By: Packages' | grep -v -e security -e updates |
        sed -n 's/|.*//p' | head -n 1)
    [ -n "$mirror" ] || fail "apt knows no Debian mirror: is there one in /etc/apt/sources.list.d?"
    mkdir -p "$state"/state/lists/partial "$state"/cache/archives/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie-backports main" >"$state/sources.list"
    apt_options=(-o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State=$state/state" -o Dir::State::status=/dev/null -o "Dir::Cache=$state/cache"
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
    timeout 300 apt-get "${apt_options[@]}" update -qq </dev/null >&2 || fail "apt-get update failed: check the network"
}

# What a package depends on, by the beginning of the names.
dependencies() { # package, beginning
    apt-cache "${apt_options[@]+"${apt_options[@]}"}" depends "$1" 2>/dev/null |
        sed -n "s/^ *Depends: \\($2[^ ]*\\).*/\\1/p"
}

# The packages that hold the kernel and its modules: one, or two since Debian split them.
resolve_kernel() {
    local image
    image=$(dependencies linux-image-cloud-amd64 'linux-image-[0-9]' | head -n 1)
    [ -n "$image" ] || return 0
    { dependencies "$image" 'linux-binary-[0-9]'; dependencies "$image" 'linux-modules-[0-9]'; } >"$work/split"
    if [ -s "$work/split" ]; then cat "$work/split"; else echo "$image"; fi
}

if [ "$refresh" = yes ] || [ ! -s "$cache/vmlinuz" ] || [ ! -s "$cache/kernel-package" ] || [ ! -d "$cache/modules" ]; then
    if [ "$newest" = yes ]; then private_apt; fi
    mapfile -t packages < <(resolve_kernel)
    if [ "${#packages[@]}" -eq 0 ] && [ "$newest" = no ]; then
        say "refreshing the package lists"
        timeout 300 apt-get update -qq </dev/null >&2 || fail "apt-get update failed: check the network"
        mapfile -t packages < <(resolve_kernel)
    fi
    [ "${#packages[@]}" -gt 0 ] ||
        fail "no package linux-image-cloud-amd64: is this Debian with its main archive in sources.list?"
    say "downloading ${packages[*]} (about 30 MB, once)"
    download() {
        (cd "$work" &&
            timeout 600 apt-get "${apt_options[@]+"${apt_options[@]}"}" download -qq "${packages[@]}" </dev/null >&2)
    }
    # Old package lists name versions that the archive no longer has.
    download || { [ "$newest" = no ] && timeout 300 apt-get update -qq </dev/null >&2 && download; } ||
        fail "cannot download ${packages[*]}: check the network and /etc/apt/sources.list"
    for package in "$work"/linux-*.deb; do dpkg-deb -x "$package" "$work/kernel"; done
    kernel_image=$(find "$work/kernel" -name 'vmlinuz*' | head -n 1)
    [ -n "$kernel_image" ] || fail "${packages[*]} hold no vmlinuz"
    # Newer packages keep it among the modules, which are moved away.
    mv "$kernel_image" "$work/vmlinuz"
    version=$(find "$work/kernel" -path '*/lib/modules/*' -prune -printf '%f\n' | head -n 1)
    modules=$(find "$work/kernel" -type d -path "*/lib/modules/$version" | head -n 1)
    [ -n "$modules" ] || fail "${packages[*]} hold no modules for $version"
    find "$modules" -name '*.ko.xz' -exec xz -d {} +
    find "$modules" -name '*.ko.zst' -exec zstd -q -d --rm {} +
    mkdir -p "$work/depmod/lib/modules"
    mv "$modules" "$work/depmod/lib/modules/$version"
    "$busybox" depmod -b "$work/depmod" "$version"
    modules=$work/depmod/lib/modules/$version

    # virtio-net over PCI and all it depends on, in the order in which they must be loaded.
    rm -rf "$cache/modules.new"
    mkdir -p "$cache/modules.new"
    list=$cache/modules.new/order
    : >"$list"
    add_module() { # path in the module tree
        local name=${1##*/} dependency
        if grep -qx "$name" "$list"; then return 0; fi
        for dependency in $(sed -n "s|^$1: *||p" "$modules/modules.dep"); do add_module "$dependency"; done
        if grep -qx "$name" "$list"; then return 0; fi
        cp "$modules/$1" "$cache/modules.new/$name"
        echo "$name" >>"$list"
    }
    for wanted in virtio_pci virtio_net; do
        path=$(sed -n "s|^\([^:]*/$wanted\.ko\):.*|\1|p" "$modules/modules.dep" | head -n 1)
        # A kernel that has it built in needs no module.
        if [ -n "$path" ]; then add_module "$path"; fi
    done
    rm -rf "$cache/modules"
    mv "$cache/modules.new" "$cache/modules"
    cp "$work/vmlinuz" "$cache/vmlinuz.new"
    mv "$cache/vmlinuz.new" "$cache/vmlinuz"
    basename -a "$work"/linux-*.deb | paste -sd ' ' >"$cache/kernel-package"
    say "kernel $version with modules $(tr '\n' ' ' <"$cache/modules/order")"
fi

# --- the agent --------------------------------------------------------------------------------------------------
if [ -z "$agent" ]; then
    command -v cargo >/dev/null 2>&1 || PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    command -v cargo >/dev/null 2>&1 || fail "no cargo: install a Rust toolchain, or name a built agent with --agent"
    target=x86_64-unknown-linux-gnu
    say "building the guest agent (static)"
    # Its own target directory, and --target, so that the static flag reaches neither build scripts nor other builds.
    CARGO_PROFILE_DEV_DEBUG=0 RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --quiet --manifest-path "$root/Cargo.toml" --package vnic-tests --bin vnic-guest-agent --no-default-features \
        --target "$target" --target-dir "${CARGO_TARGET_DIR:-$root/target}/guest" </dev/null >&2 ||
        fail "the guest agent does not build (see above)"
    agent=${CARGO_TARGET_DIR:-$root/target}/guest/$target/debug/vnic-guest-agent
fi
[ -x "$agent" ] || fail "no guest agent at $agent"

# --- the initramfs ----------------------------------------------------------------------------------------------
inputs=$(cat "${BASH_SOURCE[0]}" "$root/qemu/guest-init.sh" "$busybox" "$agent" "$cache/kernel-package" | sha256sum | cut -d' ' -f1)
if [ "$force" = yes ] || [ ! -s "$cache/initramfs.gz" ] || [ "$(cat "$cache/inputs" 2>/dev/null)" != "$inputs" ]; then
    tree=$work/tree
    mkdir -p "$tree"/{bin,dev,proc,sys,run,tmp,modules}
    cp "$busybox" "$tree/bin/busybox"
    for applet in sh mount insmod ip ping ping6 arping cat ls echo sleep reboot poweroff dmesg ps; do
        ln -s busybox "$tree/bin/$applet"
    done
    cp "$agent" "$tree/bin/vnic-guest-agent"
    cp "$cache/modules/"* "$tree/modules/"
    cp "$root/qemu/guest-init.sh" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox" "$tree/bin/vnic-guest-agent"
    (cd "$tree" && find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0) | gzip -1 >"$cache/initramfs.new"
    mv "$cache/initramfs.new" "$cache/initramfs.gz"
    echo "$inputs" >"$cache/inputs"
    say "initramfs built ($(du -k "$cache/initramfs.gz" | cut -f1) KiB)"
else
    say "up to date"
fi
echo "$cache/vmlinuz"
echo "$cache/initramfs.gz"
