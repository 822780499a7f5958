//! The server against real clients over a socket in a temporary folder; one thread turns both, so nothing is timed.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use serde_json::Value;

use super::*;
use crate::control::protocol::{MAX_LINE, Reply, Request};
use crate::control::report::SessionReport;

#[derive(Default)]
struct Fake {
    calls: usize,
    waiting: Vec<Ticket>,
}

impl Handler for Fake {
    fn call(&mut self, ticket: Ticket, request: &Request) -> Result<Reply, CallError> {
        self.calls += 1;
        match request {
            Request::Sessions { limit } => {
                let session = SessionReport {
                    key: "k".repeat(100),
                    ..SessionReport::default()
                };
                Ok(Reply::Sessions {
                    total: 1 << 20,
                    // Each with a pause before it.
                    sessions: Box::new(std::iter::repeat_n([None, Some(session)], *limit).flatten()),
                })
            }
            Request::Events { .. } => {
                self.waiting.push(ticket);
                Ok(Reply::Later)
            }
            Request::Nics => Err(CallError::new(ErrorCode::Unavailable, "not now")),
            _ => Ok(Reply::Whole(
                serde_json::json!({"method": format!("{request:?}")}),
            )),
        }
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    server: Server,
    handler: Fake,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let server = Server::bind(&path).unwrap();
        Bench {
            _dir: dir,
            path,
            server,
            handler: Fake::default(),
            now: Instant::now(),
        }
    }

    fn connect(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.turn();
        stream
    }

    fn turn(&mut self) {
        self.server.turn(self.now, &mut self.handler);
    }

    /// Turns until the client has a whole line, or its connection has ended.
    fn line(&mut self, client: &mut UnixStream) -> Option<Value> {
        let mut line = Vec::new();
        for _ in 0..1_000_000 {
            self.turn();
            let mut byte = [0; 65536];
            // A line never shares a read with the next one in these tests, except where `lines` is used.
            match client.read(&mut byte) {
                Ok(0) => return None,
                Ok(count) => line.extend_from_slice(&byte[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
            if line.last() == Some(&b'\n') {
                return Some(serde_json::from_slice(&line).unwrap());
            }
        }
        panic!("no answer");
    }

    fn ask(&mut self, client: &mut UnixStream, request: &[u8]) -> Value {
        client.write_all(request).unwrap();
        self.line(client).expect("an answer")
    }
}

#[test]
fn answers_and_refusals_on_one_connection() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    assert_eq!(
        bench.ask(&mut client, b"{\"method\":\"status\"}\n")["result"]["method"],
        "Status"
    );
    assert_eq!(
        bench.ask(&mut client, b"garbage \xff\x00\n")["error"]["code"],
        "bad_request"
    );
    assert_eq!(
        bench.ask(&mut client, b"{\"method\":\"nics\"}\n")["error"]["message"],
        "not now"
    );
    assert_eq!(
        bench.ask(&mut client, b"\n\r\n{\"method\":\"ports\"}\r\n")["ok"],
        true,
        "empty lines are skipped"
    );
    assert_eq!(bench.handler.calls, 3);
}

#[test]
fn a_request_in_pieces_and_two_in_one() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    for piece in [&b"{\"meth"[..], b"od\":\"st", b"ats\"}"] {
        client.write_all(piece).unwrap();
        bench.turn();
        assert_eq!(bench.handler.calls, 0);
    }
    assert_eq!(bench.ask(&mut client, b"\n")["result"]["method"], "Stats");
    client
        .write_all(b"{\"method\":\"ports\"}\n{\"method\":\"stats\"}\n")
        .unwrap();
    for _ in 0..4 {
        bench.turn();
    }
    let answers: Vec<String> = BufReader::new(client).lines().map_while(Result::ok).collect();
    assert_eq!(answers.len(), 2);
    assert!(
        answers[0].contains("Ports") && answers[1].contains("Stats"),
        "{answers:?}"
    );
}

#[test]
fn what_is_left_at_the_end_of_input_is_answered() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    client
        .write_all(b"{\"method\":\"ports\"}\n{\"method\":\"stats\"}")
        .unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..6 {
        bench.turn();
    }
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert_eq!(bench.server.clients(), 0);
}

#[test]
fn an_oversize_line_ends_the_connection_only() {
    let mut bench = Bench::new();
    let mut other = bench.connect();
    let mut client = bench.connect();
    let chunk = [b'x'; 4096];
    let mut sent = 0;
    while sent <= MAX_LINE + chunk.len() {
        match client.write(&chunk) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => bench.turn(),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            Err(error) => panic!("{error}"),
        }
    }
    let answer = bench.line(&mut client).expect("told why");
    assert_eq!(answer["error"]["code"], "line_too_long");
    assert_eq!(bench.line(&mut client), None);
    assert_eq!(bench.ask(&mut other, b"{\"method\":\"status\"}\n")["ok"], true);
}

#[test]
fn a_long_list_is_made_only_as_fast_as_it_is_read() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    let answer = bench.ask(
        &mut client,
        b"{\"method\":\"sessions\",\"params\":{\"limit\":5000}}\n",
    );
    assert_eq!(answer["result"]["total"], 1 << 20);
    assert_eq!(answer["result"]["sessions"].as_array().unwrap().len(), 5000);
    let empty = bench.ask(
        &mut client,
        b"{\"method\":\"sessions\",\"params\":{\"limit\":0}}\n",
    );
    assert_eq!(empty["result"]["sessions"], serde_json::json!([]));
}

#[test]
fn a_client_that_reads_nothing_stalls_only_itself_and_is_dropped() {
    let mut bench = Bench::new();
    let mut slow = bench.connect();
    slow.write_all(b"{\"method\":\"sessions\",\"params\":{\"limit\":1000000000000}}\n")
        .unwrap();
    let mut quick = bench.connect();
    for _ in 0..100 {
        assert_eq!(bench.ask(&mut quick, b"{\"method\":\"status\"}\n")["ok"], true);
    }
    assert_eq!(bench.server.clients(), 2);
    bench.now += STALL_TIMEOUT;
    bench.turn();
    assert_eq!(
        bench.server.clients(),
        1,
        "the idle client may stay, the stalled one not"
    );
    assert_eq!(bench.ask(&mut quick, b"{\"method\":\"status\"}\n")["ok"], true);
}

#[test]
fn too_many_clients_are_told_and_places_come_back() {
    let mut bench = Bench::new();
    let mut clients: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| bench.connect()).collect();
    let mut extra = bench.connect();
    assert_eq!(
        bench.line(&mut extra).unwrap()["error"]["code"],
        "too_many_clients"
    );
    assert_eq!(bench.line(&mut extra), None);
    for client in &mut clients {
        assert_eq!(bench.ask(client, b"{\"method\":\"status\"}\n")["ok"], true);
    }
    clients.pop();
    bench.turn();
    let mut next = bench.connect();
    assert_eq!(bench.ask(&mut next, b"{\"method\":\"status\"}\n")["ok"], true);
}

#[test]
fn the_client_of_the_command_line_speaks_with_it() {
    use crate::control::client::{Client, ClientError};

    let mut bench = Bench::new();
    let path = bench.path.clone();
    let asking = std::thread::spawn(move || {
        let mut client = Client::connect(&path).unwrap();
        let status = client.call(&Request::Status).unwrap();
        let refused = client.call(&Request::Nics).unwrap_err();
        let sessions: crate::control::report::SessionsReport =
            client.report(&Request::Sessions { limit: 3000 }).unwrap();
        (status, refused.to_string(), sessions.sessions.len())
    });
    while !asking.is_finished() {
        bench.turn();
        std::thread::yield_now();
    }
    let (status, refused, count) = asking.join().unwrap();
    assert_eq!(status["method"], "Status");
    assert_eq!(refused, "vnicd refused: not now");
    assert_eq!(count, 3000);

    let path = bench.path.clone();
    drop(bench);
    let gone = Client::connect(&path).unwrap_err();
    assert!(matches!(gone, ClientError::NotRunning { .. }));
    assert!(gone.to_string().contains("start vnicd") && gone.to_string().contains(path.to_str().unwrap()));
}

#[test]
fn a_late_answer_holds_nobody_else_and_is_not_missed() {
    let mut bench = Bench::new();
    let (mut patient, mut other, mut gone) = (bench.connect(), bench.connect(), bench.connect());
    let line = br#"{"method":"events"}
{"method":"status"}
"#;
    patient.write_all(line).unwrap();
    gone.write_all(line).unwrap();
    bench.turn();
    bench.turn();
    assert_eq!((bench.handler.calls, bench.handler.waiting.len()), (2, 2));
    other.write_all(b"{\"method\":\"status\"}\n").unwrap();
    assert_eq!(bench.line(&mut other).unwrap()["ok"], true);
    // Waiting is not stalling, however long it takes.
    bench.now += 10 * STALL_TIMEOUT;
    drop(gone);
    bench.turn();
    assert_eq!(bench.server.clients(), 2);
    for ticket in std::mem::take(&mut bench.handler.waiting) {
        let answer = Ok(Reply::Whole(serde_json::json!("late")));
        bench.server.answer(ticket, answer, bench.now);
    }
    let both: Vec<Value> = {
        let mut text = Vec::new();
        while text.iter().filter(|byte| **byte == b'\n').count() < 2 {
            bench.turn();
            let mut bytes = [0; 4096];
            if let Ok(count) = patient.read(&mut bytes) {
                text.extend_from_slice(&bytes[..count]);
            }
        }
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    };
    assert_eq!(both[0]["result"], "late");
    assert_eq!(both[1]["result"]["method"], "Status");
}
