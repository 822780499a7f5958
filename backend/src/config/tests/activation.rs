//! Sockets that the service manager hands over.

use super::*;

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
