#!/usr/bin/env bash
# Starts a QEMU guest whose network interfaces are served by vnicd over vhost-user.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: qemu/launch.sh --vnic socket=PATH[,mac=MAC][,queues=N][,packed=on] [options] [-- QEMU ARGUMENTS]

  --vnic socket=PATH[,mac=MAC][,queues=N][,packed=on]
                      one virtual NIC served by vnicd at PATH, with packed rings if asked for; may be repeated
                      (default: no NIC)
  --kernel FILE       a kernel (default: the small guest of qemu/build-guest-image.sh, built if need be)
  --initrd FILE       its initramfs
  --append TEXT       added to the kernel's command line
  --disk FILE         boot this disk image instead (raw or qcow2)
  --memory SIZE       guest memory (default 256M)
  --smp N             virtual CPUs (default 2)
  --name NAME         the guest's name (default vnic-guest)
  --accel auto|kvm|tcg
                      auto (default) uses KVM only where a probe shows that a guest truly boots on it
  --console FILE      write the console to FILE (default: this terminal; leave with Ctrl-A X)
  --agent SOCKET      put the second serial port, where the guest agent listens, on this Unix socket
  --dry-run           print the QEMU command and exit
  --probe             print which accelerator `auto` means here, and exit
  --shell             with the default guest: a shell on the console instead of the agent

The guest's memory is a shared memfd, as vhost-user needs. Each NIC reconnects within a second when vnicd restarts.

Environment:
  VNIC_CACHE          where the default guest and the outcome of the KVM probe are kept (default: .cache/guest)
  QEMU                the QEMU binary (default: qemu-system-x86_64)

Example, with vnicd --port name=web,socket=/run/vnic/web.sock:
  qemu/launch.sh --disk debian.qcow2 --memory 1G --vnic socket=/run/vnic/web.sock,mac=52:54:00:00:00:01,queues=2
TEXT
}

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${VNIC_CACHE:-$root/.cache/guest}
qemu=${QEMU:-qemu-system-x86_64}
vnics=()
extra=()
kernel="" initrd="" append="" disk="" memory=256M smp=2 name=vnic-guest accel=auto console="" agent=""
dry_run=no probe_only=no shell=no
while [ $# -gt 0 ]; do
    case "$1" in
        --vnic | --kernel | --initrd | --append | --disk | --memory | --smp | --name | --accel | --console | --agent)
            [ $# -ge 2 ] || fail "$1 needs a value (see --help)"
            case "$1" in
                --vnic) vnics+=("$2") ;;
                --kernel) kernel=$2 ;;
                --initrd) initrd=$2 ;;
                --append) append=$2 ;;
                --disk) disk=$2 ;;
                --memory) memory=$2 ;;
                --smp) smp=$2 ;;
                --name) name=$2 ;;
                --accel) accel=$2 ;;
                --console) console=$2 ;;
                --agent) agent=$2 ;;
            esac
            shift
            ;;
        --dry-run) dry_run=yes ;;
        --probe) probe_only=yes ;;
        --shell) shell=yes ;;
        -h | --help) usage; exit 0 ;;
        --) shift; extra=("$@"); break ;;
        *) fail "unknown option '$1' (see --help)" ;;
    esac
    shift
done

command -v "$qemu" >/dev/null 2>&1 || fail "no $qemu: run scripts/setup-environment.sh (package qemu-system-x86)"

ensure_guest() {
    if [ ! -s "$cache/vmlinuz" ] || [ ! -s "$cache/initramfs.gz" ]; then
        "$root/qemu/build-guest-image.sh" >/dev/null
    fi
}

# /dev/kvm says little: nested hosts exist on which it opens but no ordinary kernel gets through its boot. So the probe
# boots the small guest and waits for its word. The outcome is kept until the kernel, QEMU or the guest changes.
probe_accelerator() {
    if [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; then
        echo tcg
        return
    fi
    ensure_guest
    local identity outcome log
    identity="$(uname -r) $("$qemu" --version | head -n 1) $(cat "$cache/kernel-package")"
    if [ "$(sed -n 1p "$cache/accelerator" 2>/dev/null)" = "$identity" ]; then
        sed -n 2p "$cache/accelerator"
        return
    fi
    echo "launch: probing whether a guest boots on KVM (up to 15 s, once)" >&2
    log=$(mktemp)
    # In a shell of its own, whose word about an aborted QEMU nobody needs.
    (timeout --kill-after=2 15 "$qemu" -nodefaults -no-user-config -machine q35,accel=kvm -cpu host -m 256M \
        -display none -no-reboot -kernel "$cache/vmlinuz" -initrd "$cache/initramfs.gz" \
        -append "console=ttyS0 panic=-1 vnic.probe" -serial "file:$log" </dev/null >/dev/null 2>&1 || true) 2>/dev/null
    if grep -q 'vnic-guest: booted' "$log"; then outcome=kvm; else outcome=tcg; fi
    rm -f "$log"
    printf '%s\n%s\n' "$identity" "$outcome" >"$cache/accelerator.$$"
    mv "$cache/accelerator.$$" "$cache/accelerator"
    echo "launch: guests use $outcome" >&2
    echo "$outcome"
}

if [ "$probe_only" = yes ]; then
    probe_accelerator
    exit 0
fi

case "$accel" in
    auto) accel=$(probe_accelerator) ;;
    kvm | tcg) ;;
    *) fail "--accel '$accel': choose auto, kvm or tcg" ;;
esac
if [ "$accel" = kvm ]; then cpu=host; else cpu=max; fi

command=("$qemu" -nodefaults -no-user-config -name "$name" -machine q35,memory-backend=ram -accel "$accel" -cpu "$cpu"
    -smp "$smp" -m "$memory" -object "memory-backend-memfd,id=ram,size=$memory,share=on" -display none)

if [ -n "$disk" ]; then
    [ -z "$kernel$initrd" ] || fail "--disk and --kernel/--initrd exclude each other"
    [ -r "$disk" ] || fail "cannot read the disk image $disk"
    command+=(-drive "file=$disk,if=virtio")
else
    if [ -z "$kernel" ]; then
        [ "$dry_run" = yes ] || ensure_guest
        kernel=$cache/vmlinuz
        initrd=${initrd:-$cache/initramfs.gz}
    fi
    if [ "$shell" = yes ]; then append="vnic.shell $append"; fi
    command+=(-kernel "$kernel" -append "console=ttyS0 panic=-1 quiet ${append}")
    if [ -n "$initrd" ]; then command+=(-initrd "$initrd"); fi
fi

if [ -n "$console" ]; then
    command+=(-serial "file:$console")
else
    command+=(-chardev stdio,id=console,mux=on,signal=off -serial chardev:console -mon chardev=console)
fi
if [ -n "$agent" ]; then
    command+=(-chardev "socket,id=agent,path=$agent,server=on,wait=off" -serial chardev:agent)
fi

index=0
for vnic in "${vnics[@]+"${vnics[@]}"}"; do
    socket="" mac="" queues=1 packed=off
    IFS=, read -r -a fields <<<"$vnic"
    for field in "${fields[@]}"; do
        case "$field" in
            socket=*) socket=${field#socket=} ;;
            mac=*) mac=${field#mac=} ;;
            queues=*) queues=${field#queues=} ;;
            packed=on | packed=off) packed=${field#packed=} ;;
            *) fail "--vnic '$vnic': unknown key or value in '$field' (socket, mac, queues, packed=on|off)" ;;
        esac
    done
    [ -n "$socket" ] || fail "--vnic '$vnic': no socket=PATH"
    case "$queues" in '' | *[!0-9]* | 0) fail "--vnic '$vnic': queues=$queues is no positive number" ;; esac
    device="virtio-net-pci,netdev=net$index,romfile="
    if [ -n "$mac" ]; then device="$device,mac=$mac"; fi
    if [ "$packed" = on ]; then device="$device,packed=on"; fi
    # A vector per queue, one for configuration changes, one for the control queue.
    if [ "$queues" -gt 1 ]; then device="$device,mq=on"; fi
    # Without KVM there are no interrupts by eventfd, and QEMU 7.2 then follows a null pointer when a guest unmasks an
    # MSI-X vector of a vhost-user device: one INTx line for all queues instead.
    if [ "$accel" = tcg ]; then
        device="$device,vectors=0"
    elif [ "$queues" -gt 1 ]; then
        device="$device,vectors=$((2 * queues + 2))"
    fi
    command+=(-chardev "socket,id=vnic$index,path=$socket,reconnect=1"
        -netdev "vhost-user,id=net$index,chardev=vnic$index,queues=$queues" -device "$device")
    index=$((index + 1))
done
command+=("${extra[@]+"${extra[@]}"}")

if [ "$dry_run" = yes ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
