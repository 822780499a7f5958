//! `vnic stats`: what was counted.

use super::table::{Table, section};
use super::words::{count, traffic};
use crate::control::report::{RarpStats, StatsReport, Traffic};

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
    let mut chunks = Table::new(&[
        ">FREE",
        ">HELD",
        ">FILL RINGS",
        ">TX RINGS",
        ">QUARANTINED",
        ">LOST",
    ]);
    chunks.row(
        [
            memory.free.into(),
            memory.held.into(),
            memory.fill.into(),
            memory.tx.into(),
            memory.quarantined.into(),
            memory.state_errors,
        ]
        .map(count),
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

fn drop_rows(table: &mut Table, at: &str, drops: &crate::control::report::Drops) {
    for (reason, frames) in drops.iter().filter(|(_, frames)| **frames > 0) {
        table.row([at.to_owned(), reason.clone(), count(*frames)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{NicStats, PortStats};

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
