//! Whether a NIC can carry frames, cheap enough to ask thousands of times a second.
//!
//! sysfs counts carrier losses and returns (`carrier_down_count`, `carrier_up_count`). The counts are read without the
//! kernel's RTNL lock, a few microseconds each, and keep flaps that were over before anyone looked. Reading `carrier` itself
//! may wait for that lock, so it is read only to confirm good news.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::interface::IFF_UP;

/// Why a link's state changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The driver reported carrier loss.
    CarrierLost,
    /// The driver reported carrier.
    CarrierBack,
    /// The carrier went and came back between two looks; frames sent meanwhile may be lost.
    Flapped,
    /// The administrator set the interface down.
    SetDown,
    /// The administrator set the interface up.
    SetUp,
    /// The interface is gone from this network namespace; the watch stays in this state for good.
    Vanished,
}

impl Cause {
    /// A word for reports and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Cause::CarrierLost => "carrier lost",
            Cause::CarrierBack => "carrier back",
            Cause::Flapped => "carrier flapped",
            Cause::SetDown => "set down",
            Cause::SetUp => "set up",
            Cause::Vanished => "vanished",
        }
    }
}

/// A change since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Whether the link can carry frames now.
    pub up: bool,
    /// Why that changed (or, for a flap, that it did for a while).
    pub cause: Cause,
}

/// Watches one interface through sysfs files that stay open.
#[derive(Debug)]
pub struct CarrierWatch {
    files: Files,
    seen: Look,
    /// Carrier, by the counts since `carrier` was last read.
    carrier: bool,
    gone: bool,
}

#[derive(Debug)]
struct Files {
    down_count: File,
    up_count: File,
    flags: File,
    carrier: File,
}

/// One reading of the cheap files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    downs: u32,
    ups: u32,
    admin_up: bool,
}

impl CarrierWatch {
    /// Opens the files of an interface and takes the first look.
    pub fn new(ifname: &str) -> std::io::Result<CarrierWatch> {
        let open = |name: &str| File::open(format!("/sys/class/net/{ifname}/{name}"));
        let files = Files {
            down_count: open("carrier_down_count")?,
            up_count: open("carrier_up_count")?,
            flags: open("flags")?,
            carrier: open("carrier")?,
        };
        let seen = files.look()?;
        // An event between the two readings is counted again by the next poll, which then confirms with `carrier`.
        let carrier = files.carrier();
        Ok(CarrierWatch {
            files,
            seen,
            carrier,
            gone: false,
        })
    }

    /// Whether the link could carry frames at the last look.
    #[must_use]
    pub fn up(&self) -> bool {
        !self.gone && self.seen.admin_up && self.carrier
    }

    /// Whether the interface is gone.
    #[must_use]
    pub fn vanished(&self) -> bool {
        self.gone
    }

    /// The kernel said that the interface left this network namespace, which its files do not tell while it exists elsewhere.
    /// Returns the change, if it was not known.
    pub fn left(&mut self) -> Option<Change> {
        let known = std::mem::replace(&mut self.gone, true);
        (!known).then_some(Change {
            up: false,
            cause: Cause::Vanished,
        })
    }

    /// Looks again: three short reads. Never waits for the kernel's RTNL lock unless there is good news to confirm.
    pub fn poll(&mut self) -> Option<Change> {
        if self.gone {
            return None;
        }
        let was_up = self.up();
        let Ok(now) = self.files.look() else {
            self.gone = true;
            return Some(Change {
                up: false,
                cause: Cause::Vanished,
            });
        };
        let before = std::mem::replace(&mut self.seen, now);
        if now == before {
            return None;
        }
        let downs = now.downs.wrapping_sub(before.downs);
        let ups = now.ups.wrapping_sub(before.ups);
        // Losses and returns alternate, so the counts alone tell the state; only "up" is worth a slower confirmation.
        let carrier_by_counts = if downs == ups { self.carrier } else { ups > downs };
        self.carrier = (carrier_by_counts || now.admin_up && !before.admin_up) && self.files.carrier();
        let up = self.up();
        let cause = match (was_up, up) {
            (true, true) if downs > 0 => Cause::Flapped,
            (true, true) | (false, false) => return None,
            (true, false) if !now.admin_up => Cause::SetDown,
            (true, false) => Cause::CarrierLost,
            (false, true) if !before.admin_up => Cause::SetUp,
            (false, true) => Cause::CarrierBack,
        };
        Some(Change { up, cause })
    }
}

impl Files {
    fn look(&self) -> std::io::Result<Look> {
        // Downs last: a loss that comes between the reads is then seen now rather than at the next look.
        let ups = number(&self.up_count, 10)?;
        let downs = number(&self.down_count, 10)?;
        Ok(Look {
            downs,
            ups,
            admin_up: number(&self.flags, 16)? & IFF_UP != 0,
        })
    }

    /// Reading it fails with EINVAL while the interface is set down.
    fn carrier(&self) -> bool {
        number(&self.carrier, 10).is_ok_and(|carrier| carrier == 1)
    }
}

fn number(file: &File, radix: u32) -> std::io::Result<u32> {
    let mut bytes = [0; 16];
    let length = file.read_at(&mut bytes, 0)?;
    let text = std::str::from_utf8(&bytes[..length])
        .unwrap_or_default()
        .trim()
        .trim_start_matches("0x");
    u32::from_str_radix(text, radix).map_err(|_| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A folder of plain files in the place of sysfs.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Fake {
            let fake = Fake(tempfile::tempdir().unwrap());
            fake.set("carrier_down_count", "4");
            fake.set("carrier_up_count", "5");
            fake.set("flags", "0x1003");
            fake.set("carrier", "1");
            fake
        }

        fn set(&self, name: &str, text: &str) {
            std::fs::write(self.0.path().join(name), format!("{text}\n")).unwrap();
        }

        fn watch(&self) -> CarrierWatch {
            let open = |name: &str| File::open(Path::new(self.0.path()).join(name)).unwrap();
            let files = Files {
                down_count: open("carrier_down_count"),
                up_count: open("carrier_up_count"),
                flags: open("flags"),
                carrier: open("carrier"),
            };
            let seen = files.look().unwrap();
            let carrier = files.carrier();
            CarrierWatch {
                files,
                seen,
                carrier,
                gone: false,
            }
        }
    }

    #[test]
    fn loss_is_believed_from_the_counts_alone_and_return_is_confirmed() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        assert!(watch.up());
        assert_eq!(watch.poll(), None);
        fake.set("carrier_down_count", "5");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: false,
                cause: Cause::CarrierLost
            }),
            "`carrier` still says 1"
        );
        assert_eq!(watch.poll(), None);
        fake.set("carrier_up_count", "6");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: true,
                cause: Cause::CarrierBack
            })
        );
    }

    #[test]
    fn a_flap_between_two_looks_is_told() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("carrier_down_count", "6");
        fake.set("carrier_up_count", "7");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: true,
                cause: Cause::Flapped
            })
        );
        assert!(watch.up());
    }

    #[test]
    fn set_down_and_up_without_a_carrier_event() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("flags", "0x1002");
        fake.set("carrier", "");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: false,
                cause: Cause::SetDown
            })
        );
        fake.set("flags", "0x1003");
        fake.set("carrier", "1");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: true,
                cause: Cause::SetUp
            })
        );
    }

    #[test]
    fn a_vanished_interface_stays_so() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("flags", "");
        assert_eq!(
            watch.poll(),
            Some(Change {
                up: false,
                cause: Cause::Vanished
            })
        );
        assert_eq!(watch.poll(), None);
        assert!(!watch.up() && watch.vanished());
    }
}
