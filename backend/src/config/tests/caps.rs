//! Idle times of sessions, and caps.

use super::*;

#[test]
fn idle_times_and_caps_are_set_one_by_one() {
    let file = "[timeouts]\ntcp-established-s = 7200\nicmp-s = 5\n[limits]\nhalf-open = 0\n";
    let args = [
        "--fd",
        "3",
        "--nic",
        "eth1",
        "--timeouts",
        "icmp-s=1,other-s=2073600",
        "--limits",
        "new-per-second=16777216,fragments=7",
    ];
    let config = run_file(file, &args).unwrap();
    let timeouts = Timeouts {
        tcp_established_ms: 7_200_000,
        icmp_ms: 1000,
        other_ms: 2_073_600_000,
        ..Timeouts::default()
    };
    let limits = SessionLimits {
        half_open: 0,
        new_per_second: 1 << 24,
        fragments: 7,
    };
    assert_eq!((config.timeouts, config.limits), (timeouts, limits));

    // Every key sets its own field: ten idle times and three caps that all differ.
    let list = |keys: &[&str]| -> String {
        let pairs = keys
            .iter()
            .zip(1..)
            .map(|(key, number)| format!("{key}={number}"));
        pairs.collect::<Vec<_>>().join(",")
    };
    let all = [
        "--fd",
        "3",
        "--nic",
        "eth1",
        "--timeouts",
        &list(sessions::FileTimeouts::KEYS),
        "--limits",
        &list(sessions::FileLimits::KEYS),
    ];
    let config = run(&all).unwrap();
    let timeouts = Timeouts {
        tcp_syn_ms: 1000,
        tcp_one_way_ms: 2000,
        tcp_established_ms: 3000,
        tcp_closing_ms: 4000,
        tcp_reset_ms: 5000,
        udp_one_way_ms: 6000,
        udp_two_way_ms: 7000,
        icmp_ms: 8000,
        fragment_ms: 9000,
        other_ms: 10_000,
    };
    let limits = SessionLimits {
        half_open: 1,
        new_per_second: 2,
        fragments: 3,
    };
    assert_eq!((config.timeouts, config.limits), (timeouts, limits));
}

#[test]
fn bad_idle_times_and_caps_are_told() {
    let with = |option: &str, list: &str| run(&["--fd", "3", "--nic", "eth1", option, list]);
    for bad in ["0", "-1", "2073601", "99999999999"] {
        let value = format!("{bad} for `icmp-s` in `--timeouts icmp-s={bad}` is out of range");
        refused(
            with("--timeouts", &format!("icmp-s={bad}")),
            &[&value, "give 1 to 2073600"],
        );
    }
    refused(
        with("--timeouts", "icmp-s=1.5"),
        &["`1.5`", "`icmp-s`", "not a whole number"],
    );
    refused(
        with("--timeouts", "icmp=5"),
        &[
            "unknown key `icmp`",
            "tcp-syn-s, tcp-one-way-s, tcp-established-s",
        ],
    );
    refused(
        with("--timeouts", "icmp-s=1,icmp-s=1"),
        &["`icmp-s` is given twice"],
    );
    refused(
        with("--limits", "half-open"),
        &[
            "`half-open`",
            "not KEY=VALUE",
            "half-open, new-per-second, fragments",
        ],
    );
    for bad in ["-1", "16777217"] {
        refused(
            with("--limits", &format!("half-open={bad}")),
            &[bad, "for `half-open`", "give 0 to 16777216"],
        );
    }
    let rest = "socket-path = '/s'\n[[nic]]\nname = 'e0'\n";
    refused(
        run_file(&format!("{rest}[timeouts]\nudp-s = 5\n"), &[]),
        &[", line 5:", "`udp-s`", "`udp-one-way-s`"],
    );
    refused(
        run_file(&format!("{rest}[timeouts]\nicmp-s = 0\n"), &[]),
        &["0 for `icmp-s` in [timeouts] of ", "give 1 to 2073600"],
    );
    refused(
        run_file(&format!("{rest}[limits]\nfragments = -1\n"), &[]),
        &["-1 for `fragments` in [limits] of ", "give 0 to 16777216"],
    );
}
