//! Bad command lines, each with the words that it must be told with.

use super::*;

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
