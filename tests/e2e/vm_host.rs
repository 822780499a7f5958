//! vnicd on a host with a real NIC driver: virtio_net in a virtual machine, zero-copy on Debian's newest kernel, copy mode on the
//! release's. Every frame is checked byte by byte on both ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;
use vnic_tests::frontend::Report;
use vnic_tests::frontend::frames::FLOWS;
use vnic_tests::ledger::{Balance, Outage};
use vnic_tests::process::wait_for;
use vnic_tests::vm_host::{ADDRESSES, Kernel, VmHost};

/// For what takes no time of its own.
const PATIENCE: Duration = Duration::from_secs(30);
const PACE: Duration = Duration::from_millis(20);

/// Twice each size from 60 to 1514 bytes.
const FRAMES: u32 = 2910;

fn all_answered(report: &Report) {
    let (answered, resent) = (report.answered, report.resent);
    assert_eq!((answered, resent), (FRAMES, 0), "{report:?}");
}

/// An exchange without loss; returns how many frames left by each NIC.
fn exchange(host: &VmHost, pairs: u32) -> Result<Vec<u64>> {
    let before = host.answered();
    let report = host.exchange(&format!("--frames {FRAMES} --pairs {pairs}"))?;
    all_answered(&report);
    let moved: Vec<u64> = host
        .answered()
        .iter()
        .zip(before)
        .map(|(now, then)| now - then)
        .collect();
    assert_eq!(moved.iter().sum::<u64>(), u64::from(FRAMES));
    Ok(moved)
}

fn zero_copy(host: &VmHost) -> Result<Vec<bool>> {
    let answer = host.query("nics")?;
    let nics = answer["nics"].as_array().cloned().unwrap_or_default();
    Ok(nics.iter().map(|nic| nic["zero_copy"] == true).collect())
}

/// Waits until a NIC lets in all frames to an address, or none.
fn wait_let_in(host: &VmHost, nic: usize, address: [u8; 6], wanted: u64) -> Result<()> {
    wait_for(
        &format!("eth{nic} letting in {wanted} of 50 frames to {address:02x?}"),
        Duration::from_secs(20),
        Duration::from_millis(10),
        || Ok((host.let_in(nic, address)? == wanted).then_some(())),
    )
}

#[test]
fn zero_copy_carries_every_frame_and_survives_the_loss_of_a_nic() -> Result<()> {
    const SOLICITED_NODE: [u8; 6] = [0x33, 0x33, 0xff, 0, 0, 2];
    let mut host = VmHost::boot(Kernel::Newest, 2, 1)?;
    // virtio_net filters: without vnicd the guests' frames never get in, as they would not on a real NIC.
    for address in [ADDRESSES.guest, SOLICITED_NODE] {
        assert_eq!(host.let_in(0, address)?, 0, "{address:02x?} before vnicd");
    }

    host.start_vnicd(1, "zerocopy=require", "")?;
    assert_eq!(zero_copy(&host)?, [true, true]);
    for nic in [0, 1] {
        for address in [ADDRESSES.guest, SOLICITED_NODE] {
            wait_let_in(&host, nic, address, 50)?;
        }
    }
    let moved = exchange(&host, 1)?;
    assert!(
        moved.iter().all(|&count| count > 0),
        "a NIC carried nothing: {moved:?}"
    );

    host.start_exchange("--frames 20000 --resend-ms 500")?;
    host.set_link(0, false)?;
    host.wait_alive(0, false)?;
    let report = host.finish_exchange()?;
    assert_eq!(report.answered, 20000, "{report:?}");
    assert_eq!(exchange(&host, 1)?, [0, u64::from(FRAMES)]);
    host.set_link(0, true)?;
    host.wait_alive(0, true)?;
    // Sessions stay where they are until that NIC is lost, too.
    host.set_link(1, false)?;
    host.wait_alive(1, false)?;
    assert_eq!(exchange(&host, 1)?, [u64::from(FRAMES), 0]);

    host.stop_vnicd("KILL")?;
    for address in [ADDRESSES.guest, SOLICITED_NODE] {
        wait_let_in(&host, 0, address, 0)?;
    }
    Ok(())
}

/// Takes a link away under traffic, until every flow has a frame by the other NIC, and gives it back.
fn outage(host: &mut VmHost, nic: usize) -> Result<Outage> {
    let lost = Instant::now();
    host.set_link(nic, false)?;
    host.wait_alive(nic, false)?;
    let mut outage = Outage {
        nic,
        lost,
        returned: Instant::now(),
    };
    wait_for(
        &format!("every flow on the other NIC than eth{nic}"),
        PATIENCE,
        PACE,
        || {
            let arrivals = host.arrivals();
            outage.returned = Instant::now();
            Ok((outage.survivors(&arrivals) == FLOWS as usize).then_some(()))
        },
    )?;
    host.set_link(nic, true)?;
    host.wait_alive(nic, true)?;
    Ok(outage)
}

/// A number of each NIC, added up.
fn of_nics(stats: &Value, pointer: &str) -> u64 {
    let nics = stats["nics"].as_array().map(Vec::as_slice).unwrap_or_default();
    nics.iter()
        .filter_map(|nic| nic.pointer(pointer).and_then(Value::as_u64))
        .sum()
}

fn setting(name: &str, default: u32) -> Result<u32> {
    match std::env::var(name) {
        Ok(value) => value.parse().with_context(|| format!("{name}={value}")),
        Err(_) => Ok(default),
    }
}

/// VNIC_LINK_LOSSES links are lost, with VNIC_STREAM_RATE frames a second, and a row for docs/load-balancing.md is written.
#[test]
fn zero_copy_accounts_for_every_frame_when_links_are_lost_under_traffic() -> Result<()> {
    let (losses, rate) = (
        setting("VNIC_LINK_LOSSES", 6)?,
        setting("VNIC_STREAM_RATE", 5000)?,
    );
    let mut host = VmHost::boot(Kernel::Newest, 2, 1)?;
    host.start_vnicd(1, "zerocopy=require", "--flap-damping off")?;
    assert_eq!(zero_copy(&host)?, [true, true]);
    host.start_stream(rate)?;
    wait_for("the stream", PATIENCE, PACE, || {
        Ok((host.arrivals().len() > 10 * FLOWS as usize).then_some(()))
    })
    .with_context(|| host.circumstances())?;
    let mut outages = Vec::new();
    for count in 0..losses {
        // Sessions stay on the NIC that they went to, which is the next one to be lost.
        outages.push(outage(&mut host, count as usize % 2)?);
    }
    let sent = host.finish_stream()?;
    let mut seen = 0;
    let stats = wait_for("the last frames", PATIENCE, PACE, || {
        let (stats, before) = (host.query("stats")?, seen);
        seen = host.arrivals().len();
        Ok((stats["frame_memory"]["tx"] == 0 && seen == before).then_some(stats))
    })?;

    let arrivals = host.arrivals();
    let balance = Balance::of(sent, &arrivals, &outages);
    let (given, redriven) = (of_nics(&stats, "/tx/frames"), of_nics(&stats, "/redriven"));
    let (lost, again) = (
        u64::try_from(balance.lost.len())?,
        u64::from(balance.twice + balance.late),
    );
    let mut took: Vec<Duration> = outages
        .iter()
        .filter_map(|outage| outage.failover(&arrivals))
        .collect();
    took.sort_unstable();
    let slowest = took.last().context("no failover")?;
    let what = || format!("{balance:?}, {stats}");
    // Every flow has gone on, and nothing was lost but what a NIC had taken when its link went.
    assert_eq!(took.len(), outages.len(), "{}", what());
    assert!(balance.vanished.is_empty(), "{}", what());
    // vnicd gave every frame to a NIC, and those in flight to a second one: it dropped none, and what is lost had been completed.
    assert_eq!(given, u64::from(sent) + redriven, "{}", what());
    for all in ["nics", "ports"] {
        for one in stats[all].as_array().context("a list")? {
            assert_eq!(one["drops"], serde_json::json!({}), "{}", what());
        }
    }
    // Nothing comes twice but what was in flight at a loss, and nothing three times.
    assert!(again <= redriven && balance.more == 0, "{}", what());
    println!(
        "| link losses | frames a second | frames | lost | twice, sent before the loss | twice, sent after the return | re-driven | p50 ms | max ms |"
    );
    println!(
        "| {losses} | {rate} | {sent} | {lost} | {} | {} | {redriven} | {:.1} | {:.1} |",
        balance.twice,
        balance.late,
        took[took.len() / 2].as_secs_f64() * 1e3,
        slowest.as_secs_f64() * 1e3,
    );
    Ok(())
}

#[test]
fn zero_copy_uses_all_queues_with_fewer_and_with_more_workers() -> Result<()> {
    let host = VmHost::boot(Kernel::Newest, 2, 2)?;
    for workers in [2, 6] {
        host.start_vnicd(workers, "zerocopy=require", "")?;
        assert_eq!(zero_copy(&host)?, [true, true]);
        exchange(&host, 2)?;
        let stats = host.query("stats")?;
        for nic in 0..2 {
            for queue in 0..2 {
                let counts = &stats["nics"][nic]["queues"][queue];
                assert!(
                    counts["rx"]["frames"].as_u64() > Some(0),
                    "{workers} workers: queue {queue} of eth{nic} received nothing: {counts}"
                );
            }
        }
        host.stop_vnicd("TERM")?;
    }
    Ok(())
}

#[test]
fn the_release_kernel_copies_and_vnicd_says_what_it_lacks() -> Result<()> {
    let host = VmHost::boot(Kernel::Release, 2, 1)?;
    host.start_vnicd(1, "zerocopy=auto", "")?;
    assert_eq!(zero_copy(&host)?, [false, false]);
    let log = host.log()?;
    let told: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("this kernel lacks"))
        .collect();
    assert!(
        told.len() == 1 && told[0].contains("6.6") && told[0].contains("several buffers"),
        "{log}"
    );
    let moved = exchange(&host, 1)?;
    assert!(
        moved.iter().all(|&count| count > 0),
        "a NIC carried nothing: {moved:?}"
    );
    Ok(())
}
