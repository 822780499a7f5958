//! vnicd on a host with a real NIC driver: virtio_net in a virtual machine, zero-copy on Debian's newest kernel, copy mode on the
//! release's. Every frame is checked byte by byte on both ends.

use std::time::Duration;

use anyhow::Result;
use vnic_tests::frontend::Report;
use vnic_tests::process::wait_for;
use vnic_tests::vm_host::{ADDRESSES, Kernel, VmHost};

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

    host.start_vnicd(1, "zerocopy=require")?;
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

#[test]
fn zero_copy_uses_all_queues_with_fewer_and_with_more_workers() -> Result<()> {
    let host = VmHost::boot(Kernel::Newest, 2, 2)?;
    for workers in [2, 6] {
        host.start_vnicd(workers, "zerocopy=require")?;
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
    host.start_vnicd(1, "zerocopy=auto")?;
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
