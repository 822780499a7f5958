//! Reports as tables for people.

use std::fmt::Write as _;

use super::report::{
    AlgorithmReport, Counted, EventReport, ExplainReport, NicAddedReport, NicProbeReport, NicReport,
    NicSessionsReport, NicWeightReport, NicsReport, PinnedReport, PortsReport, RarpStats, SessionsReport,
    StatsReport, StatusReport, Traffic,
};

/// How a column is aligned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Align {
    Left,
    Right,
}

/// Rows under a heading, each column as wide as its widest cell; a column whose heading starts with `>` is aligned right.
struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(headings: &[&str]) -> Table {
        let align = headings
            .iter()
            .map(|text| {
                if text.starts_with('>') {
                    Align::Right
                } else {
                    Align::Left
                }
            })
            .collect();
        let first = headings
            .iter()
            .map(|text| text.trim_start_matches('>').to_owned())
            .collect();
        Table {
            align,
            rows: vec![first],
        }
    }

    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    fn write(&self, out: &mut String) {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.align.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(&widths).zip(&self.align) {
                // Writing to a String cannot fail.
                let _ = match align {
                    Align::Left => write!(line, "{cell:<width$}  "),
                    Align::Right => write!(line, "{cell:>width$}  "),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
}

fn section(out: &mut String, title: &str, table: &Table) {
    if table.is_empty() {
        return;
    }
    if !out.is_empty() {
        out.push('\n');
    }
    out.push_str(title);
    out.push('\n');
    table.write(out);
}

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

/// `vnic stats`
#[must_use]
pub fn stats(report: &StatsReport) -> String {
    let mut out = String::new();
    let mut ports = Table::new(&[
        "PORT",
        "PAIR",
        ">GUEST TX FRAMES",
        ">BYTES",
        ">GUEST RX FRAMES",
        ">BYTES",
        ">INTERRUPTS",
    ]);
    let mut drops = Table::new(&["AT", "REASON", ">FRAMES"]);
    let mut broken = Table::new(&["PORT", ">TIMES"]);
    let mut rarps = Table::new(&["PORT", ">RARP FRAMES", ">UNSENT", ">REFUSED"]);
    for port in &report.ports {
        let total = port
            .queue_pairs
            .iter()
            .map(|pair| pair.notifications)
            .sum::<u64>();
        ports.row(pair_row(&port.name, "all", port.guest_tx, port.guest_rx, total));
        if port.queue_pairs.len() > 1 {
            for pair in &port.queue_pairs {
                ports.row(pair_row(
                    "",
                    &pair.index.to_string(),
                    pair.guest_tx,
                    pair.guest_rx,
                    pair.notifications,
                ));
            }
        }
        drop_rows(&mut drops, &format!("port {}", port.name), &port.drops);
        if port.broken_rings > 0 {
            broken.row([port.name.clone(), count(port.broken_rings)]);
        }
        if port.rarp != RarpStats::default() {
            let rarp = port.rarp;
            rarps.row([
                port.name.clone(),
                count(rarp.sent),
                count(rarp.unsent),
                count(rarp.refused),
            ]);
        }
    }
    section(&mut out, "Ports", &ports);
    section(&mut out, "Rings that a guest's driver broke", &broken);
    section(&mut out, "Guests announced for their front-ends", &rarps);

    let mut nics = Table::new(&[
        "NIC",
        "QUEUE",
        ">RX FRAMES",
        ">BYTES",
        ">TX FRAMES",
        ">BYTES",
        ">GROUP COPIES",
        ">TO VNICD",
        ">TO HOST",
        ">KERNEL DROPS",
        ">KICK ERRORS",
    ]);
    for nic in &report.nics {
        let kernel: u64 = nic.queues.iter().map(|queue| queue.kernel_dropped).sum();
        let kicks: u64 = nic.queues.iter().map(|queue| queue.kick_errors).sum();
        let ([rx, rx_bytes], [tx, tx_bytes]) = (traffic(nic.rx), traffic(nic.tx));
        nics.row([
            nic.id.clone(),
            "all".into(),
            rx,
            rx_bytes,
            tx,
            tx_bytes,
            count(nic.group_copies.frames),
            count(nic.xdp_redirected),
            count(nic.xdp_passed),
            count(kernel),
            count(kicks),
        ]);
        for queue in nic.queues.iter().filter(|_| nic.queues.len() > 1) {
            let ([rx, rx_bytes], [tx, tx_bytes]) = (traffic(queue.rx), traffic(queue.tx));
            nics.row([
                String::new(),
                queue.index.to_string(),
                rx,
                rx_bytes,
                tx,
                tx_bytes,
                String::new(),
                String::new(),
                String::new(),
                count(queue.kernel_dropped),
                count(queue.kick_errors),
            ]);
        }
        drop_rows(&mut drops, &format!("NIC {}", nic.id), &nic.drops);
    }
    section(&mut out, "NICs", &nics);

    let mut workers = Table::new(&[
        "WORKER",
        ">CPU",
        ">TURNS",
        ">BUSY",
        ">SLEEPS",
        ">HANDED OFF",
        ">RINGS FOUND HELD",
    ]);
    for worker in &report.workers {
        workers.row([
            worker.index.to_string(),
            worker.cpu.map_or("any".into(), |cpu| cpu.to_string()),
            count(worker.turns),
            count(worker.busy_turns),
            count(worker.sleeps),
            count(worker.handoffs),
            count(worker.contention),
        ]);
    }
    section(&mut out, "Workers", &workers);

    let balancer = &report.balancer;
    let mut sessions = Table::new(&[
        ">NOW",
        ">CAPACITY",
        ">CREATED",
        ">EXPIRED",
        ">REPINNED",
        ">MOVED",
        ">HALF-OPEN",
        ">FRAGMENTED",
    ]);
    sessions.row(
        [
            balancer.sessions,
            balancer.capacity,
            balancer.created,
            balancer.expired,
            balancer.repinned,
            balancer.moved,
            balancer.half_open,
            balancer.fragments,
        ]
        .map(count),
    );
    section(&mut out, "Sessions", &sessions);

    let mut without = Table::new(&[
        ">NO ROOM",
        ">HALF-OPEN CAP",
        ">ONE-WAY CAP",
        ">NEW CAP",
        ">FRAGMENT CAP",
    ]);
    without.row(
        [
            balancer.table_full,
            balancer.half_open_full,
            balancer.one_way_full,
            balancer.new_capped,
            balancer.fragments_full,
        ]
        .map(count),
    );
    section(&mut out, "Frames forwarded without a session", &without);

    let memory = &report.frame_memory;
    let mut chunks = Table::new(&[">FREE", ">HELD", ">FILL RINGS", ">TX RINGS", ">QUARANTINED"]);
    chunks.row(
        [
            memory.free,
            memory.held,
            memory.fill,
            memory.tx,
            memory.quarantined,
        ]
        .map(|chunks| count(chunks.into())),
    );
    section(&mut out, "Frame memory (chunks of 4 KiB)", &chunks);

    if drops.is_empty() {
        out.push_str("\nNo frame was dropped.\n");
    } else {
        section(&mut out, "Dropped frames", &drops);
    }
    out
}

fn pair_row(name: &str, pair: &str, tx: Traffic, rx: Traffic, interrupts: u64) -> [String; 7] {
    let ([tx, tx_bytes], [rx, rx_bytes]) = (traffic(tx), traffic(rx));
    [
        name.into(),
        pair.into(),
        tx,
        tx_bytes,
        rx,
        rx_bytes,
        count(interrupts),
    ]
}

fn drop_rows(table: &mut Table, at: &str, drops: &super::report::Drops) {
    for (reason, frames) in drops.iter().filter(|(_, frames)| **frames > 0) {
        table.row([at.to_owned(), reason.clone(), count(*frames)]);
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
        (Some(nic), Some(ms)) => format!("{nic}, {} ago", duration(ms)),
        (Some(nic), None) => nic.clone(),
        (None, _) => format!("no such {what}"),
    };
    facts.row(["pinned to".into(), pinned]);
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

/// `vnic lb set`
#[must_use]
pub fn algorithm(report: &AlgorithmReport) -> String {
    let AlgorithmReport { algorithm, before } = report;
    format!("new sessions are placed by {algorithm} (before: {before})\n")
}

/// `vnic nic add`
#[must_use]
pub fn nic_added(report: &NicAddedReport) -> String {
    let mode = if report.zero_copy { "zero-copy" } else { "copy" };
    format!(
        "NIC {} added: interface {}, {} queues, {mode}\n",
        report.id, report.ifname, report.queues
    )
}

/// `vnic nic remove`
#[must_use]
pub fn nic_removed(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} removed: {} {} go on by the others\n",
        report.id,
        count(report.sessions),
        report.counted
    )
}

/// `vnic nic set`
#[must_use]
pub fn nic_weight(report: &NicWeightReport) -> String {
    format!(
        "NIC {}: weight {} (before: {})\n",
        report.id, report.weight, report.before
    )
}

/// `vnic nic set NIC probe=...`
#[must_use]
pub fn nic_probe(report: &NicProbeReport) -> String {
    let text = |target: &Option<String>| target.clone().unwrap_or_else(|| "off".into());
    format!(
        "NIC {}: probe {} (before: {})\n",
        report.id,
        text(&report.probe),
        text(&report.before)
    )
}

/// `vnic nic drain`
#[must_use]
pub fn nic_drained(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} takes no new {}; {} are left (`vnic nics` shows how many)\n",
        report.id,
        report.counted,
        count(report.sessions)
    )
}

/// `vnic nic undrain`
#[must_use]
pub fn nic_undrained(report: &NicSessionsReport) -> String {
    format!(
        "NIC {} takes new {} again; it has {}\n",
        report.id,
        report.counted,
        count(report.sessions)
    )
}

fn share(nic: &NicReport) -> String {
    match nic.drained {
        true => "drained".into(),
        false => nic.weight.to_string(),
    }
}

/// Milliseconds since 1970 as `2026-11-24 07:09:22.123` (UTC).
fn time(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    // Days since 1 March of the year 0, in eras of 400 years: leap days come at the end of a year then.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!(
        "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}",
        ms % 1000
    )
}

fn written(table: &Table, nothing: &str) -> String {
    let mut out = String::new();
    if table.is_empty() {
        out.push_str(nothing);
    } else {
        table.write(&mut out);
    }
    out
}

fn list(items: &[String]) -> String {
    if items.is_empty() {
        "none".into()
    } else {
        items.join(", ")
    }
}

const fn alive(alive: bool) -> &'static str {
    if alive { "alive" } else { "dead" }
}

fn traffic(traffic: Traffic) -> [String; 2] {
    [count(traffic.frames), bytes(traffic.bytes)]
}

/// 1234567 as `1,234,567`.
fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Three digits or so and a unit in steps of 1000: `987 B`, `12.3 MB`.
fn bytes(value: u64) -> String {
    let mut unit = "B";
    let mut tenths = u128::from(value) * 10;
    for larger in ["kB", "MB", "GB", "TB", "PB", "EB"] {
        if tenths < 10_000 {
            break;
        }
        tenths /= 1000;
        unit = larger;
    }
    if unit == "B" {
        format!("{value} B")
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// The two largest units: `120 ms`, `3.2 s`, `4m 05s`, `2h 03m`, `9d 01h`.
fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{NicStats, PortStats, SessionReport, StationReport};

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [0, 999, 1000, 12_345_678].map(bytes),
            ["0 B", "999 B", "1.0 kB", "12.3 MB"]
        );
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!(
            [7, 3250, 245_000, 7_380_000, 781_200_000].map(duration),
            ["7 ms", "3.2 s", "4m 05s", "2h 03m", "9d 01h"]
        );
    }

    #[test]
    fn times_for_people() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00.000"),
            (951_782_399_999, "2000-02-28 23:59:59.999"),
            (951_782_400_000, "2000-02-29 00:00:00.000"),
            (1_795_504_162_123, "2026-11-24 07:09:22.123"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000"),
        ] {
            assert_eq!(time(ms), text);
        }
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
            nics: vec![nic("left", true), nic("right", false)],
        });
        for part in [
            "leaves by  left\n",
            "because    the session is pinned to it\n",
            "pinned to  left, 3.2 s ago\n",
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

    #[test]
    fn drops_are_listed_with_their_reasons() {
        let mut port = PortStats {
            name: "web".into(),
            ..PortStats::default()
        };
        port.drops.insert("spoofed_source".into(), 1500);
        port.drops.insert("too_long".into(), 0);
        port.broken_rings = 2;
        port.rarp.sent = 5;
        let nic = NicStats {
            id: "left".into(),
            ..NicStats::default()
        };
        let text = stats(&StatsReport {
            ports: vec![port],
            nics: vec![nic],
            ..StatsReport::default()
        });
        assert!(text.contains("port web  spoofed_source   1,500"), "{text}");
        assert!(!text.contains("too_long"), "{text}");
        assert!(text.contains("web       2"), "{text}");
        assert!(text.contains("web             5       0        0"), "{text}");
        assert!(stats(&StatsReport::default()).contains("No frame was dropped."));
    }
}
