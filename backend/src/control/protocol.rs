//! Requests and answers: one JSON object a line, each way.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::report::SessionReport;

/// Longest request line in bytes, without its end.
pub const MAX_LINE: usize = 64 * 1024;
/// Longest wait of `events` in seconds.
pub const MAX_WAIT_S: u64 = 60;
/// Sessions listed unless `limit` says otherwise.
pub const DEFAULT_SESSION_LIMIT: usize = 1000;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// [`super::report::StatusReport`]
    Status,
    /// [`super::report::StatsReport`]
    Stats,
    /// [`super::report::SessionsReport`]
    Sessions {
        /// Most sessions to list; 0 gives the count alone.
        limit: usize,
    },
    /// [`super::report::NicsReport`]
    Nics,
    /// [`super::report::PortsReport`]
    Ports,
    /// [`super::report::EventsReport`]
    Events {
        /// Only those with a higher number.
        after: u64,
        /// How long to wait for one if there is none, in seconds, at most [`MAX_WAIT_S`].
        wait_s: u64,
    },
    /// [`super::report::ExplainReport`]
    Explain {
        /// A flow as [`super::flow`] reads it.
        flow: String,
    },
    /// [`super::report::AlgorithmReport`]
    LbSet {
        /// The word for it.
        algorithm: String,
    },
    /// [`super::report::NicAddedReport`]
    NicAdd {
        /// As `--nic` of vnicd has it: `IF[,id=ID]...`.
        nic: String,
    },
    /// [`super::report::NicSessionsReport`]
    NicRemove {
        /// Its id.
        nic: String,
    },
    /// [`super::report::NicWeightReport`]
    NicSet {
        /// Its id.
        nic: String,
        /// Relative share of new sessions; `null`: the algorithm's own.
        weight: Option<u32>,
    },
    /// [`super::report::NicProbeReport`]
    NicProbe {
        /// Its id.
        nic: String,
        /// As `probe=` of vnicd has it; `null`: nobody is asked.
        target: Option<String>,
    },
    /// [`super::report::NicSessionsReport`]
    NicDrain {
        /// Its id.
        nic: String,
    },
    /// [`super::report::NicSessionsReport`]
    NicUndrain {
        /// Its id.
        nic: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    method: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    params: Option<Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SessionsParams {
    #[serde(default = "default_session_limit")]
    limit: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsParams {
    #[serde(default)]
    after: u64,
    #[serde(default)]
    wait_s: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlowParams {
    flow: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AlgorithmParams {
    algorithm: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NicParams {
    nic: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WeightParams {
    nic: String,
    weight: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProbeParams {
    nic: String,
    target: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

const fn default_session_limit() -> usize {
    DEFAULT_SESSION_LIMIT
}

impl Request {
    /// Every method's name.
    pub const METHODS: &'static [&'static str] = &[
        "status",
        "stats",
        "sessions",
        "nics",
        "ports",
        "events",
        "explain",
        "lb_set",
        "nic_add",
        "nic_remove",
        "nic_set",
        "nic_probe",
        "nic_drain",
        "nic_undrain",
    ];

    /// Reads one line (without its end).
    pub fn parse(line: &[u8]) -> Result<Request, CallError> {
        let envelope: Envelope = serde_json::from_slice(line).map_err(|error| {
            CallError::new(ErrorCode::BadRequest, format!("this line is no request: {error}"))
        })?;
        let params = envelope
            .params
            .unwrap_or_else(|| Value::Object(serde_json::Map::new()));
        fn read<T: for<'de> Deserialize<'de>>(params: Value) -> Result<T, CallError> {
            serde_json::from_value(params)
                .map_err(|error| CallError::new(ErrorCode::BadParams, format!("bad `params`: {error}")))
        }
        let plain = |request| read::<NoParams>(params.clone()).map(|NoParams {}| request);
        match envelope.method.as_str() {
            "status" => plain(Request::Status),
            "stats" => plain(Request::Stats),
            "nics" => plain(Request::Nics),
            "ports" => plain(Request::Ports),
            "sessions" => read(params).map(|SessionsParams { limit }| Request::Sessions { limit }),
            "events" => read(params).map(|EventsParams { after, wait_s }| Request::Events { after, wait_s }),
            "explain" => read(params).map(|FlowParams { flow }| Request::Explain { flow }),
            "lb_set" => read(params).map(|AlgorithmParams { algorithm }| Request::LbSet { algorithm }),
            "nic_add" => read(params).map(|NicParams { nic }| Request::NicAdd { nic }),
            "nic_remove" => read(params).map(|NicParams { nic }| Request::NicRemove { nic }),
            "nic_set" => read(params).map(|WeightParams { nic, weight }| Request::NicSet { nic, weight }),
            "nic_probe" => read(params).map(|ProbeParams { nic, target }| Request::NicProbe { nic, target }),
            "nic_drain" => read(params).map(|NicParams { nic }| Request::NicDrain { nic }),
            "nic_undrain" => read(params).map(|NicParams { nic }| Request::NicUndrain { nic }),
            other => {
                let known = Request::METHODS.join(", ");
                let message = format!("there is no method `{other:.64}`: the methods are {known}");
                Err(CallError::new(ErrorCode::UnknownMethod, message))
            }
        }
    }

    /// The line that asks this, with its end.
    #[must_use]
    pub fn to_line(&self) -> String {
        use serde_json::json;
        let (method, params) = match self {
            Request::Status => ("status", None),
            Request::Stats => ("stats", None),
            Request::Sessions { limit } => ("sessions", Some(json!({"limit": limit}))),
            Request::Nics => ("nics", None),
            Request::Ports => ("ports", None),
            Request::Events { after, wait_s } => ("events", Some(json!({"after": after, "wait_s": wait_s}))),
            Request::Explain { flow } => ("explain", Some(json!({"flow": flow}))),
            Request::LbSet { algorithm } => ("lb_set", Some(json!({"algorithm": algorithm}))),
            Request::NicAdd { nic } => ("nic_add", Some(json!({"nic": nic}))),
            Request::NicRemove { nic } => ("nic_remove", Some(json!({"nic": nic}))),
            Request::NicSet { nic, weight } => ("nic_set", Some(json!({"nic": nic, "weight": weight}))),
            Request::NicProbe { nic, target } => ("nic_probe", Some(json!({"nic": nic, "target": target}))),
            Request::NicDrain { nic } => ("nic_drain", Some(json!({"nic": nic}))),
            Request::NicUndrain { nic } => ("nic_undrain", Some(json!({"nic": nic}))),
        };
        let object = match params {
            Some(params) => json!({"method": method, "params": params}),
            None => json!({"method": method}),
        };
        format!("{object}\n")
    }
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Not a JSON object with `method`.
    BadRequest,
    /// No such method.
    UnknownMethod,
    /// `params` is not what the method takes.
    BadParams,
    /// Longer than [`MAX_LINE`]; the connection ends.
    LineTooLong,
    /// Too many clients are connected; the connection ends.
    TooManyClients,
    /// The daemon cannot answer now.
    Unavailable,
    /// No NIC has that id.
    NotFound,
    /// It cannot be done; nothing was changed.
    Refused,
}

/// A refusal: a code for programs and a message for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl CallError {
    /// A refusal.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> CallError {
        CallError {
            code,
            message: message.into(),
        }
    }

    /// The line that says this, with its end.
    #[must_use]
    pub fn to_line(&self) -> String {
        format!("{}\n", serde_json::json!({"ok": false, "error": self}))
    }
}

/// See [`Reply::Sessions`].
pub type SessionList = Box<dyn Iterator<Item = Option<SessionReport>> + Send>;

/// What the daemon answers.
pub enum Reply {
    /// A report of bounded size.
    Whole(Value),
    /// A list that may be long: written piece by piece, as fast as the client reads.
    Sessions {
        /// Sessions in the table.
        total: u64,
        /// Those to list. `None` among them: nothing for now, and others may have their turn.
        sessions: SessionList,
    },
    /// The answer follows by [`super::server::Server::answer`]; until then nothing more of this client is read.
    Later,
}

impl Reply {
    /// One of the reports of [`super::report`].
    pub fn report<T: Serialize>(report: &T) -> Result<Reply, CallError> {
        serde_json::to_value(report).map(Reply::Whole).map_err(|error| {
            CallError::new(
                ErrorCode::Unavailable,
                format!("cannot write the report: {error}"),
            )
        })
    }
}

impl From<Value> for Reply {
    fn from(value: Value) -> Reply {
        Reply::Whole(value)
    }
}

/// A request that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub(super) u64);

/// Who answers: the daemon, or a test.
pub trait Handler {
    /// Answers one request, without waiting for anything. What takes time is answered with [`Reply::Later`] and the ticket.
    fn call(&mut self, ticket: Ticket, request: &Request) -> Result<Reply, CallError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_round_trips() {
        for request in [
            Request::Status,
            Request::Stats,
            Request::Sessions { limit: 7 },
            Request::Nics,
            Request::Ports,
            Request::Events { after: 9, wait_s: 3 },
            Request::Explain {
                flow: "tcp 10.0.0.1:80 10.0.0.2:9".into(),
            },
            Request::LbSet {
                algorithm: "hash".into(),
            },
            Request::NicAdd {
                nic: "eth1,id=left".into(),
            },
            Request::NicRemove { nic: "left".into() },
            Request::NicSet {
                nic: "left".into(),
                weight: Some(3),
            },
            Request::NicSet {
                nic: "left".into(),
                weight: None,
            },
            Request::NicProbe {
                nic: "left".into(),
                target: Some("192.0.2.1".into()),
            },
            Request::NicProbe {
                nic: "left".into(),
                target: None,
            },
            Request::NicDrain { nic: "left".into() },
            Request::NicUndrain { nic: "left".into() },
        ] {
            let line = request.to_line();
            assert_eq!(Request::parse(line.trim_end().as_bytes()), Ok(request));
        }
        let default = Request::Sessions {
            limit: DEFAULT_SESSION_LIMIT,
        };
        assert_eq!(Request::parse(br#"{"method":"sessions"}"#), Ok(default));
    }

    #[test]
    fn bad_requests_get_the_right_code() {
        for (line, code) in [
            ("", ErrorCode::BadRequest),
            ("hello", ErrorCode::BadRequest),
            ("[]", ErrorCode::BadRequest),
            ("{}", ErrorCode::BadRequest),
            (r#"{"method":"status","limit":1}"#, ErrorCode::BadRequest),
            (r#"{"method":"reboot"}"#, ErrorCode::UnknownMethod),
            (r#"{"method":"status","params":{"x":1}}"#, ErrorCode::BadParams),
            (
                r#"{"method":"sessions","params":{"limit":-1}}"#,
                ErrorCode::BadParams,
            ),
            (
                r#"{"method":"sessions","params":{"limits":1}}"#,
                ErrorCode::BadParams,
            ),
            (
                r#"{"method":"nic_set","params":{"nic":"a","weight":-1}}"#,
                ErrorCode::BadParams,
            ),
            (r#"{"method":"nic_drain"}"#, ErrorCode::BadParams),
        ] {
            assert_eq!(Request::parse(line.as_bytes()).unwrap_err().code, code, "{line}");
        }
        assert!(Request::parse(&[0xff, 0]).is_err());
        assert!(
            Request::parse("[".repeat(60_000).as_bytes()).is_err(),
            "deep nesting must not use up the stack"
        );
    }

    #[test]
    fn the_page_describes_every_method_and_code() {
        let page = include_str!("../../../docs/control-protocol.md");
        for method in Request::METHODS {
            assert!(page.contains(&format!("### `{method}`")), "{method}");
        }
        for code in [
            "bad_request",
            "unknown_method",
            "bad_params",
            "line_too_long",
            "too_many_clients",
            "unavailable",
            "not_found",
            "refused",
        ] {
            assert!(page.contains(&format!("`{code}`")), "{code}");
            assert!(serde_json::from_value::<ErrorCode>(code.into()).is_ok(), "{code}");
        }
    }
}
