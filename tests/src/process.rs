//! Child processes that end with their owner.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sys::{die_with_parent, interrupted};

/// Runs a command to its end and returns what it wrote to stdout.
///
/// # Errors
/// If it cannot start or ends with another status than 0, with what it wrote to stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until `ready` gives a value; looks every `pace`.
///
/// # Errors
/// Those of `ready`, or that `what` did not happen in time.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    pace: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if interrupted() {
            bail!("{what}: interrupted");
        }
        if start.elapsed() >= limit {
            bail!("{what}: not within {:.1} s", limit.as_secs_f64());
        }
        std::thread::sleep(pace);
    }
}

/// The last `lines` lines of a file, for error messages.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A running child whose output goes to a file. It is killed when dropped, and dies with the thread that started it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with stdout and stderr going to `log` (appended).
    ///
    /// # Errors
    /// If it cannot start.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        command.stdin(Stdio::null());
        Process::spawn(name, command, log)
    }

    /// As [`Process::start`], with a pipe to its stdin.
    ///
    /// # Errors
    /// If it cannot start.
    pub fn start_with_input(name: &str, mut command: Command, log: &Path) -> Result<(Process, ChildStdin)> {
        command.stdin(Stdio::piped());
        let mut process = Process::spawn(name, command, log)?;
        let input = process.child.stdin.take().context("a piped child has a stdin")?;
        Ok((process, input))
    }

    fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let file = fs::OpenOptions::new().create(true).append(true).open(log)?;
        command.stdout(file.try_clone()?).stderr(file);
        // Ctrl-C is for the parent, which then cleans up in order.
        command.process_group(0);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("starting {name}: {command:?}"))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            ended: None,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its output.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its exit status if it has ended.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Fails, with the end of its output, if it has ended.
    ///
    /// # Errors
    /// That it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        if let Some(status) = self.status()? {
            bail!(
                "{} ended early ({status}). Its last words:\n{}",
                self.name,
                tail(&self.log, 30)
            );
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Those of kill(2).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_none() {
            let id = i32::try_from(self.child.id()).context("process id out of range")?;
            kill(Pid::from_raw(id), signal).with_context(|| format!("sending {signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, Duration::from_millis(5), || self.status())
    }

    /// SIGTERM, then waits; returns the exit status and how long it took.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn terminate(&mut self, limit: Duration) -> Result<(ExitStatus, Duration)> {
        let start = Instant::now();
        self.signal(Signal::SIGTERM)?;
        let status = self.wait(limit)?;
        Ok((status, start.elapsed()))
    }

    /// SIGKILL, then waits.
    ///
    /// # Errors
    /// Those of kill(2) and waitpid(2).
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(10))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.status(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
