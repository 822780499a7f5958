#!/bin/sh
# The guest's /init: loads virtio-net, says on the console that the kernel truly booted, and hands over to the agent.
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp

# qemu/launch.sh looks for this line when it probes whether guests boot on KVM.
echo "vnic-guest: booted $(cat /proc/sys/kernel/osrelease)" >/dev/console
case " $(cat /proc/cmdline) " in
    *" vnic.probe "*) poweroff -f ;;
esac

while read -r module; do
    insmod "/modules/$module" || echo "vnic-guest: cannot load $module" >/dev/console
done </modules/order
ip link set lo up

case " $(cat /proc/cmdline) " in
    *" vnic.shell "*)
        # For an operator who wants to look around: a shell on the console, no agent.
        echo "vnic-guest: shell" >/dev/console
        while true; do busybox setsid sh -c 'exec busybox cttyhack sh'; done
        ;;
esac

/bin/vnic-guest-agent --device /dev/ttyS1 </dev/null >/dev/console 2>&1
echo "vnic-guest: the agent ended with status $?" >/dev/console
poweroff -f
