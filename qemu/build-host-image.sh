#!/usr/bin/env bash
# Builds an image of a small host: the test guest's kernel and initramfs, with vnicd, vnic and the tests' own front-end
# added. QEMU boots it with NICs of a real driver (virtio_net), which a network namespace cannot offer.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: qemu/build-host-image.sh [--newest] PROGRAM...

  --newest        with the newest kernel that Debian has (trixie-backports), instead of this machine's release's
  PROGRAM         a program to put into /bin, with the libraries that it needs

Environment:
  VNIC_CACHE      the cache directory of the kernel (see qemu/build-guest-image.sh)

Prints the paths of the kernel and the initramfs when they are ready.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
options=()
programs=()
while [ $# -gt 0 ]; do
    case "$1" in
        --newest) options+=(--newest) ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown option '$1'" >&2; usage >&2; exit 2 ;;
        *) programs+=("$1") ;;
    esac
    shift
done
[ "${#programs[@]}" -gt 0 ] || { echo "error: no PROGRAM" >&2; usage >&2; exit 2; }

mapfile -t base < <("$root/qemu/build-guest-image.sh" "${options[@]+"${options[@]}"}")
[ "${#base[@]}" -eq 2 ] || { echo "error: no guest image (see above)" >&2; exit 1; }
cache=$(dirname "${base[0]}")
exec 9>"$cache/lock"
flock --wait 600 9 || { echo "error: another build holds $cache/lock" >&2; exit 1; }

inputs=$(cat "${BASH_SOURCE[0]}" "$cache/inputs" "${programs[@]}" | sha256sum | cut -d' ' -f1)
if [ ! -s "$cache/host.gz" ] || [ "$(cat "$cache/host-inputs" 2>/dev/null)" != "$inputs" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/tree/bin"
    for program in "${programs[@]}"; do
        # Their symbols are of no use in there, and make the image ten times as large.
        strip -o "$work/tree/bin/$(basename "$program")" "$program"
        for library in $(ldd "$program" | grep -o '/[^ ]*'); do
            mkdir -p "$work/tree$(dirname "$library")"
            cp -L "$library" "$work/tree$library"
        done
    done
    # The kernel unpacks one archive after the other.
    (cd "$work/tree" && find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0) | gzip -1 >"$work/added"
    cat "${base[1]}" "$work/added" >"$cache/host.new"
    mv "$cache/host.new" "$cache/host.gz"
    echo "$inputs" >"$cache/host-inputs"
    printf 'host image: built (%s KiB)\n' "$(du -k "$cache/host.gz" | cut -f1)" >&2
fi
echo "${base[0]}"
echo "$cache/host.gz"
