//! What each NIC must have.

use super::{Finding, Findings, Level};
use crate::host::channels;
use crate::host::netlink::netdev::{
    DeviceFeatures, XDP_BASIC, XDP_REDIRECT, XDP_RX_SG, XSK_TX_CHECKSUM, XSK_ZEROCOPY,
};
use crate::host::survey::NicFacts;

/// Frames of at most this many payload bytes fit one chunk, behind the headroom that the kernel keeps for XDP.
const SINGLE_CHUNK_MTU: u32 = 3500;
/// A frame has at most this many chunks.
const MAX_CHUNKS: u32 = 4;

pub(super) fn judge(facts: &NicFacts) -> Vec<Finding> {
    let mut findings = Findings::of(Some(&facts.name));
    if !facts.exists {
        findings.add(
            Level::Problem,
            "interface",
            "there is no such interface",
            "vnicd refuses to start with it",
            "ip link (and `ip netns exec NAME vnic doctor` for another network namespace)",
        );
        return findings.list;
    }
    if !facts.ethernet {
        findings.add(
            Level::Problem,
            "interface",
            "is not an Ethernet interface",
            "guests send Ethernet frames",
            "choose another interface",
        );
        return findings.list;
    }
    interface(facts, &mut findings);
    xdp(facts, &mut findings);
    queues(facts, &mut findings);
    mtu(facts, &mut findings);
    offloads(facts, &mut findings);
    filters(facts, &mut findings);
    findings.list
}

fn interface(facts: &NicFacts, findings: &mut Findings) {
    use Level::{Note, Problem};
    let name = &facts.name;
    if matches!(facts.kind.as_deref(), Some("bridge" | "bond" | "team")) {
        findings.add(
            Problem,
            "interface",
            format!("is a {}", facts.kind.as_deref().unwrap_or_default()),
            "AF_XDP drives NICs, not what is made of them",
            "give vnicd its member interfaces",
        );
    }
    if let Some(master) = &facts.master {
        findings.add(
            Problem,
            "interface",
            format!("belongs to {master}"),
            "both would want its frames; vnicd refuses to start with it",
            format!("ip link set dev {name} nomaster"),
        );
    }
    match (facts.up, facts.carrier) {
        (false, _) => findings.add(
            Problem,
            "link",
            "is down",
            "vnicd refuses to start with it",
            format!("ip link set dev {name} up"),
        ),
        (true, false) => findings.add(
            Level::Warning,
            "link",
            "has no carrier",
            "sessions use the other NICs until it has one",
            format!("check the cable and the switch: ethtool {name}"),
        ),
        (true, true) => findings.ok("link", "is up and has a carrier"),
    }
    if facts.default_route {
        findings.add(
            Problem,
            "default-route",
            "carries the host's default route",
            "a mistake would cut the host off, so vnicd refuses it; the host keeps its own frames on it all the same",
            "another NIC, or vnicd --allow-default-route-nic",
        );
    }
    match &facts.driver {
        Some(driver) => findings.ok("driver", driver),
        None => findings.add(Note, "driver", "not known", "", ""),
    }
}

fn xdp(facts: &NicFacts, findings: &mut Findings) {
    use Level::{Note, Problem, Warning};
    let name = &facts.name;
    if let Some(other) = facts.xdp {
        findings.add(
            Problem,
            "xdp-program",
            format!("XDP program {} is attached ({})", other.program, other.mode),
            "only one can be; if it is not that of a vnicd that runs now, vnicd cannot start with this NIC",
            format!(
                "bpftool prog show id {}, then ip link set dev {name} xdp off",
                other.program
            ),
        );
    }
    let Some(features) = facts.features else {
        findings.add(
            Note,
            "xdp-mode",
            "the kernel does not tell what the driver can do (6.3 and later do)",
            "vnicd tries native XDP and zero-copy first and falls back",
            "vnic nics shows what it got",
        );
        return;
    };
    let native = XDP_BASIC | XDP_REDIRECT;
    if features.xdp & native == native {
        findings.ok("xdp-mode", "native: the driver runs XDP programs");
    } else {
        findings.add(
            Warning,
            "xdp-mode",
            "skb: the driver does not run XDP programs",
            "each frame becomes an skb first, and is copied",
            "a NIC whose driver has native XDP (ixgbe, i40e, ice, igb, mlx5, virtio_net, ...)",
        );
    }
    zero_copy(&features, findings);
}

fn zero_copy(features: &DeviceFeatures, findings: &mut Findings) {
    if features.xdp & XSK_ZEROCOPY == 0 {
        findings.add(
            Level::Note,
            "zero-copy",
            "no: frames are copied between the driver and frame memory",
            "zerocopy=require would be refused, and one core moves fewer frames",
            "",
        );
        return;
    }
    let segments = features.zero_copy_segments;
    findings.ok("zero-copy", format!("yes, frames of up to {segments} buffers"));
    if features.xsk & XSK_TX_CHECKSUM == 0 {
        findings.add(
            Level::Note,
            "tx-checksum",
            "the driver takes no checksum requests in zero-copy mode",
            "vnicd computes the guests' checksums itself",
            "",
        );
    }
}

fn queues(facts: &NicFacts, findings: &mut Findings) {
    let (rx, tx) = (facts.rx_queues, facts.tx_queues);
    let what = match &facts.channels {
        Some(channels) if channels.combined_max > 0 => {
            format!("{} combined of {}", channels.combined, channels.combined_max)
        }
        Some(channels) => format!("{rx} rx of {}, {tx} tx of {}", channels.rx_max, channels.tx_max),
        None => format!("{rx} rx, {tx} tx"),
    };
    if tx < rx {
        let command = channels::command(&facts.name, facts.channels.as_ref(), tx);
        findings.add(
            Level::Note,
            "queues",
            what,
            "some receive queues have no transmit queue of their own",
            command,
        );
    } else {
        findings.ok("queues", what);
    }
    if rx > 8 {
        findings.add(
            Level::Note,
            "queue-memory",
            format!("{rx} receive queues"),
            "every one gets a socket and 16 MiB of frame memory, however few workers there are",
            format!("vnicd --nic {},queues=4,set-channels=on", facts.name),
        );
    }
}

fn mtu(facts: &NicFacts, findings: &mut Findings) {
    let mtu = facts.mtu;
    if mtu <= SINGLE_CHUNK_MTU {
        findings.ok("mtu", format!("{mtu}: a frame fits one chunk"));
        return;
    }
    let needed = (mtu + 14 + 256).div_ceil(4096);
    let lower = format!("ip link set dev {} mtu {SINGLE_CHUNK_MTU}", facts.name);
    if let Some(features) = facts.features {
        let segments = features.zero_copy_segments;
        if features.xdp & XDP_RX_SG == 0 {
            return findings.add(
                Level::Problem,
                "mtu",
                format!("{mtu}, and the driver gives XDP no frames of several buffers"),
                "the XDP program cannot be attached, or long frames are dropped",
                lower,
            );
        }
        if features.xdp & XSK_ZEROCOPY != 0 && segments > 0 && segments < needed {
            return findings.add(
                Level::Warning,
                "mtu",
                format!("{mtu} takes {needed} chunks, and zero-copy frames have at most {segments}"),
                "long frames are dropped",
                format!("vnicd --nic {},zerocopy=off, or {lower}", facts.name),
            );
        }
    }
    if needed > MAX_CHUNKS {
        return findings.add(
            Level::Warning,
            "mtu",
            format!("{mtu} takes {needed} chunks"),
            "vnicd moves frames of at most 4 chunks; longer ones are dropped and counted",
            format!("ip link set dev {} mtu 9000", facts.name),
        );
    }
    findings.add(
        Level::Note,
        "mtu",
        format!("{mtu}: a frame takes up to {needed} chunks"),
        "kernel 6.6 or later is needed for such frames",
        "",
    );
}

fn offloads(facts: &NicFacts, findings: &mut Findings) {
    let name = &facts.name;
    let on = |wanted: &str| facts.offloads.iter().any(|feature| feature == wanted);
    let mut clean = true;
    for (feature, option, level, why) in [
        (
            "rx-lro",
            "lro",
            Level::Problem,
            "the NIC joins frames before XDP sees them; most drivers then refuse the XDP program",
        ),
        (
            "rx-gro-hw",
            "rx-gro-hw",
            Level::Warning,
            "the NIC joins frames before XDP sees them; guests would get frames that nobody sent",
        ),
    ] {
        if on(feature) {
            clean = false;
            findings.add(
                level,
                "offloads",
                format!("{feature} is on"),
                why,
                format!("ethtool -K {name} {option} off"),
            );
        }
    }
    let virtual_peer = facts.kind.as_deref() == Some("veth");
    // veth leaves tags in frames that XDP sees, whatever the setting says.
    if on("rx-vlan-hw-parse") && !virtual_peer {
        clean = false;
        findings.add(
            Level::Warning,
            "vlan-stripping",
            "rx-vlan-offload is on: the NIC takes VLAN tags off before XDP sees them",
            "guests that use VLANs would get frames without their tags",
            format!("ethtool -K {name} rxvlan off"),
        );
    }
    if virtual_peer {
        clean = false;
        findings.add(
            Level::Note,
            "peer-checksums",
            "a veth: what is sent at its other end may lack its checksum",
            "a local sender leaves checksums to a NIC, which a veth is not",
            "ethtool -K PEER tx off, at the other end",
        );
    }
    if clean {
        findings.ok("offloads", "none in the way");
    }
}

fn filters(facts: &NicFacts, findings: &mut Findings) {
    if facts.promiscuity > 0 {
        findings.add(
            Level::Note,
            "promiscuity",
            "promiscuous: it receives what is sent to anyone",
            "vnicd has guests' addresses admitted one by one and does not need that; somebody else (tcpdump, a bridge) does",
            format!("ip -d link show dev {}", facts.name),
        );
    } else {
        findings.ok("filter", "receives its own addresses; vnicd adds the guests'");
    }
}
