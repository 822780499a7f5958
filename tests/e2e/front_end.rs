//! The front-end without a virtual machine, which other tests run inside one, on this machine: if it fails here, it is not the machine.

use anyhow::Result;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::fabric::{Fabric, PEER_INTERFACE};
use vnic_tests::frontend::{Plan, exchange};
use vnic_tests::lag::Distribution;
use vnic_tests::sys::PacketSocket;
use vnic_tests::vm_host::{ADDRESSES, Echo, GUEST_MAC};

/// Frames of an exchange: every size, four times.
const FRAMES: u32 = 4 * 1455;

fn every_size_comes_back(pairs: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(1, u32::try_from(pairs)?, Distribution::Lag)?;
    let socket = fabric.peer.run(|| Ok(PacketSocket::open(PEER_INTERFACE)?))?;
    let _echo = Echo::start(socket);
    let mut options = DaemonOptions::new(&[("p0", GUEST_MAC)], &fabric.nics(), 1);
    options.ports[0].queues = u32::try_from(pairs)?;
    let daemon = Daemon::start(&fabric.host, folder.path(), &options)?;
    let plan = Plan {
        addresses: ADDRESSES,
        frames: FRAMES,
        window: 64,
        pairs,
        resend: None,
    };
    let report = exchange(&daemon.socket("p0"), &plan)?;
    assert_eq!(report.answered, FRAMES, "{report:?}");
    assert!(report.per_pair.iter().all(|count| *count > 0), "{report:?}");
    Ok(())
}

#[test]
fn every_size_comes_back_to_one_queue_pair() -> Result<()> {
    every_size_comes_back(1)
}

#[test]
fn every_size_comes_back_to_two_queue_pairs() -> Result<()> {
    every_size_comes_back(2)
}
