//! Bad inputs with the words that each must be told with, precedence, and defaults.

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
fn bad_command_lines_say_what_why_and_what_to_do() {
    let long = format!("/run/{}", "x".repeat(103));
    let nine: Vec<String> = (0..9)
        .flat_map(|n| ["--nic".to_owned(), format!("eth{n}")])
        .collect();
    let nine: Vec<&str> = nine.iter().map(String::as_str).collect();
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["no port", "--socket-path /run/vnic/vm.sock"]),
        (
            &["--socket-path", "/s", "--fd", "3"],
            &["--socket-path", "--fd", "exclude each other"],
        ),
        (
            &["--socket-path", "/s", "--port", PORT],
            &["--socket-path", "--port", "name=NAME,socket=PATH"],
        ),
        (
            &["--fd", "3", "--port", PORT],
            &["--fd", "--port", "exclude each other"],
        ),
        (
            &["--fd", "2", "--nic", "e"],
            &["2 for `--fd` is out of range", "3 to"],
        ),
        (&["--fd", "-1", "--nic", "e"], &["-1 for `--fd` is out of range"]),
        (&["--socket-path", "/s"], &["one port and no NIC", "--nic IF"]),
        (
            &["--socket-path", "/s", "--nic", "e0", "--nic", "e1"],
            &["2 NICs need `--topology`", "--topology lag", "--topology pinned"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--topology", "ring"],
            &["`ring`", "`--topology`", "give lag, pinned"],
        ),
        (
            &[
                "--socket-path",
                "/s",
                "--nic",
                "e0",
                "--nic",
                "e0",
                "--topology",
                "lag",
            ],
            &["NIC e0 is given twice"],
        ),
        (
            &[
                "--socket-path",
                "/s",
                "--nic",
                "e0,id=x",
                "--nic",
                "e1,id=x",
                "--topology",
                "lag",
            ],
            &["e0 and e1", "same id `x`", "id="],
        ),
        (
            &[
                "--socket-path",
                "/s",
                "--nic",
                "e0",
                "--nic",
                "e1,id=e0",
                "--topology",
                "lag",
            ],
            &["same id `e0`"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,weight=0"],
            &["weight 0", "1 or more"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,set-channels=on"],
            &["--nic e0", "queues=N"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,queues=2,set-channels=yes"],
            &["yes", "on, off"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,probe=router"],
            &["`probe` in `--nic e0,probe=router`", "`router`", "192.0.2.1"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,weight=10001"],
            &["10001 for `weight`", "0 to 10000"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,queues=0"],
            &["0 for `queues`", "--nic e0,queues=0", "1 to 256"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,qeues=2"],
            &["unknown key `qeues`", "--nic e0,qeues=2", "id, queues"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,zerocopy=yes"],
            &["`yes`", "`zerocopy`", "auto, require, off"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,attach=hw"],
            &["`hw`", "`attach`", "auto, native, skb"],
        ),
        (
            &["--socket-path", "/s", "--nic", "id=x"],
            &["gives no interface", "--nic eth1,weight=2"],
        ),
        (
            &["--socket-path", "/s", "--nic", "../../x"],
            &["`../../x`", "name of an interface"],
        ),
        (
            &["--socket-path", "/s", "--nic", "an-interface-name"],
            &["1 to 15 bytes"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0,id=a/b"],
            &["`a/b`", "id of a NIC"],
        ),
        (&["--port", PORT, "--port", PORT], &["two ports are named `a`"]),
        (
            &["--port", PORT, "--port", "name=b,socket=/run/vnic/a.sock"],
            &["`a` and `b`", "same socket /run/vnic/a.sock"],
        ),
        (
            &[
                "--port",
                "name=a,socket=/a,mac=52:54:00:00:00:01",
                "--port",
                "name=b,socket=/b,mac=52:54:00:00:00:01",
            ],
            &["`a` and `b`", "same MAC 52:54:00:00:00:01"],
        ),
        (
            &["--port", "name=a,socket=/a,mac=52:54:00"],
            &["--port name=a", "`52:54:00` is not a MAC address"],
        ),
        (
            &["--port", "name=a,socket=/a,mac=01:00:5e:00:00:01"],
            &["01:00:5e:00:00:01", "multicast"],
        ),
        (
            &["--port", "name=a,socket=/a,mac=ff:ff:ff:ff:ff:ff"],
            &["broadcast"],
        ),
        (
            &["--port", "name=a,socket=/a,mac=00:00:00:00:00:00"],
            &["all zero", "52:54:00:12:34:56"],
        ),
        (
            &["--port", "name=a,socket=/a,queues=9"],
            &["9 for `queues`", "1 to 8"],
        ),
        (
            &["--port", "name=a,socket=/a,queues=two"],
            &["`two`", "`queues`", "not a whole number"],
        ),
        (
            &["--port", "name=a,socket=/a,queue=2"],
            &[
                "unknown key `queue`",
                "--port name=a",
                "name, socket, mac, queues",
            ],
        ),
        (&["--port", "name=a,name=b,socket=/a"], &["`name` is given twice"]),
        (&["--port", "name=a,/a"], &["`/a`", "not KEY=VALUE"]),
        (&["--port", "socket=/a"], &["has no `name`", "name=vm"]),
        (
            &["--port", "name=a"],
            &["has no `socket`", "socket=/run/vnic/vm.sock"],
        ),
        (
            &["--port", "name=a b,socket=/a"],
            &["`a b`", "name of a port", "1 to 32"],
        ),
        (
            &["--socket-path", &long, "--nic", "e0"],
            &["108 bytes", "at most 107", "port `port0`"],
        ),
        (
            &["--socket-path", "", "--nic", "e0"],
            &["--socket-path <PATH>", "a value is required"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--control", "/s"],
            &["port `port0`", "control socket", "/s"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--workers", "0"],
            &["0 for `--workers`", "1 to 64"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--cpus", "1-"],
            &["`1-`", "not a list of CPUs", "0,2-3"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--cpus", "3-1"],
            &["not a list of CPUs"],
        ),
        (
            &[
                "--socket-path",
                "/s",
                "--nic",
                "e0",
                "--cpus",
                "99999999999999999999",
            ],
            &["not a list of CPUs"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--cpus", "0,0-1"],
            &["CPU 0 is named twice"],
        ),
        (
            &[
                "--socket-path",
                "/s",
                "--nic",
                "e0",
                "--cpus",
                "0-1",
                "--workers",
                "1",
            ],
            &["1 workers and 2 CPUs"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--sessions", "10"],
            &["10 for `--sessions`", "1024 to 16777216"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--frames", "1"],
            &["1 for `--frames`", "1024 to 4194304"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--poll", "lazy"],
            &["`lazy`", "`--poll`", "busy, adaptive"],
        ),
        (
            &["--socket-path", "/s", "--nic", "e0", "--lb", "dice"],
            &["`dice`", "`--lb`", "give hash, least_conn, weighted, adaptive"],
        ),
        (
            &["--config", "/no/such/file.toml"],
            &["/no/such/file.toml", "No such file"],
        ),
    ];
    for (args, fragments) in cases {
        refused(run(args), fragments);
    }
    let mut args = vec!["--socket-path", "/s", "--topology", "lag"];
    args.extend(nine);
    refused(run(&args), &["9 NICs", "at most 8", "leave 1 out"]);
    refused(
        run_with_env(&["--socket-path", "/s", "--nic", "e0"], Some("dice")),
        &["`dice`", "LB_ALGORITHM", "give hash"],
    );
}

#[test]
fn a_bad_file_is_told_with_its_line_and_key() {
    refused(
        run_file("topology = 'lag'\nworkres = 2\n", &[]),
        &[", line 2:", "`workres`", "`workers`"],
    );
    refused(
        run_file(
            "[[port]]\nname = 'a'\nsocket = '/a'\n\n[[nic]]\nname = 'e0'\nwieght = 2\n",
            &[],
        ),
        &[", line 7:", "`wieght`", "`weight`"],
    );
    refused(run_file("workers = 'two'\n", &[]), &[", line 1:", "two"]);
    refused(
        run_file("socket-path = ''\n", &["--nic", "e0"]),
        &["path of port `port0` is empty", "/run/vnic/vm.sock"],
    );
    refused(run_file("lb = \n", &[]), &[", line 1:"]);
    refused(
        run_file("[[nic]]\nweight = 1\n[[port]]\nname='a'\nsocket='/a'\n", &[]),
        &["[[nic]] number 1", "`name`"],
    );
    refused(
        run_file("[[port]]\nname='a'\nsocket='/a'\nqueues=-1\n", &[]),
        &["-1 for `queues`", "[[port]] number 1"],
    );
    refused(
        run_file("socket-path='/a'\nworkers = 65\n[[nic]]\nname='e0'\n", &[]),
        &["65 for `workers` in "],
    );
}

const FILE: &str = "
topology = 'lag'
poll = 'busy'
workers = 2
cpus = '0-1'
sessions = 2048
allow-default-route-nic = true
[[port]]
name = 'a'
socket = '/a'
mac = '52:54:00:00:00:0a'
queues = 2
[[port]]
name = 'b'
socket = '/b'
[[nic]]
name = 'e0'
id = 'left'
queues = 2
zerocopy = 'require'
attach = 'native'
weight = 3
set-channels = 'on'
probe = 'icmp:192.0.2.1'
[[nic]]
name = 'e1'
";

#[test]
fn a_file_alone_is_enough() {
    let config = run_file(FILE, &[]).unwrap();
    assert_eq!(config.ports.len(), 2);
    assert_eq!(config.ports[0].mac, Some("52:54:00:00:00:0a".parse().unwrap()));
    assert_eq!(
        (config.ports[0].queue_pairs, config.ports[1].queue_pairs),
        (2, MAX_QUEUE_PAIRS)
    );
    let left = NicConfig {
        ifname: "e0".into(),
        id: "left".into(),
        queues: Some(2),
        zerocopy: ZeroCopy::Require,
        attach: AttachMode::Native,
        weight: Some(3),
        set_channels: true,
        probe: Some("icmp:192.0.2.1".parse().unwrap()),
    };
    assert_eq!(config.nics[0], left);
    assert_eq!((config.nics[1].id.as_str(), config.nics[1].weight), ("e1", None));
    assert_eq!(
        (config.poll, config.workers, config.cpus),
        (PollMode::Busy, 2, vec![0, 1])
    );
    assert_eq!((config.sessions, config.allow_default_route_nic), (2048, true));
    assert_eq!(config.topology, Some(Topology::Lag));
}

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
fn the_command_line_wins_over_the_file() {
    let args = [
        "--poll",
        "adaptive",
        "--workers",
        "1",
        "--cpus",
        "7",
        "--socket-path",
        "/c",
        "--nic",
        "e9",
        "--sessions",
        "4096",
        "--control",
        "/ctl",
        "--state-dir",
        "/state",
        "--ring-dir",
        "/rings",
        "--sleep-in",
        "epoll",
        "--frames",
        "2048",
    ];
    let config = run_file(FILE, &args).unwrap();
    let only = PortConfig {
        name: "port0".into(),
        endpoint: Endpoint::Socket("/c".into()),
        mac: None,
        queue_pairs: MAX_QUEUE_PAIRS,
        vlan: VlanMode::Transparent,
    };
    assert_eq!(config.ports, [only]);
    assert_eq!(
        config
            .nics
            .iter()
            .map(|nic| nic.ifname.as_str())
            .collect::<Vec<_>>(),
        ["e9"]
    );
    assert_eq!(
        (config.poll, config.workers, config.cpus),
        (PollMode::Adaptive, 1, vec![7])
    );
    assert_eq!((config.sessions, config.frames), (4096, Some(2048)));
    assert_eq!(
        (config.control, config.state_dir),
        ("/ctl".into(), "/state".into())
    );
    assert_eq!(config.ring_dir.as_deref(), Some(Path::new("/rings")));
    assert_eq!(config.sleep_in, SleepMode::Epoll);
    assert_eq!(
        config.topology,
        Some(Topology::Lag),
        "what the command line leaves out stays as in the file"
    );
}

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

#[test]
fn the_environment_stands_between_command_line_and_file() {
    let args = ["--socket-path", "/s", "--nic", "e0"];
    for word in Algorithm::WORDS {
        let lb = run_with_env(&args, Some(word)).unwrap().lb;
        assert_eq!((lb.as_str(), lb.policy().name()), (*word, *word));
    }
    let mut with_option = args.to_vec();
    with_option.extend(["--lb", "hash"]);
    assert_eq!(
        run_with_env(&with_option, Some("dice")).unwrap().lb,
        Algorithm::Hash
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "lb = 'dice'\n").unwrap();
    let mut with_file = args.to_vec();
    with_file.extend(["--config", file.path().to_str().unwrap()]);
    assert_eq!(
        run_with_env(&with_file, Some("hash")).unwrap().lb,
        Algorithm::Hash
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
fn the_example_file_is_valid() {
    let example = include_str!("../../../qemu/vnicd.example.toml");
    let raw = file::parse(example, Path::new("vnicd.example.toml")).unwrap();
    let config = check::check(raw, &Activated::default()).unwrap();
    assert_eq!((config.ports.len(), config.nics.len()), (2, 2));
    assert_eq!(
        (config.timeouts, config.limits),
        (Timeouts::default(), SessionLimits::default()),
        "it shows the defaults"
    );
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

#[test]
fn activated_sockets_belong_to_the_ports_of_their_names() {
    let config = run_activated(
        &[
            "--port",
            "name=a,socket=activation,queues=2",
            "--port",
            "name=b,socket=/run/vnic/b.sock",
            "--port",
            "name=c,socket=activation",
        ],
        &["c", "a"],
    )
    .unwrap();
    let endpoints: Vec<Endpoint> = config.ports.into_iter().map(|port| port.endpoint).collect();
    let path = Endpoint::Socket("/run/vnic/b.sock".into());
    assert_eq!(endpoints, [Endpoint::Activated(4), path, Endpoint::Activated(3)]);

    // A file called `activation` is still to be had.
    let config = run(&["--port", "name=a,socket=./activation", "--nic", "e0"]).unwrap();
    assert_eq!(config.ports[0].endpoint, Endpoint::Socket("./activation".into()));
}

#[test]
fn without_configured_ports_each_activated_socket_is_one() {
    let config = run_activated(&[], &["web", "db"]).unwrap();
    let ports: Vec<(&str, &Endpoint)> = config
        .ports
        .iter()
        .map(|port| (port.name.as_str(), &port.endpoint))
        .collect();
    assert_eq!(
        ports,
        [("web", &Endpoint::Activated(3)), ("db", &Endpoint::Activated(4))]
    );
    assert_eq!(config.ports[0].queue_pairs, MAX_QUEUE_PAIRS);
}

#[test]
fn activation_that_does_not_fit_is_told() {
    let port = ["--nic", "e0", "--port", "name=a,socket=activation"];
    let unit = "vnicd@a.socket";
    refused(
        run_activated(&port, &[]),
        &["port `a`", "no socket was handed over", unit],
    );
    refused(
        run_activated(&port, &["b"]),
        &["port `a`", "handed over: b", unit],
    );
    refused(
        run_activated(&port, &["a", "b"]),
        &["name `b`", "no port of that name", "have: a", "disable"],
    );
    refused(
        run_activated(&["--socket-path", "/s", "--nic", "e0"], &["b"]),
        &["name `b`", "have: none"],
    );
    refused(
        run_activated(&["--nic", "e0", "--port", "name=a,socket=/run/a"], &["a"]),
        &["name `a`", "socket=activation"],
    );
    refused(
        run_activated(&port, &["a", "a"]),
        &["two sockets", "`a`", "one unit"],
    );
    refused(
        run_activated(&["--nic", "e0"], &["vnicd@a.socket"]),
        &["`vnicd@a.socket`", "FileDescriptorName="],
    );
    let many: Vec<String> = (0..=MAX_PORTS).map(|number| format!("p{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(
        run_activated(&["--nic", "e0"], &many),
        &["65 ports", "at most 64"],
    );
    let elsewhere = Activated {
        sockets: Vec::new(),
        meant_for: Some(7),
    };
    refused(
        run_with(&port, None, &elsewhere),
        &["port `a`", "process 7", "exec"],
    );
}
