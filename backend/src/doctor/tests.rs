use super::*;
use crate::host::netlink::ethtool::Channels;
use crate::host::netlink::link::AttachedXdp;
use crate::host::netlink::netdev::{DeviceFeatures, XDP_BASIC, XDP_REDIRECT, XDP_RX_SG, XSK_ZEROCOPY};

/// A host with nothing to complain about.
fn good_host() -> HostFacts {
    HostFacts {
        kernel_release: "6.18.1-test".into(),
        kernel_version: Some((6, 18)),
        af_xdp: true,
        bpf_jit: Some(true),
        may_lock_memory: true,
        memlock: Some(65536),
        open_files: Some(1 << 20),
        huge_pages: (512, 500),
        huge_page_kib: 2048,
        cpus: 8,
        isolated: "2-3".into(),
        nohz_full: "2-3".into(),
        governors: vec!["performance".into()],
        ..HostFacts::default()
    }
}

fn good_nic() -> NicFacts {
    NicFacts {
        name: "eth1".into(),
        exists: true,
        ethernet: true,
        driver: Some("ice".into()),
        up: true,
        carrier: true,
        mtu: 1500,
        rx_queues: 4,
        tx_queues: 4,
        channels: Some(Channels {
            combined: 4,
            combined_max: 16,
            ..Channels::default()
        }),
        features: Some(DeviceFeatures {
            xdp: XDP_BASIC | XDP_REDIRECT | XDP_RX_SG | XSK_ZEROCOPY,
            zero_copy_segments: 8,
            xsk: u64::MAX,
        }),
        ..NicFacts::default()
    }
}

#[test]
fn a_good_host_with_a_good_nic_is_well() {
    let diagnosis = diagnose(&good_host(), &[good_nic()]);
    assert_eq!(
        (diagnosis.verdict, diagnosis.exit_code()),
        (Level::Ok, 0),
        "{diagnosis:#?}"
    );
    let text = table(&diagnosis);
    assert!(text.contains("0 problems, 0 warnings, 0 notes"), "{text}");
}

#[track_caller]
fn found(diagnosis: &Diagnosis, check: &str, level: Level, words: &[&str]) {
    let of_check: Vec<&Finding> = diagnosis.findings.iter().filter(|f| f.check == check).collect();
    let text = format!("{of_check:#?}");
    assert!(
        of_check.iter().any(|f| f.level == level),
        "{check} {level:?}: {text}"
    );
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in {text}");
    }
    assert!(
        of_check
            .iter()
            .all(|f| f.level < Level::Warning || !f.why.is_empty() && !f.cure.is_empty()),
        "{text}"
    );
}

/// One fact that is wrong: the check that must find it, how bad that is, words of the finding.
type Case<F> = (fn(&mut F), &'static str, Level, &'static [&'static str]);

#[test]
fn each_fault_of_a_host_is_found_and_nothing_else() {
    let cases: &[Case<HostFacts>] = &[
        (
            |h| h.af_xdp = false,
            "af-xdp",
            Level::Problem,
            &["CONFIG_XDP_SOCKETS"],
        ),
        (
            |h| h.kernel_version = Some((5, 10)),
            "kernel",
            Level::Problem,
            &["5.18"],
        ),
        (
            |h| h.kernel_version = Some((6, 1)),
            "multi-buffer",
            Level::Note,
            &["6.6", "jumbo"],
        ),
        (
            |h| h.kernel_version = Some((6, 7)),
            "tx-metadata",
            Level::Note,
            &["6.8"],
        ),
        (
            |h| h.kernel_version = Some((6, 16)),
            "tx-budget",
            Level::Note,
            &["6.17", "32 frames"],
        ),
        (
            |h| h.kernel_version = None,
            "kernel",
            Level::Note,
            &["cannot tell"],
        ),
        (
            |h| h.bpf_jit = Some(false),
            "bpf-jit",
            Level::Warning,
            &["bpf_jit_enable=1"],
        ),
        (
            |h| h.missing_capabilities = vec!["CAP_BPF".into()],
            "privileges",
            Level::Note,
            &["CAP_BPF", "AmbientCapabilities"],
        ),
        (
            |h| h.may_lock_memory = false,
            "memlock",
            Level::Problem,
            &["64 KiB", "LimitMEMLOCK"],
        ),
        (
            |h| h.open_files = Some(1024),
            "open-files",
            Level::Note,
            &["1024", "LimitNOFILE"],
        ),
        (
            |h| h.huge_pages = (0, 0),
            "huge-pages",
            Level::Warning,
            &["vm.nr_hugepages=512"],
        ),
        (
            |h| h.huge_pages = (512, 15),
            "huge-pages",
            Level::Warning,
            &["15 of 512", "=1024"],
        ),
        (
            |h| h.isolated.clear(),
            "cpu-isolation",
            Level::Note,
            &["isolcpus", "--cpus"],
        ),
        (
            |h| h.nohz_full.clear(),
            "nohz-full",
            Level::Note,
            &["nohz_full=2-3"],
        ),
        (|h| h.irqbalance = true, "irqbalance", Level::Note, &["BANNED"]),
        (
            |h| h.governors = vec!["powersave".into()],
            "cpu-governor",
            Level::Note,
            &["powersave", "cpupower"],
        ),
    ];
    for (break_it, check, level, words) in cases {
        let mut host = good_host();
        break_it(&mut host);
        let diagnosis = diagnose(&host, &[good_nic()]);
        found(&diagnosis, check, *level, words);
        assert_eq!(diagnosis.verdict, *level, "{check}: {diagnosis:#?}");
    }
}

#[test]
fn each_fault_of_a_nic_is_found_and_nothing_worse() {
    let cases: &[Case<NicFacts>] = &[
        (
            |n| n.exists = false,
            "interface",
            Level::Problem,
            &["no such interface"],
        ),
        (|n| n.ethernet = false, "interface", Level::Problem, &["Ethernet"]),
        (
            |n| n.kind = Some("bond".into()),
            "interface",
            Level::Problem,
            &["member interfaces"],
        ),
        (
            |n| n.master = Some("br0".into()),
            "interface",
            Level::Problem,
            &["br0", "eth1 nomaster"],
        ),
        (
            |n| n.up = false,
            "link",
            Level::Problem,
            &["ip link set dev eth1 up"],
        ),
        (|n| n.carrier = false, "link", Level::Warning, &["no carrier"]),
        (
            |n| n.default_route = true,
            "default-route",
            Level::Problem,
            &["--allow-default-route-nic"],
        ),
        (
            |n| {
                n.xdp = Some(AttachedXdp {
                    mode: "native",
                    program: 77,
                })
            },
            "xdp-program",
            Level::Problem,
            &["program 77", "ip link set dev eth1 xdp off"],
        ),
        (|n| n.features = None, "xdp-mode", Level::Note, &["6.3"]),
        (
            |n| n.features = Some(DeviceFeatures::default()),
            "xdp-mode",
            Level::Warning,
            &["skb", "copied"],
        ),
        (
            |n| {
                n.features = Some(DeviceFeatures {
                    xdp: XDP_BASIC | XDP_REDIRECT,
                    ..Default::default()
                })
            },
            "zero-copy",
            Level::Note,
            &["zerocopy=require"],
        ),
        (
            |n| n.tx_queues = 2,
            "queues",
            Level::Note,
            &["ethtool -L eth1 combined 2"],
        ),
        (
            |n| (n.rx_queues, n.tx_queues) = (16, 16),
            "queue-memory",
            Level::Note,
            &["set-channels=on"],
        ),
        (|n| n.mtu = 9000, "mtu", Level::Note, &["3 chunks"]),
        (|n| n.mtu = 16_200, "mtu", Level::Warning, &["at most 4 chunks"]),
        (
            |n| {
                (n.mtu, n.features) = (
                    9000,
                    Some(DeviceFeatures {
                        xdp: 15,
                        zero_copy_segments: 1,
                        xsk: 7,
                    }),
                )
            },
            "mtu",
            Level::Problem,
            &["several buffers", "mtu 3500"],
        ),
        (
            |n| {
                (n.mtu, n.features) = (
                    9000,
                    Some(DeviceFeatures {
                        xdp: 0x2f,
                        zero_copy_segments: 1,
                        xsk: 7,
                    }),
                )
            },
            "mtu",
            Level::Warning,
            &["at most 1", "zerocopy=off"],
        ),
        (
            |n| n.offloads = vec!["rx-lro".into()],
            "offloads",
            Level::Problem,
            &["ethtool -K eth1 lro off"],
        ),
        (
            |n| n.offloads = vec!["rx-gro-hw".into()],
            "offloads",
            Level::Warning,
            &["ethtool -K eth1 rx-gro-hw off"],
        ),
        (
            |n| n.offloads = vec!["rx-vlan-hw-parse".into()],
            "vlan-stripping",
            Level::Warning,
            &["ethtool -K eth1 rxvlan off"],
        ),
        (
            |n| n.kind = Some("veth".into()),
            "peer-checksums",
            Level::Note,
            &["tx off"],
        ),
        (|n| n.promiscuity = 1, "promiscuity", Level::Note, &["tcpdump"]),
    ];
    for (break_it, check, level, words) in cases {
        let mut nic = good_nic();
        break_it(&mut nic);
        let diagnosis = diagnose(&good_host(), &[nic]);
        found(&diagnosis, check, *level, words);
        assert_eq!(diagnosis.verdict, *level, "{check}: {diagnosis:#?}");
        assert!(
            diagnosis
                .findings
                .iter()
                .any(|f| f.nic.as_deref() == Some("eth1"))
        );
    }
}

#[test]
fn exit_codes_follow_the_worst_finding() {
    let of = |verdict| {
        Diagnosis {
            verdict,
            findings: Vec::new(),
        }
        .exit_code()
    };
    let all = [Level::Ok, Level::Note, Level::Warning, Level::Problem].map(of);
    assert_eq!(all, [0, 0, 1, 2]);
    assert_eq!(diagnose(&good_host(), &[]).exit_code(), 2, "a host without a NIC");
}
