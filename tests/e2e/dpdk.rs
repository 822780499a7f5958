//! A driver that is neither QEMU's nor Linux's: DPDK's virtio-user, driven by testpmd, with every frame compared.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use vnic_tests::daemon::{Daemon, DaemonOptions};
use vnic_tests::fabric::{Fabric, PEER_INTERFACE};
use vnic_tests::lag::Distribution;
use vnic_tests::lock::MachineLock;
use vnic_tests::process::wait_for;
use vnic_tests::scene::{PATIENCE, guest_mac, guest_mac_bytes};
use vnic_tests::sys::PacketSocket;
use vnic_tests::testpmd::{Counts, FILES, Testpmd, TestpmdOptions, VIRTIO};

/// Flows among the frames: enough that every queue pair of a receiver gets some.
const FLOWS: usize = 61;
/// An address that nobody on the peer's side has, so that the peer's kernel answers nothing.
const STRANGER: [u8; 6] = [0x02, 0, 0, 0, 0x99, 0x01];
/// Where a frame carries its number: right behind Ethernet, IPv4 and UDP headers.
const NUMBER_AT: usize = 14 + 20 + 8;
const PACE: Duration = Duration::from_millis(20);

/// A UDP frame of `bytes` bytes whose every byte follows from the arguments.
fn frame(number: usize, bytes: usize, source: [u8; 6], destination: [u8; 6]) -> Vec<u8> {
    let short = |value: usize| {
        u16::try_from(value)
            .expect("lengths and ports are short")
            .to_be_bytes()
    };
    let mut frame = Vec::with_capacity(bytes);
    frame.extend(destination);
    frame.extend(source);
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(short(bytes - 14));
    // No fragment, TTL 64, UDP, the header's checksum to come, from and to TEST-NET-2.
    frame.extend([
        0, 0, 0, 0, 64, 17, 0, 0, 198, 51, 100, source[5], 198, 51, 100, 200,
    ]);
    frame.extend(short(1024 + number % FLOWS));
    frame.extend(short(2000));
    frame.extend(short(bytes - 34));
    frame.extend([0, 0]);
    frame.extend(u32::try_from(number).expect("few frames").to_be_bytes());
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("a sum of ten words folds at once");
    frame[24..26].copy_from_slice(&(!folded).to_be_bytes());
    let mut state = u32::try_from(number).expect("few frames") ^ 0x9e37_79b9;
    frame.resize_with(bytes, || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    });
    frame
}

/// Frames of every size from 60 to 1514 bytes, `rounds` times.
fn every_size(rounds: usize, source: [u8; 6], destination: [u8; 6]) -> Vec<Vec<u8>> {
    (0..rounds)
        .flat_map(|_| 60..=1514)
        .enumerate()
        .map(|(number, bytes)| frame(number, bytes, source, destination))
        .collect()
}

fn number_of(frame: &[u8]) -> Option<usize> {
    let bytes = frame.get(NUMBER_AT..NUMBER_AT + 4)?;
    usize::try_from(u32::from_be_bytes(bytes.try_into().ok()?)).ok()
}

/// The frames by the queue that sends them: a flow keeps to one, so that its order is defined.
fn by_queue(frames: &[Vec<u8>], queues: usize) -> Vec<Vec<Vec<u8>>> {
    let queue_of = |number: usize| number % FLOWS % queues;
    (0..queues)
        .map(|queue| {
            let own = frames.iter().enumerate().filter(|(at, _)| queue_of(*at) == queue);
            own.map(|(_, frame)| frame.clone()).collect()
        })
        .collect()
}

/// Checks that what came was sent, unharmed, once, and in the order of each flow; returns how many there were.
fn check_received(sent: &[Vec<u8>], received: &[Vec<Vec<u8>>]) -> Result<usize> {
    let mut seen = HashSet::new();
    for (queue, frames) in received.iter().enumerate() {
        let mut last = [None; FLOWS];
        for frame in frames {
            let number = number_of(frame).with_context(|| format!("a stray frame: {frame:?}"))?;
            ensure!(
                sent.get(number) == Some(frame),
                "frame {number} of {} bytes came as {} others: {frame:02x?}",
                sent.get(number).map_or(0, Vec::len),
                frame.len()
            );
            ensure!(seen.insert(number), "frame {number} came twice");
            ensure!(
                last[number % FLOWS].replace(number) < Some(number),
                "frame {number} overtook another of its flow on queue {queue}"
            );
        }
    }
    Ok(seen.len())
}

fn number(report: &Value, path: &str) -> Result<u64> {
    let value = report.pointer(path).and_then(Value::as_u64);
    value.with_context(|| format!("no {path} in {report}"))
}

/// Frames that vnicd has taken from a port's guest, given to it, and dropped by its drop counters, all since the start.
fn port_counts(daemon: &Daemon, port: usize) -> Result<(Counts, u64)> {
    let report = daemon.query("stats")?;
    let drops = report.pointer(&format!("/ports/{port}/drops"));
    let drops = drops.and_then(Value::as_object).context("no drop counters")?;
    let counts = Counts {
        rx: number(&report, &format!("/ports/{port}/guest_rx/frames"))?,
        tx: number(&report, &format!("/ports/{port}/guest_tx/frames"))?,
    };
    Ok((counts, drops.values().filter_map(Value::as_u64).sum()))
}

/// Two ports without any NIC and a testpmd on each.
struct Two {
    ends: [Testpmd; 2],
    frames: [Vec<Vec<u8>>; 2],
    daemon: Daemon,
    // Outlive what runs in them.
    _fabric: Fabric,
    folder: TempDir,
    _machine: MachineLock,
}

impl Two {
    fn set(workers: u32, queues: usize, rounds: usize, adjust: impl Fn(&mut TestpmdOptions)) -> Result<Two> {
        let machine = MachineLock::acquire()?;
        let folder = tempfile::tempdir()?;
        let fabric = Fabric::new(0, 1, Distribution::Lag)?;
        let daemon = start_daemon(&fabric, folder.path(), workers, queues, 2)?;
        let frames =
            [(0, 1), (1, 0)].map(|(from, to)| every_size(rounds, guest_mac_bytes(from), guest_mac_bytes(to)));
        let mut ends = Vec::new();
        for (index, frames) in frames.iter().enumerate() {
            let options = options(&daemon, index, queues, &adjust);
            ends.push(Testpmd::start(
                folder.path(),
                &options,
                &by_queue(frames, queues),
            )?);
        }
        let ends = <[Testpmd; 2]>::try_from(ends).map_err(|_| anyhow::anyhow!("two ends"))?;
        let two = Two {
            ends,
            frames,
            daemon,
            _fabric: fabric,
            folder,
            _machine: machine,
        };
        wait_running(&two.daemon, queues)?;
        Ok(two)
    }

    /// Lets both ends send all their frames at once. Waits until every frame has arrived or was counted as dropped, and
    /// checks that testpmd, vnicd and the files agree on how many; returns how many arrived at each end.
    fn exchange(&mut self) -> Result<[usize; 2]> {
        let before = [port_counts(&self.daemon, 0)?, port_counts(&self.daemon, 1)?];
        self.ends.iter_mut().try_for_each(Testpmd::forward)?;
        let mut last = String::new();
        let settled = wait_for("the end of the exchange", PATIENCE, PACE, || {
            let mut whole = true;
            let (mut sent, mut arrived, mut dropped) = (0, 0, 0);
            let mut arrivals = [0; 2];
            for index in 0..2 {
                let read = self.ends[index].counts(FILES)?.rx;
                let driver = self.ends[index].counts(VIRTIO)?;
                let (now, drops) = port_counts(&self.daemon, index)?;
                let (then, drops_then) = before[index];
                whole &= read == u64::try_from(self.frames[index].len())?;
                whole &= now.tx - then.tx == driver.tx && now.rx - then.rx == driver.rx;
                sent += driver.tx;
                arrived += driver.rx;
                dropped += drops - drops_then;
                arrivals[index] = usize::try_from(driver.rx)?;
            }
            whole &= sent == arrived + dropped;
            last = format!("{sent} sent, {arrived} arrived, {dropped} dropped");
            Ok(whole.then_some(arrivals))
        })
        .with_context(|| format!("the counts never agreed: {last}"))
        .with_context(|| self.daemon.log_tail(20))?;
        for (index, expected) in settled.iter().enumerate() {
            let received = self.ends[index].stop()?;
            let intact = check_received(&self.frames[1 - index], &received)?;
            ensure!(
                intact == *expected,
                "{intact} frames in the file of end {index}, {expected} counted"
            );
        }
        Ok(settled)
    }

    /// As [`Two::exchange`], twice with the rings stopped and started between, and nothing may be lost.
    fn exchange_all(mut self) -> Result<()> {
        for round in 0..2 {
            if round > 0 {
                self.ends.iter_mut().try_for_each(Testpmd::start_devices)?;
            }
            let arrived = self.exchange().with_context(|| format!("round {round}"))?;
            let all = self.frames.each_ref().map(Vec::len);
            assert_eq!(arrived, all, "round {round}: {}", self.daemon.vnic(&["stats"])?);
        }
        let report = self.daemon.query("stats")?;
        let queues = self.ends[0].queues();
        for port in 0..2 {
            let pairs = report.pointer(&format!("/ports/{port}/queue_pairs"));
            for pair in pairs
                .and_then(Value::as_array)
                .context("no queue pairs")?
                .iter()
                .take(queues)
            {
                for way in ["/guest_tx/frames", "/guest_rx/frames"] {
                    assert!(
                        number(pair, way)? > 0,
                        "nothing in {way} of a queue pair: {report}"
                    );
                }
            }
        }
        let [first, second] = self.ends;
        first.quit()?;
        second.quit()
    }
}

fn start_daemon(fabric: &Fabric, folder: &Path, workers: u32, queues: usize, ports: usize) -> Result<Daemon> {
    let names: Vec<(String, String)> = (0..ports)
        .map(|index| (format!("p{index}"), guest_mac(index)))
        .collect();
    let names: Vec<(&str, &str)> = names.iter().map(|(name, mac)| (&**name, &**mac)).collect();
    let mut options = DaemonOptions::new(&names, &fabric.nics(), workers);
    for port in &mut options.ports {
        port.queues = u32::try_from(queues)?;
    }
    Daemon::start(&fabric.host, folder, &options)
}

fn options(
    daemon: &Daemon,
    index: usize,
    queues: usize,
    adjust: impl Fn(&mut TestpmdOptions),
) -> TestpmdOptions {
    let socket = daemon.socket(&format!("p{index}"));
    let mut options = TestpmdOptions::new(&format!("t{index}"), socket, &guest_mac(index), queues);
    adjust(&mut options);
    options
}

/// Waits until vnicd has carried out what the drivers asked for: virtio-user does not wait for that, and what it sends on
/// a queue pair that is not enabled yet is rightly discarded.
fn wait_running(daemon: &Daemon, queues: usize) -> Result<()> {
    let pairs = u64::try_from(queues)?;
    wait_for("running queue pairs", PATIENCE, PACE, || {
        let report = daemon.query("ports")?;
        let ports = report["ports"].as_array().context("no list of ports")?;
        let running = ports
            .iter()
            .all(|port| port["state"] == "running" && port["queue_pairs"] == pairs);
        Ok(running.then_some(()))
    })
}

#[test]
fn the_comparison_sees_what_is_wrong() -> Result<()> {
    let sent: Vec<Vec<u8>> = (0..2 * FLOWS)
        .map(|number| frame(number, 100, STRANGER, STRANGER))
        .collect();
    assert_eq!(check_received(&sent, &by_queue(&sent, 2))?, sent.len());
    let fails = |frames: Vec<Vec<u8>>| check_received(&sent, &[frames]).is_err();
    let mut damaged = sent[1].clone();
    damaged[99] ^= 1;
    assert!(fails(vec![damaged]), "damage");
    assert!(fails(vec![sent[1][..99].to_vec()]), "a frame cut off");
    assert!(fails(vec![sent[1].clone(), sent[1].clone()]), "a frame twice");
    assert!(
        fails(vec![sent[FLOWS].clone(), sent[0].clone()]),
        "a flow out of order"
    );
    Ok(())
}

/// Nothing but the number of queue pairs and workers.
fn every_size_arrives(workers: u32, queues: usize) -> Result<()> {
    Two::set(workers, queues, 1, |_| {})?.exchange_all()
}

#[test]
fn every_size_arrives_by_one_worker() -> Result<()> {
    every_size_arrives(1, 1)
}

#[test]
fn every_size_arrives_by_two_workers_and_two_queue_pairs() -> Result<()> {
    every_size_arrives(2, 2)
}

#[test]
fn every_size_arrives_by_one_worker_and_four_queue_pairs() -> Result<()> {
    every_size_arrives(1, 4)
}

#[test]
fn every_size_arrives_by_two_workers_and_four_queue_pairs() -> Result<()> {
    every_size_arrives(2, 4)
}

/// The vectorised driver has receive code of its own, and no mergeable buffers.
#[test]
fn every_size_arrives_at_the_vectorised_driver() -> Result<()> {
    let adjust = |options: &mut TestpmdOptions| {
        options.device = vec!["mrg_rxbuf=0".to_owned(), "vectorized=1".to_owned()];
        options.environment = vec!["--force-max-simd-bitwidth=256".to_owned()];
    };
    Two::set(2, 2, 1, adjust)?.exchange_all()
}

/// Buffers of 192 bytes: a long frame is sent from eight descriptors and received into eight merged buffers.
#[test]
fn every_size_arrives_in_small_buffers() -> Result<()> {
    let adjust = |options: &mut TestpmdOptions| {
        options.queue_size = 16384;
        options.buffers = (100_000, Some(320));
    };
    Two::set(2, 1, 1, adjust)?.exchange_all()
}

/// With huge pages the driver adds to its memory as it starts, while its rings already run.
#[test]
fn every_size_arrives_in_memory_of_huge_pages() -> Result<()> {
    Two::set(2, 2, 1, |options| options.huge_pages = true)?.exchange_all()
}

/// Rings of 128 entries, filled as fast as the driver can from both ends: frames are lost, but each is accounted for, and
/// those that arrive are whole and in order.
#[test]
fn an_overload_loses_frames_but_no_count() -> Result<()> {
    for workers in [1, 2] {
        let mut two = Two::set(workers, 2, 8, |options| options.queue_size = 128)?;
        let arrived = two.exchange()?;
        assert!(
            arrived.iter().all(|count| *count > 128),
            "hardly a frame arrived: {arrived:?}"
        );
        let report = two.daemon.query("stats")?;
        assert_eq!(
            number(&report, "/frame_memory/held")? + number(&report, "/frame_memory/quarantined")?,
            0,
            "chunks were lost: {report}"
        );
    }
    Ok(())
}

/// A driver that is killed in the middle of a flood, and its successor on the same port.
#[test]
fn a_driver_killed_in_a_flood_has_a_successor() -> Result<()> {
    let flood = |options: &mut TestpmdOptions| options.files = vec!["infinite_rx=1".to_owned()];
    let mut two = Two::set(2, 2, 1, flood)?;
    two.ends.iter_mut().try_for_each(Testpmd::forward)?;
    let grown = |daemon: &Daemon, port: usize, from: u64| -> Result<()> {
        wait_for("the flood", PATIENCE, PACE, || {
            Ok((port_counts(daemon, port)?.0.rx > from + 5000).then_some(()))
        })
    };
    grown(&two.daemon, 1, 0)?;
    let Two {
        ends: [mut flooding, victim],
        daemon,
        frames,
        folder,
        ..
    } = two;
    victim.kill()?;
    let successor = options(&daemon, 1, 2, |_| {});
    let mut successor = Testpmd::start(folder.path(), &successor, &by_queue(&frames[1], 2))?;
    wait_running(&daemon, 2)?;
    let (before, _) = port_counts(&daemon, 1)?;
    successor.forward()?;
    grown(&daemon, 1, before.rx)?;
    flooding.stop()?;
    for (queue, frames_of_queue) in successor.stop()?.iter().enumerate() {
        assert!(!frames_of_queue.is_empty(), "nothing on queue {queue}");
        for frame in frames_of_queue {
            let known = number_of(frame).and_then(|number| frames[0].get(number));
            assert_eq!(known, Some(frame), "a frame that was never sent");
        }
    }
    successor.quit()
}

/// By a NIC to a peer that compares every frame, and back.
fn by_a_nic(workers: u32, queues: usize) -> Result<()> {
    let _machine = MachineLock::acquire()?;
    let folder = tempfile::tempdir()?;
    let fabric = Fabric::new(1, u32::try_from(queues)?, Distribution::Lag)?;
    let daemon = start_daemon(&fabric, folder.path(), workers, queues, 1)?;
    let out = every_size(1, guest_mac_bytes(0), STRANGER);
    let back = every_size(1, STRANGER, guest_mac_bytes(0));
    let options = options(&daemon, 0, queues, |_| {});
    let mut guest = Testpmd::start(folder.path(), &options, &by_queue(&out, queues))?;
    wait_running(&daemon, queues)?;
    let peer = fabric.peer.run(|| Ok(PacketSocket::open(PEER_INTERFACE)?))?;

    guest.forward()?;
    let mut received = Vec::new();
    let mut buffer = vec![0u8; 4096];
    let end = Instant::now() + PATIENCE;
    while received.len() < out.len() && Instant::now() < end {
        match peer.receive(&mut buffer)? {
            Some(length) if buffer[..length].get(..6) == Some(&STRANGER) => {
                received.push(buffer[..length].to_vec());
            }
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    assert_eq!(received.len(), out.len(), "{}", daemon.vnic(&["stats"])?);
    assert_eq!(check_received(&out, &[received])?, out.len());
    let driver = guest.counts(VIRTIO)?;
    assert_eq!(driver.tx, u64::try_from(out.len())?);
    assert_eq!(port_counts(&daemon, 0)?.0.tx, driver.tx);
    assert_eq!(number(&daemon.query("stats")?, "/nics/0/tx/frames")?, driver.tx);

    // No faster than the guest takes them: this is about contents, and a NIC may lose what it has no room for.
    let start = guest.counts(VIRTIO)?.rx;
    let mut sent = start;
    for burst in back.chunks(128) {
        burst.iter().try_for_each(|frame| peer.send(frame))?;
        sent += u64::try_from(burst.len())?;
        wait_for("a burst from the NIC", PATIENCE, Duration::from_millis(2), || {
            Ok((port_counts(&daemon, 0)?.0.rx >= sent).then_some(()))
        })
        .with_context(|| daemon.vnic(&["stats"]).unwrap_or_default())?;
    }
    wait_for("equal counts", PATIENCE, PACE, || {
        Ok((port_counts(&daemon, 0)?.0.rx == guest.counts(VIRTIO)?.rx).then_some(()))
    })?;
    // The peer's kernel may have multicast something of its own.
    let received: Vec<Vec<Vec<u8>>> = guest
        .stop()?
        .into_iter()
        .map(|frames| {
            let ours = frames
                .into_iter()
                .filter(|frame| frame[..6] == guest_mac_bytes(0));
            ours.collect()
        })
        .collect();
    assert!(
        received.iter().all(|frames| !frames.is_empty()),
        "a queue got nothing"
    );
    assert_eq!(check_received(&back, &received)?, back.len());
    guest.quit()
}

#[test]
fn every_size_passes_a_nic_by_one_worker() -> Result<()> {
    by_a_nic(1, 1)
}

#[test]
fn every_size_passes_a_nic_by_two_workers_and_two_queue_pairs() -> Result<()> {
    by_a_nic(2, 2)
}
