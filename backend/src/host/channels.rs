//! How many queues a NIC has: counted while it is driven, and set for the daemon's lifetime if that was asked for.

use std::io;
use std::time::{Duration, Instant};

use super::netlink::ethtool::{Channels, Ethtool};

/// After a socket on a queue closes, drivers take some milliseconds to let go of it and refuse a change until then.
const RESTORE_LIMIT: Duration = Duration::from_secs(1);
const RESTORE_PAUSE: Duration = Duration::from_millis(10);

/// Why the number of queues cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum ChannelsError {
    /// No such notion.
    #[error("NIC {ifname}: its driver cannot change the number of queues: leave `set-channels` out")]
    Fixed {
        /// Interface.
        ifname: String,
    },
    /// More than there can be.
    #[error("NIC {ifname}: queues={asked} but the driver has at most {max}: give queues={max} or fewer")]
    TooMany {
        /// Interface.
        ifname: String,
        /// Queues asked for.
        asked: u32,
        /// Most that there can be.
        max: u32,
    },
    /// The driver refuses.
    #[error("NIC {ifname}: the driver refuses {asked} queues: {source}; see what `{command}` says")]
    Refused {
        /// Interface.
        ifname: String,
        /// Queues asked for.
        asked: u32,
        /// What does the same by hand.
        command: String,
        /// The driver's reason.
        source: io::Error,
    },
    /// The kernel could not be asked.
    #[error("NIC {ifname}: cannot ask for its channels: {source} (set-channels needs kernel 5.7 or later)")]
    Ask {
        /// Interface.
        ifname: String,
        /// Why.
        source: io::Error,
    },
}

/// Gives an interface its former number of channels when it is dropped. After kill -9 nobody does.
#[derive(Debug)]
pub struct ChannelsGuard {
    ifindex: u32,
    ifname: String,
    before: Channels,
}

/// Has an interface receive on exactly `queues` queues; `None` if it does already.
pub fn set(ifindex: u32, ifname: &str, queues: u32) -> Result<Option<ChannelsGuard>, ChannelsError> {
    let name = || ifname.to_owned();
    let ask = |source| ChannelsError::Ask {
        ifname: name(),
        source,
    };
    let mut ethtool = Ethtool::open().map_err(ask)?;
    let before = ethtool
        .channels(ifindex)
        .map_err(ask)?
        .ok_or_else(|| ChannelsError::Fixed { ifname: name() })?;
    let wanted = for_queues(&before, queues).map_err(|max| ChannelsError::TooMany {
        ifname: name(),
        asked: queues,
        max,
    })?;
    if wanted == before {
        return Ok(None);
    }
    match ethtool.set_channels(ifindex, &before, &wanted) {
        Ok(()) => Ok(Some(ChannelsGuard {
            ifindex,
            ifname: name(),
            before,
        })),
        Err(source) => Err(ChannelsError::Refused {
            command: command(ifname, Some(&before), queues),
            ifname: name(),
            asked: queues,
            source,
        }),
    }
}

/// The command that gives an interface `queues` receive queues.
#[must_use]
pub fn command(ifname: &str, channels: Option<&Channels>, queues: u32) -> String {
    match channels {
        Some(channels) if channels.combined_max == 0 && channels.rx_max > 0 => {
            let tx = for_queues(channels, queues).map_or(channels.tx, |wanted| wanted.tx);
            match tx == channels.tx {
                true => format!("ethtool -L {ifname} rx {queues}"),
                false => format!("ethtool -L {ifname} rx {queues} tx {tx}"),
            }
        }
        _ => format!("ethtool -L {ifname} combined {queues}"),
    }
}

/// [`command`] for an interface that was not asked yet.
#[must_use]
pub fn command_for(ifindex: u32, ifname: &str, queues: u32) -> String {
    let channels = Ethtool::open()
        .and_then(|mut ethtool| ethtool.channels(ifindex))
        .ok()
        .flatten();
    command(ifname, channels.as_ref(), queues)
}

/// Receive queues in use, counted in sysfs without the kernel's RTNL lock.
#[must_use]
pub fn rx_queues(ifname: &str) -> Option<u32> {
    let folder = std::fs::read_dir(format!("/sys/class/net/{ifname}/queues")).ok()?;
    let count = folder
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("rx-"))
        .count();
    u32::try_from(count).ok()
}

/// What to set for `queues` receive queues, each with a transmit queue if that can be; or the most that can be had.
fn for_queues(now: &Channels, queues: u32) -> Result<Channels, u32> {
    if now.rx + now.combined == queues {
        return Ok(*now);
    }
    if now.combined_max > 0 {
        // Receive-only channels stay, the others make up the rest.
        let most = now.rx + now.combined_max;
        let combined = queues.checked_sub(now.rx).filter(|count| *count > 0);
        return match combined {
            Some(combined) if queues <= most => Ok(Channels { combined, ..*now }),
            _ => Err(most),
        };
    }
    if queues > now.rx_max {
        return Err(now.rx_max);
    }
    Ok(Channels {
        rx: queues,
        tx: now.tx.max(queues.min(now.tx_max)),
        ..*now
    })
}

impl ChannelsGuard {
    fn restore(&self) -> io::Result<()> {
        let mut ethtool = Ethtool::open()?;
        let began = Instant::now();
        loop {
            let Some(now) = ethtool.channels(self.ifindex)? else {
                return Ok(());
            };
            // Limits may have changed since, and are not ours to set.
            let wanted = Channels {
                rx: self.before.rx,
                tx: self.before.tx,
                combined: self.before.combined,
                ..now
            };
            if wanted == now {
                return Ok(());
            }
            match ethtool.set_channels(self.ifindex, &now, &wanted) {
                Err(_) if began.elapsed() < RESTORE_LIMIT => std::thread::sleep(RESTORE_PAUSE),
                outcome => return outcome,
            }
        }
    }
}

impl Drop for ChannelsGuard {
    fn drop(&mut self) {
        match self.restore() {
            Ok(()) => tracing::debug!(interface = self.ifname, "number of queues restored"),
            // The interface is gone, and its channels with it.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => tracing::warn!(
                interface = self.ifname,
                "cannot restore the number of queues: {error}; do it with `{}`",
                command(
                    &self.ifname,
                    Some(&self.before),
                    self.before.rx + self.before.combined
                )
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: Channels = Channels {
        rx: 0,
        tx: 0,
        combined: 4,
        rx_max: 0,
        tx_max: 0,
        combined_max: 8,
    };
    const VETH: Channels = Channels {
        rx: 1,
        tx: 1,
        combined: 0,
        rx_max: 4,
        tx_max: 3,
        combined_max: 0,
    };

    #[test]
    fn combined_channels_are_set_where_there_are_any() {
        assert_eq!(for_queues(&REAL, 4), Ok(REAL));
        assert_eq!(for_queues(&REAL, 2), Ok(Channels { combined: 2, ..REAL }));
        assert_eq!(for_queues(&REAL, 9), Err(8));
        let with_rx = Channels {
            rx: 2,
            rx_max: 2,
            ..REAL
        };
        assert_eq!(
            for_queues(&with_rx, 7),
            Ok(Channels {
                combined: 5,
                ..with_rx
            })
        );
        assert_eq!(for_queues(&with_rx, 2), Err(10), "a channel for both must stay");
    }

    #[test]
    fn separate_channels_get_a_transmit_queue_for_each_receive_queue() {
        let wanted = |rx, tx| Ok(Channels { rx, tx, ..VETH });
        assert_eq!(for_queues(&VETH, 2), wanted(2, 2));
        assert_eq!(for_queues(&VETH, 4), wanted(4, 3));
        assert_eq!(for_queues(&VETH, 5), Err(4));
        assert_eq!(
            for_queues(&Channels { rx: 3, tx: 3, ..VETH }, 1),
            wanted(1, 3),
            "never fewer"
        );
    }

    #[test]
    fn the_command_names_the_sort_of_channel_that_there_is() {
        assert_eq!(command("eth1", Some(&REAL), 2), "ethtool -L eth1 combined 2");
        assert_eq!(command("eth1", None, 2), "ethtool -L eth1 combined 2");
        assert_eq!(command("up0", Some(&VETH), 2), "ethtool -L up0 rx 2 tx 2");
        let wide = Channels { rx: 4, tx: 3, ..VETH };
        assert_eq!(command("up0", Some(&wide), 1), "ethtool -L up0 rx 1");
    }
}
