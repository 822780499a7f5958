//! Reports as tables for people.

mod changes;
mod stats;
mod table;
mod words;

use std::fmt::Write as _;

use self::table::{Table, section, written};
use self::words::{alive, bytes, count, duration, list, time};
use super::report::{
    Counted, EventReport, ExplainReport, NicReport, NicsReport, PinnedReport, PortsReport, SessionsReport,
    StatusReport,
};

pub use self::changes::{
    algorithm, nic_added, nic_drained, nic_probe, nic_removed, nic_undrained, nic_weight,
};
pub use self::stats::stats;

/// `vnic status`
#[must_use]
pub fn status(report: &StatusReport) -> String {
    let mut facts = Table::new(&["vnicd", &report.version]);
    facts.row(["pid".into(), report.pid.to_string()]);
    facts.row(["up".into(), duration(report.uptime_s.saturating_mul(1000))]);
    facts.row([
        "topology".into(),
        report.topology.clone().unwrap_or_else(|| "-".into()),
    ]);
    facts.row(["balancing".into(), report.lb.clone()]);
    let cpus: Vec<String> = report
        .workers
        .iter()
        .map(|worker| worker.cpu.map_or("any".into(), |cpu| cpu.to_string()))
        .collect();
    let workers = format!(
        "{}, {} (CPU {})",
        report.workers.len(),
        report.poll,
        cpus.join(", ")
    );
    facts.row(["workers".into(), workers]);
    match &report.pinned {
        None => facts.row([
            "sessions".into(),
            format!("{} of {}", report.sessions, report.session_capacity),
        ]),
        Some(pinned) => {
            facts.row([
                "stations".into(),
                format!("{} of {}", pinned.stations, pinned.capacity),
            ]);
            let from = pinned.designated.clone().unwrap_or_else(|| "-".into());
            facts.row(["groups from".into(), from]);
            let unsent = match pinned.unsent {
                0 => String::new(),
                unsent => format!(", {} that the NIC had no room for", count(unsent)),
            };
            facts.row([
                "announced".into(),
                format!("{} frames{unsent}", count(pinned.announced)),
            ]);
        }
    }
    let ports: Vec<String> = report
        .ports
        .iter()
        .map(|port| format!("{} {}", port.name, port.state.as_str()))
        .collect();
    facts.row(["ports".into(), list(&ports)]);
    let nic = |nic: &super::report::NicSummary| {
        let name = if nic.id == nic.ifname {
            nic.id.clone()
        } else {
            format!("{} ({})", nic.id, nic.ifname)
        };
        format!("{name} {}", alive(nic.alive))
    };
    facts.row([
        "NICs".into(),
        list(&report.nics.iter().map(nic).collect::<Vec<_>>()),
    ]);
    let mut out = String::new();
    facts.write(&mut out);
    if let Some(pinned) = &report.pinned {
        stations(pinned, &mut out);
    }
    out
}

fn stations(pinned: &PinnedReport, out: &mut String) {
    let mut table = Table::new(&["MAC", "VLAN", "PORT", "NIC", ">SINCE", "BEFORE", "ADDRESSES"]);
    for station in &pinned.listed {
        table.row([
            station.mac.clone(),
            match station.vlan {
                0 => "-".into(),
                vlan => vlan.to_string(),
            },
            station.port.clone().unwrap_or_else(|| "-".into()),
            station.nic.clone(),
            duration(station.since_ms),
            station.from.clone().unwrap_or_else(|| "-".into()),
            list(&station.addresses),
        ]);
    }
    section(out, "Stations", &table);
    let listed = pinned.listed.len();
    if u64::try_from(listed).is_ok_and(|listed| listed < pinned.stations) {
        let _ = writeln!(out, "{listed} of {} stations", pinned.stations);
    }
}

/// `vnic sessions`
#[must_use]
pub fn sessions(report: &SessionsReport) -> String {
    let mut out = String::new();
    let mut table = Table::new(&["SESSION", "NIC", ">AGE", ">IDLE", ">FRAMES", ">BYTES"]);
    for session in &report.sessions {
        table.row([
            session.key.clone(),
            session.nic.clone(),
            duration(session.age_ms),
            duration(session.idle_ms),
            count(session.frames),
            bytes(session.bytes),
        ]);
    }
    if !table.is_empty() {
        table.write(&mut out);
    }
    let listed = report.sessions.len();
    if u64::try_from(listed).is_ok_and(|listed| listed < report.total) {
        let _ = writeln!(out, "{listed} of {} sessions; --limit N shows more", report.total);
    } else {
        let _ = writeln!(out, "{listed} sessions");
    }
    out
}

/// `vnic nics`
#[must_use]
pub fn nics(report: &NicsReport) -> String {
    let mut table = Table::new(&[
        "ID",
        "INTERFACE",
        "STATE",
        "CARRIER",
        "MAC",
        "DRIVER",
        ">MTU",
        ">QUEUES",
        "XDP",
        "MODE",
        "JUMBO",
        ">WEIGHT",
        counted(report.counted),
        "LAST CHANGE",
    ]);
    for nic in &report.nics {
        let change = nic.last_change.as_ref().map_or("-".into(), |change| {
            format!(
                "{} {} ago: {}",
                alive(change.alive),
                duration(change.ago_ms),
                change.cause
            )
        });
        table.row([
            nic.id.clone(),
            nic.ifname.clone(),
            alive(nic.alive).into(),
            if nic.carrier { "up" } else { "down" }.into(),
            nic.mac.clone(),
            nic.driver.clone().unwrap_or_else(|| "-".into()),
            nic.mtu.to_string(),
            nic.queues.to_string(),
            nic.attach.clone(),
            if nic.zero_copy { "zero-copy" } else { "copy" }.into(),
            if nic.multi_buffer { "yes" } else { "no" }.into(),
            share(nic),
            count(nic.sessions),
            change,
        ]);
    }
    let mut out = written(&table, "No NIC: a local switch between the ports.\n");
    for nic in &report.nics {
        if let Some(probe) = &nic.probe {
            let (sent, answered) = (count(probe.sent), count(probe.answered));
            let _ = write!(
                out,
                "\n{}: probes {}: {sent} sent, {answered} answered, the last after {} us\n",
                nic.id, probe.target, probe.rtt_us
            );
        }
        for concern in &nic.concerns {
            // Writing to a String cannot fail.
            let _ = write!(out, "\n{}: {concern}\n", nic.id);
        }
    }
    out
}

/// `vnic ports`
#[must_use]
pub fn ports(report: &PortsReport) -> String {
    let mut table = Table::new(&[
        "PORT", "STATE", "MAC", "MAC IS", "VLAN", ">PAIRS", ">MEMORY", "SOCKET", "FEATURES",
    ]);
    for port in &report.ports {
        let origin = match (&port.mac, port.mac_configured) {
            (None, _) => "-",
            (Some(_), true) => "configured",
            (Some(_), false) => "learned",
        };
        let features: Vec<&str> = port
            .features
            .iter()
            .map(|name| {
                name.trim_start_matches("VIRTIO_NET_F_")
                    .trim_start_matches("VIRTIO_F_")
            })
            .map(|name| name.trim_start_matches("VIRTIO_RING_F_"))
            .collect();
        table.row([
            port.name.clone(),
            port.state.as_str().into(),
            port.mac.clone().unwrap_or_else(|| "-".into()),
            origin.into(),
            port.vlan.clone(),
            format!("{}/{}", port.queue_pairs, port.max_queue_pairs),
            format!("{} MiB", port.memory_mib),
            port.socket.clone(),
            if features.is_empty() {
                "-".into()
            } else {
                features.join(" ")
            },
        ]);
    }
    written(&table, "No port.\n")
}

/// `vnic events`: one line.
#[must_use]
pub fn event(event: &EventReport) -> String {
    let nic = event.nic.as_deref().unwrap_or("-");
    format!("{}  {nic}  {}: {}", time(event.unix_ms), event.kind, event.cause)
}

fn counted(what: Counted) -> &'static str {
    match what {
        Counted::Sessions => ">SESSIONS",
        Counted::Stations => ">STATIONS",
    }
}

/// `vnic explain`
#[must_use]
pub fn explain(report: &ExplainReport) -> String {
    let of_station = report.key.starts_with("mac ");
    let what = if of_station { "station" } else { "session" };
    let mut facts = Table::new(&[what, &report.key]);
    facts.row([
        "leaves by".into(),
        report.choice.clone().unwrap_or_else(|| "-".into()),
    ]);
    facts.row(["because".into(), report.reason.clone()]);
    let pinned = match (&report.pinned, report.pinned_ms) {
        (Some(nic), Some(ms)) if of_station => format!("{nic}, {} ago", duration(ms)),
        (Some(nic), Some(ms)) => format!("{nic}; created {} ago", duration(ms)),
        (Some(nic), None) => nic.clone(),
        (None, _) => format!("no such {what}"),
    };
    let moved = match (report.has_moved, of_station) {
        (false, _) => "",
        (true, false) => ", moved since",
        (true, true) => ", from another NIC",
    };
    facts.row(["pinned to".into(), pinned + moved]);
    if let Some(nic) = &report.moves_to {
        facts.row(["moves to".into(), format!("{nic}, at its next pause")]);
    }
    facts.row(["algorithm".into(), report.algorithm.clone()]);
    facts.row([
        "slot".into(),
        format!("{}: {}", report.slot, list(&report.order).replace(", ", " > ")),
    ]);
    let mut nics = Table::new(&[
        "NIC",
        "STATE",
        ">WEIGHT",
        ">SPEED",
        counted(if of_station {
            Counted::Stations
        } else {
            Counted::Sessions
        }),
        ">HALF-OPEN",
        ">RTT",
        ">UTILISATION",
        ">COST",
    ]);
    for nic in &report.nics {
        let measured = |value: f64, text: String| if value > 0.0 { text } else { "-".into() };
        let state = match (nic.alive, nic.drained, nic.slow_start) {
            (false, ..) => "dead",
            (true, true, _) => "drained",
            (true, false, true) => "slow start",
            (true, false, false) => "alive",
        };
        nics.row([
            nic.id.clone(),
            state.into(),
            nic.weight.to_string(),
            nic.speed_mbps
                .map_or_else(|| "-".into(), |mbps| format!("{mbps} Mb/s")),
            count(nic.sessions),
            count(nic.half_open),
            measured(nic.rtt_us, format!("{:.0} us", nic.rtt_us)),
            measured(nic.cost, format!("{:.1} %", nic.utilisation * 100.0)),
            measured(nic.cost, format!("{:.3}", nic.cost)),
        ]);
    }
    let mut out = String::new();
    facts.write(&mut out);
    section(&mut out, "NICs", &nics);
    out
}

fn share(nic: &NicReport) -> String {
    match nic.drained {
        true => "drained".into(),
        false => nic.weight.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{NicSessionsReport, SessionReport, StationReport};

    #[test]
    fn an_event_is_one_line() {
        let lost = EventReport {
            nic: Some("left".into()),
            kind: "lost".into(),
            cause: "carrier lost".into(),
            ..EventReport::default()
        };
        assert_eq!(event(&lost), "1970-01-01 00:00:00.000  left  lost: carrier lost");
    }

    #[test]
    fn stations_are_shown_in_the_place_of_sessions() {
        let station = StationReport {
            mac: "52:54:00:00:00:01".into(),
            vlan: 100,
            port: Some("web".into()),
            nic: "right".into(),
            since_ms: 3250,
            from: Some("left".into()),
            addresses: vec!["10.0.0.7".into(), "fd00::7".into()],
        };
        let pinned = PinnedReport {
            stations: 2,
            capacity: 16_384,
            designated: Some("right".into()),
            announced: 1_234,
            unsent: 0,
            listed: vec![station],
        };
        let text = status(&StatusReport {
            topology: Some("pinned".into()),
            pinned: Some(pinned),
            ..StatusReport::default()
        });
        for part in [
            "topology     pinned\n",
            "stations     2 of 16384\n",
            "groups from  right\n",
            "announced    1,234 frames\n",
            "52:54:00:00:00:01  100   web   right  3.2 s  left    10.0.0.7, fd00::7\n",
            "1 of 2 stations\n",
        ] {
            assert!(text.contains(part), "`{part}` in\n{text}");
        }
        assert!(!text.contains("sessions"), "{text}");
        let report = NicSessionsReport {
            id: "left".into(),
            sessions: 3,
            counted: Counted::Stations,
        };
        assert_eq!(
            nic_removed(&report),
            "NIC left removed: 3 stations go on by the others\n"
        );
        let nics = nics(&NicsReport {
            nics: vec![NicReport::default()],
            counted: Counted::Stations,
        });
        assert!(nics.contains("STATIONS") && !nics.contains("SESSIONS"), "{nics}");
        let text = explain(&ExplainReport {
            key: "mac 52:54:00:00:00:01 vlan 100".into(),
            ..ExplainReport::default()
        });
        assert!(text.contains("pinned to  no such station\n"), "{text}");
        let text = explain(&ExplainReport {
            key: "mac 52:54:00:00:00:01 vlan 100".into(),
            pinned: Some("left".into()),
            pinned_ms: Some(3250),
            has_moved: true,
            ..ExplainReport::default()
        });
        assert!(
            text.contains("pinned to  left, 3.2 s ago, from another NIC\n"),
            "{text}"
        );
    }

    #[test]
    fn an_explanation_says_where_why_and_what_else() {
        let nic = |id: &str, alive| super::super::report::ExplainedNic {
            id: id.into(),
            alive,
            weight: 1,
            ..Default::default()
        };
        let text = explain(&ExplainReport {
            key: "tcp 10.0.0.1:80 <-> 10.0.0.2:9".into(),
            algorithm: "hash".into(),
            slot: 7,
            order: vec!["right".into(), "left".into()],
            choice: Some("left".into()),
            reason: "the session is pinned to it".into(),
            pinned: Some("left".into()),
            pinned_ms: Some(3250),
            has_moved: true,
            moves_to: Some("right".into()),
            nics: vec![nic("left", true), nic("right", false)],
        });
        for part in [
            "leaves by  left\n",
            "because    the session is pinned to it\n",
            "pinned to  left; created 3.2 s ago, moved since\n",
            "moves to   right, at its next pause\n",
            "slot       7: right > left\n",
            "right  dead ",
        ] {
            assert!(text.contains(part), "`{part}` in\n{text}");
        }
    }

    #[test]
    fn columns_line_up() {
        let session = |key: &str, frames| SessionReport {
            key: key.into(),
            nic: "left".into(),
            frames,
            bytes: 10,
            age_ms: 5,
            ..SessionReport::default()
        };
        let report = SessionsReport {
            total: 9,
            sessions: vec![session("short", 5), session("much longer", 12_345)],
        };
        let expected = "\
SESSION      NIC    AGE  IDLE  FRAMES  BYTES
short        left  5 ms  0 ms       5   10 B
much longer  left  5 ms  0 ms  12,345   10 B
2 of 9 sessions; --limit N shows more
";
        assert_eq!(sessions(&report), expected);
        assert_eq!(sessions(&SessionsReport::default()), "0 sessions\n");
    }
}
