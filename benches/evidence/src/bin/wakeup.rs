//! ADR 0006: time from a write to an eventfd until the thread that sleeps on it has woken and read it, with
//! `epoll_wait` and with a multishot poll of io_uring. Needs `--release`.

use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vnic_evidence::{Claims, quantile};

const WAKE_UPS: usize = 1000;
const ROUNDS: usize = 21;
/// As many as a worker may have: eight ports of one queue pair, and eight NIC queues. One of them is written.
const DESCRIPTORS: usize = 24;

/// Sleeps until one of the descriptors is readable.
trait Sleeper {
    fn sleep(&mut self);
}

struct ByEpoll(Epoll);

impl ByEpoll {
    fn new(fds: &[EventFd]) -> std::io::Result<ByEpoll> {
        let epoll = Epoll::new()?;
        for (token, fd) in (0..).zip(fds) {
            epoll.ctl(
                ControlOperation::Add,
                fd.as_raw_fd(),
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        Ok(ByEpoll(epoll))
    }
}

impl Sleeper for ByEpoll {
    fn sleep(&mut self) {
        let mut events = [EpollEvent::default(); DESCRIPTORS];
        while self.0.wait(-1, &mut events).unwrap_or(0) == 0 {}
    }
}

struct ByRing(IoUring);

impl ByRing {
    fn new(fds: &[EventFd]) -> std::io::Result<ByRing> {
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(64)?;
        for (token, fd) in (0..).zip(fds) {
            let events = u32::try_from(libc::POLLIN).unwrap_or(1);
            let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).multi(true);
            // SAFETY: a poll request borrows no memory.
            unsafe { ring.submission().push(&poll.build().user_data(token)) }.expect("64 entries have room");
        }
        ring.submit()?;
        Ok(ByRing(ring))
    }
}

impl Sleeper for ByRing {
    fn sleep(&mut self) {
        while self.0.submit_and_wait(1).is_err() {}
        for event in self.0.completion() {
            assert!(
                io_uring::cqueue::more(event.flags()),
                "the kernel ended a multishot poll"
            );
        }
    }
}

/// Keeps this thread on one CPU, as workers are; without a second CPU both threads share one.
fn pin(cpu: usize) {
    // SAFETY: the set is a plain bit mask, which the kernel only reads.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// Microseconds of every wake-up.
fn measure(make: impl FnOnce(&[EventFd]) -> Box<dyn Sleeper> + Send) -> Vec<f64> {
    let fds: Vec<EventFd> = (0..DESCRIPTORS)
        .map(|_| EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
        .collect();
    let started = Instant::now();
    let now = || u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let (woken_at, turn) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut samples = Vec::with_capacity(WAKE_UPS);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            let mut sleeper = make(&fds);
            for i in 1..=WAKE_UPS as u64 {
                turn.store(i, Ordering::Release);
                sleeper.sleep();
                let _ = fds[7].read();
                woken_at.store(now(), Ordering::Release);
            }
        });
        for i in 1..=WAKE_UPS as u64 {
            while turn.load(Ordering::Acquire) != i {
                std::hint::spin_loop();
            }
            // Long enough for the other thread to be asleep; a sample where it was not is a little short, no more.
            std::thread::sleep(Duration::from_micros(50));
            woken_at.store(0, Ordering::Release);
            let written = now();
            fds[7].write(1).expect("an eventfd takes a 1");
            let woken = loop {
                match woken_at.load(Ordering::Acquire) {
                    0 => std::hint::spin_loop(),
                    at => break at,
                }
            };
            samples.push((woken - written) as f64 / 1e3);
        }
    });
    samples
}

fn main() -> ExitCode {
    pin(0);
    let (mut epoll, mut ring) = (Vec::new(), Vec::new());
    let (mut epoll_rounds, mut ring_rounds) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut round = measure(|fds| Box::new(ByEpoll::new(fds).expect("epoll")));
        epoll_rounds.push(quantile(&mut round, 0.5));
        epoll.append(&mut round);
        let mut round = measure(|fds| Box::new(ByRing::new(fds).expect("io_uring is allowed here")));
        ring_rounds.push(quantile(&mut round, 0.5));
        ring.append(&mut round);
    }
    for (name, all, rounds) in [
        ("epoll", &mut epoll, &mut epoll_rounds),
        ("io_uring", &mut ring, &mut ring_rounds),
    ] {
        println!(
            "{name:8}: p50 {:.2} us, p99 {:.1} us; p50 of {ROUNDS} rounds of {WAKE_UPS}: {:.2} to {:.2} us",
            quantile(all, 0.5),
            quantile(all, 0.99),
            quantile(rounds, 0.0),
            quantile(rounds, 1.0)
        );
    }
    let (epoll, ring) = (quantile(&mut epoll, 0.5), quantile(&mut ring, 0.5));
    let mut claims = Claims::default();
    claims.check(
        "io_uring does not wake a thread so much sooner (a quarter) that it is needed now",
        ring > 0.75 * epoll,
        format!("io_uring takes {:.2} of the time that epoll takes", ring / epoll),
    );
    claims.exit()
}
