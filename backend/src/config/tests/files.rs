//! The configuration file, alone and below the command line and the environment.

use super::*;

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
fn the_example_file_is_valid() {
    let example = include_str!("../../../../qemu/vnicd.example.toml");
    let raw = file::parse(example, Path::new("vnicd.example.toml")).unwrap();
    let config = check::check(raw, &Activated::default()).unwrap();
    assert_eq!((config.ports.len(), config.nics.len()), (2, 2));
    assert_eq!(
        (config.timeouts, config.limits),
        (Timeouts::default(), SessionLimits::default()),
        "it shows the defaults"
    );
}

/// The keys that the file may have in a table (or outside of all), as the parser lists them when it meets another one.
fn keys(table: &str) -> Vec<String> {
    let error = file::parse(&format!("{table}\nno-such-key = 1\n"), Path::new("vnicd.toml")).unwrap_err();
    let error = error.to_string();
    let (_, listed) = error.split_once("expected").expect("a list of keys");
    let keys: Vec<String> = listed.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(keys.len() > 2, "{table}: {error}");
    keys
}

#[test]
fn the_example_file_names_every_key() {
    let example = include_str!("../../../../qemu/vnicd.example.toml");
    let mut table = String::new();
    let mut named = std::collections::BTreeSet::new();
    for line in example.lines() {
        if line.starts_with('[') {
            table = line.to_owned();
            // A table is named by its header.
            named.insert((String::new(), line.trim_matches(['[', ']']).to_owned()));
        }
        let setting = line.strip_prefix("# ").unwrap_or(line);
        if let Some((key, _)) = setting.split_once(" = ") {
            named.insert((table.clone(), key.trim_end().to_owned()));
        }
    }
    for table in ["", "[[port]]", "[[nic]]", "[timeouts]", "[limits]"] {
        for key in keys(table) {
            assert!(
                named.contains(&(table.to_owned(), key.clone())),
                "{table} {key} is not in the example"
            );
        }
    }
}
