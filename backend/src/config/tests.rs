//! Command lines, files and defaults. What a test needs is here; those of one subject have a file of their own.

mod activation;
mod caps;
mod files;
mod refusals;

use std::path::Path;

use vnic_dataplane::fabric::VlanSet;

use super::*;

fn run(args: &[&str]) -> Result<Config, ArgsError> {
    run_with_env(args, None)
}

fn run_with_env(args: &[&str], lb_algorithm: Option<&str>) -> Result<Config, ArgsError> {
    run_with(args, lb_algorithm, &Activated::default())
}

fn run_activated(args: &[&str], names: &[&str]) -> Result<Config, ArgsError> {
    let sockets = names.iter().map(|name| (*name).to_owned()).zip(3..).collect();
    let meant_for = None;
    run_with(args, None, &Activated { sockets, meant_for })
}

fn run_with(args: &[&str], lb_algorithm: Option<&str>, activated: &Activated) -> Result<Config, ArgsError> {
    let args = std::iter::once("vnicd").chain(args.iter().copied());
    match resolve(args, lb_algorithm.map(str::to_owned), || Ok(activated.clone()))? {
        Action::Run(config) => Ok(*config),
        Action::PrintCapabilities => panic!("nobody asked for the capabilities"),
    }
}

fn run_file(text: &str, args: &[&str]) -> Result<Config, ArgsError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let mut all = vec!["--config", file.path().to_str().unwrap()];
    all.extend(args);
    run(&all)
}

#[track_caller]
fn refused(result: Result<Config, ArgsError>, fragments: &[&str]) {
    let message = result.expect_err("this must be refused").to_string();
    for fragment in fragments {
        assert!(
            message.contains(fragment),
            "`{fragment}` is missing in: {message}"
        );
    }
}

const PORT: &str = "name=a,socket=/run/vnic/a.sock";

#[test]
fn nics_may_be_plugged_into_independent_ports() {
    let two = ["--socket-path", "/s", "--nic", "e0", "--nic", "e1"];
    let config = run(&[&two[..], &["--topology", "pinned"]].concat()).unwrap();
    assert_eq!(config.topology, Some(Topology::Pinned));
    let config = run_file("topology = 'pinned'\n", &two).unwrap();
    assert_eq!(
        config.topology.map(|it| it.to_string()).as_deref(),
        Some("pinned")
    );
}

#[test]
fn defaults_and_short_forms() {
    let config = run(&["--fd", "3", "--nic", "eth1"]).unwrap();
    assert_eq!(config.ports[0].name, "port0");
    assert_eq!(config.ports[0].endpoint, Endpoint::Fd(3));
    assert_eq!(
        (config.lb, config.poll, config.workers),
        (Algorithm::Hash, PollMode::Adaptive, 1)
    );
    assert_eq!(
        (config.sessions, config.frames, config.topology),
        (DEFAULT_SESSIONS, None, None)
    );
    assert_eq!(config.control, Path::new(DEFAULT_CONTROL));
    assert_eq!(config.state_dir, Path::new(DEFAULT_STATE_DIR));
    assert_eq!((config.ring_dir, config.sleep_in), (None, SleepMode::Auto));
    assert!(config.cpus.is_empty() && !config.allow_default_route_nic);
    assert_eq!(
        (config.timeouts, config.limits),
        (Timeouts::default(), SessionLimits::default())
    );
    let config = run(&["--fd", "3", "--nic", "eth1", "--cpus", "4,0-1"]).unwrap();
    assert_eq!((config.workers, config.cpus), (3, vec![4, 0, 1]));
    let config = run(&["--port", PORT, "--port", "name=b,socket=/b"]).unwrap();
    assert!(config.nics.is_empty(), "a local switch needs no NIC");
}

#[test]
fn capabilities_are_asked_for_and_printed() {
    let action = resolve(["vnicd", "--print-capabilities"], None, || {
        Ok(Activated::default())
    })
    .unwrap();
    assert_eq!(action, Action::PrintCapabilities);
    let json: serde_json::Value = serde_json::from_str(&capabilities_json()).unwrap();
    assert_eq!(json, serde_json::json!({ "type": "net" }));
}

#[test]
fn help_succeeds_and_names_every_option() {
    let Err(ArgsError::Clap(help)) = resolve(["vnicd", "--help"], None, || Ok(Activated::default())) else {
        panic!("help is an early end")
    };
    assert_eq!(help.exit_code(), 0);
    let text = help.to_string();
    for option in [
        "--socket-path",
        "--fd",
        "--port",
        "--nic",
        "--topology",
        "--lb",
        "--poll",
        "--workers",
        "--cpus",
        "--timeouts",
        "--limits",
    ] {
        assert!(text.contains(option), "{option}");
    }
    let Err(ArgsError::Clap(unknown)) = resolve(["vnicd", "--nics", "e0"], None, || Ok(Activated::default()))
    else {
        panic!("no such option")
    };
    assert_eq!(unknown.exit_code(), 2);
    assert!(unknown.to_string().contains("--nics") && unknown.to_string().contains("--nic"));
}

#[test]
fn ports_are_put_on_vlans() {
    let modes = |config: Config| config.ports.into_iter().map(|port| port.vlan).collect::<Vec<_>>();
    let trunk = VlanMode::Trunk(VlanSet::new([10, 11, 12, 30, 4094]));
    let ports = [
        "name=a,socket=/a,vlan=100",
        "name=b,socket=/b,trunk=10-12+30+4094",
        "name=c,socket=/c",
    ];
    let args: Vec<&str> = ports.iter().flat_map(|port| ["--port", port]).collect();
    assert_eq!(
        modes(run(&args).unwrap()),
        [VlanMode::Access(100), trunk.clone(), VlanMode::Transparent]
    );
    let file = "[[port]]\nname = \"a\"\nsocket = \"/a\"\nvlan = 4094\n\
                [[port]]\nname = \"b\"\nsocket = \"/b\"\ntrunk = \"30+10-12+4094\"\n";
    assert_eq!(
        modes(run_file(file, &[]).unwrap()),
        [VlanMode::Access(4094), trunk]
    );

    let one = |option: &str| run(&["--port", &format!("{PORT},{option}"), "--nic", "e0"]);
    for bad in ["vlan=0", "vlan=4095", "vlan=-1"] {
        refused(one(bad), &["for `vlan` in", "1 to 4094"]);
    }
    for bad in [
        "0", "4095", "10-", "-10", "20-10", "10++11", "+10", "a", "10-11-12", "1 0", "99999",
    ] {
        refused(one(&format!("trunk={bad}")), &[bad, "`trunk`", "10-20+30"]);
    }
    refused(one("vlan=1,trunk=2"), &["`vlan` and `trunk`"]);

    // One address may be in two VLANs, which never meet.
    let pair = |first: &str, second: &str| {
        let mac = "mac=52:54:00:00:00:01";
        let (a, b) = (
            format!("name=a,socket=/a,{mac}{first}"),
            format!("name=b,socket=/b,{mac}{second}"),
        );
        run(&["--port", &a, "--port", &b])
    };
    assert!(pair(",vlan=1", ",vlan=2").is_ok());
    for (first, second) in [(",vlan=1", ",vlan=1"), (",vlan=1", ""), (",trunk=1", ",trunk=2")] {
        refused(
            pair(first, second),
            &["`a` and `b`", "same MAC", "a VLAN of its own"],
        );
    }
}
