//! The agent itself, which runs inside the guest.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::termios::{self, SetArg};

use super::protocol::{Command, Interface, Message, Output, Reply, Request};
use crate::sys::LinkProbe;
use crate::traffic::bulk::{self, BulkServer};
use crate::traffic::echo::EchoServer;
use crate::traffic::raw::{self, Capture};
use crate::traffic::sessions::SessionGroup;
use crate::traffic::udp::{self, UdpEcho};

/// Things that run between one command and another.
enum Running {
    // Held for as long as the agent runs.
    #[allow(dead_code, reason = "kept alive, never asked")]
    TcpEcho(EchoServer),
    #[allow(dead_code, reason = "kept alive, never asked")]
    UdpEcho(UdpEcho),
    #[allow(dead_code, reason = "kept alive, never asked")]
    Bulk(BulkServer),
    Sessions(SessionGroup),
    Capture(Capture),
}

struct Agent {
    running: Mutex<HashMap<u64, Running>>,
    next: AtomicU64,
    out: Mutex<File>,
    heard: AtomicBool,
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves requests from the serial port `device` until it closes.
///
/// # Errors
/// If the port cannot be used.
pub fn serve(device: &Path) -> Result<()> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .with_context(|| format!("opening {}", device.display()))?;
    if let Ok(mut settings) = termios::tcgetattr(&port) {
        termios::cfmakeraw(&mut settings);
        termios::tcsetattr(&port, SetArg::TCSANOW, &settings)?;
    }
    let agent = Arc::new(Agent {
        running: Mutex::new(HashMap::new()),
        next: AtomicU64::new(1),
        out: Mutex::new(port.try_clone()?),
        heard: AtomicBool::new(false),
    });
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned();
    let announcer = Arc::clone(&agent);
    std::thread::spawn(move || {
        while !announcer.heard.load(Ordering::Relaxed) {
            announcer.say(&Message::Ready { boot: boot.clone() });
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    for line in BufReader::new(port).lines() {
        let line = line.context("reading the serial port")?;
        let Ok(request) = serde_json::from_str::<Request>(&line) else {
            continue;
        };
        agent.heard.store(true, Ordering::Relaxed);
        let agent = Arc::clone(&agent);
        // Each in a thread of its own: a long transfer must not keep others waiting.
        std::thread::spawn(move || {
            let reply = agent
                .execute(request.command)
                .unwrap_or_else(|error| Reply::Failed {
                    reason: format!("{error:#}"),
                });
            agent.say(&Message::Reply {
                id: request.id,
                reply,
            });
        });
    }
    Ok(())
}

impl Agent {
    fn say(&self, message: &Message) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            // Without the port there is nobody to tell.
            let _ = hold(&self.out).write_all(&line);
        }
    }

    fn keep(&self, running: Running) -> Reply {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        hold(&self.running).insert(number, running);
        Reply::Started { number }
    }

    fn execute(&self, command: Command) -> Result<Reply> {
        Ok(match command {
            Command::Hello => Reply::Done,
            Command::Interfaces => Reply::Interfaces {
                interfaces: interfaces()?,
            },
            Command::Configure {
                interface,
                addresses,
                mac,
                mtu,
                queue_pairs,
            } => {
                configure(&interface, &addresses, mac.as_deref(), mtu, queue_pairs)?;
                Reply::Done
            }
            Command::Run { arguments } => Reply::Output(run(&arguments)?),
            Command::TcpEcho { port } => self.keep(Running::TcpEcho(EchoServer::start(port)?)),
            Command::UdpEcho { port } => self.keep(Running::UdpEcho(UdpEcho::start(port)?)),
            Command::BulkServer { port } => self.keep(Running::Bulk(BulkServer::start(port)?)),
            Command::StartSessions { plan } => self.keep(Running::Sessions(SessionGroup::start(&plan)?)),
            Command::SessionsProgress { group, reset_gaps } => match hold(&self.running).get(&group) {
                Some(Running::Sessions(sessions)) => Reply::Sessions(sessions.progress(reset_gaps)),
                _ => bail!("{group} is no group of sessions"),
            },
            Command::FinishSessions { group } => {
                let taken = hold(&self.running).remove(&group);
                match taken {
                    Some(Running::Sessions(sessions)) => Reply::Sessions(sessions.finish()),
                    _ => bail!("{group} is no group of sessions"),
                }
            }
            Command::Udp { plan } => Reply::Udp(udp::probe(&plan)?),
            Command::Bulk { plan } => Reply::Bulk(bulk::transfer(&plan)?),
            Command::SendFrame {
                interface,
                frame,
                count,
            } => {
                raw::send(&interface, &frame, count)?;
                Reply::Done
            }
            Command::StartCapture { interface, ethertype } => {
                self.keep(Running::Capture(Capture::start(&interface, ethertype)?))
            }
            Command::FinishCapture {
                capture,
                wanted,
                patience_ms,
            } => {
                let taken = hold(&self.running).remove(&capture);
                let Some(Running::Capture(capture)) = taken else {
                    bail!("{capture} is no capture")
                };
                let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
                let frames = capture.collect(wanted, Duration::from_millis(u64::from(patience_ms)))?;
                Reply::Frames { frames }
            }
            Command::Reboot => end("reboot")?,
            Command::PowerOff => end("poweroff")?,
        })
    }
}

/// Ends the guest at once; there is no disk to sync.
fn end(how: &str) -> Result<Reply> {
    run(&[how.to_owned(), "-f".to_owned()])?;
    Ok(Reply::Done)
}

fn run(arguments: &[String]) -> Result<Output> {
    let Some((program, rest)) = arguments.split_first() else {
        bail!("no program named")
    };
    let output = std::process::Command::new("/bin/busybox")
        .arg(program)
        .args(rest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {program}"))?;
    Ok(Output {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn ip(arguments: &[&str]) -> Result<()> {
    let mut all = vec!["ip".to_owned()];
    all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let output = run(&all)?;
    if output.status != 0 {
        bail!("ip {}: {}", arguments.join(" "), output.stderr.trim());
    }
    Ok(())
}

fn configure(
    interface: &str,
    addresses: &[String],
    mac: Option<&str>,
    mtu: Option<u32>,
    queue_pairs: Option<u32>,
) -> Result<()> {
    // Addresses shall be usable at once, and only those given.
    for (setting, value) in [
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("router_solicitations", "0"),
    ] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/{setting}"), value);
    }
    if let Some(mac) = mac {
        ip(&["link", "set", interface, "down"])?;
        ip(&["link", "set", interface, "address", mac])?;
    }
    if let Some(mtu) = mtu {
        ip(&["link", "set", interface, "mtu", &mtu.to_string()])?;
    }
    if let Some(pairs) = queue_pairs {
        LinkProbe::open()?
            .set_combined_channels(interface, pairs)
            .context("setting the number of queue pairs")?;
    }
    ip(&["link", "set", interface, "up"])?;
    if !addresses.is_empty() {
        ip(&["addr", "flush", "dev", interface, "scope", "global"])?;
    }
    for address in addresses {
        ip(&["addr", "add", address, "dev", interface])?;
    }
    Ok(())
}

fn interfaces() -> Result<Vec<Interface>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "lo" {
            continue;
        }
        let read =
            |file: &str| fs::read_to_string(entry.path().join(file)).map(|text| text.trim().to_owned());
        let queues = fs::read_dir(entry.path().join("queues"))?.flatten();
        let rx_queues = queues
            .filter(|queue| queue.file_name().to_string_lossy().starts_with("rx-"))
            .count();
        found.push(Interface {
            mac: read("address")?,
            mtu: read("mtu")?.parse().context("reading the MTU")?,
            carrier: read("carrier").ok().map(|carrier| carrier == "1"),
            rx_queues: u32::try_from(rx_queues)?,
            name,
        });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}
