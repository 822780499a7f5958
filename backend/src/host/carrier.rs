//! Whether a NIC can carry frames, cheap enough to ask thousands of times a second.
//!
//! sysfs counts carrier losses and returns (`carrier_down_count`, `carrier_up_count`). The counts are read without the
//! kernel's RTNL lock, a few microseconds each, and keep flaps that were over before anyone looked. Reading `carrier` itself
//! may wait for that lock, so it is read only to confirm good news.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::interface::IFF_UP;

/// What a link was seen to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    /// The interface is there, and the administrator has set it up.
    pub usable: bool,
    /// It has a carrier.
    pub carrier: bool,
    /// How often the carrier was lost so far, by the kernel's count: what was over before anybody looked is in it.
    pub losses: u32,
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

    /// What the last look found.
    #[must_use]
    pub fn state(&self) -> LinkState {
        LinkState {
            usable: !self.gone && self.seen.admin_up,
            carrier: !self.gone && self.carrier,
            losses: self.seen.downs,
        }
    }

    /// Whether the interface is gone.
    #[must_use]
    pub fn vanished(&self) -> bool {
        self.gone
    }

    /// The kernel said that the interface left this network namespace, which its files do not tell while it exists elsewhere.
    pub fn left(&mut self) {
        self.gone = true;
    }

    /// The cheapest look: one short read, which finds that a carrier was lost since the last [`CarrierWatch::poll`], or that the
    /// interface is gone. `true`: poll.
    #[must_use]
    pub fn glance(&self) -> bool {
        !self.gone && number(&self.files.down_count, 10).ok() != Some(self.seen.downs)
    }

    /// Looks again: three short reads; returns whether anything differs. Never waits for the kernel's RTNL lock unless there is good
    /// news to confirm.
    pub fn poll(&mut self) -> bool {
        if self.gone {
            return false;
        }
        let Ok(now) = self.files.look() else {
            self.gone = true;
            return true;
        };
        let before = std::mem::replace(&mut self.seen, now);
        if now == before {
            return false;
        }
        let downs = now.downs.wrapping_sub(before.downs);
        let ups = now.ups.wrapping_sub(before.ups);
        // Losses and returns alternate, so the counts alone tell the state; only "up" is worth a slower confirmation.
        let carrier_by_counts = if downs == ups { self.carrier } else { ups > downs };
        self.carrier = (carrier_by_counts || now.admin_up && !before.admin_up) && self.files.carrier();
        true
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
    let text = bytes[..length].trim_ascii_end();
    let digits = text.strip_prefix(b"0x").unwrap_or(text);
    let digits = std::str::from_utf8(digits).unwrap_or_default();
    u32::from_str_radix(digits, radix).map_err(|_| std::io::ErrorKind::InvalidData.into())
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

    fn state(usable: bool, carrier: bool, losses: u32) -> LinkState {
        LinkState {
            usable,
            carrier,
            losses,
        }
    }

    #[test]
    fn loss_is_believed_from_the_counts_alone_and_return_is_confirmed() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        assert_eq!(watch.state(), state(true, true, 4));
        assert!(!watch.glance() && !watch.poll());
        fake.set("carrier_down_count", "5");
        assert!(watch.glance() && watch.poll());
        assert_eq!(watch.state(), state(true, false, 5), "`carrier` still says 1");
        assert!(!watch.glance() && !watch.poll());
        fake.set("carrier_up_count", "6");
        fake.set("carrier", "0");
        assert!(!watch.glance() && watch.poll());
        assert_eq!(watch.state(), state(true, false, 5), "not confirmed");
        fake.set("carrier_up_count", "7");
        fake.set("carrier", "1");
        assert!(watch.poll());
        assert_eq!(watch.state(), state(true, true, 5));
    }

    #[test]
    fn a_flap_between_two_looks_is_told() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("carrier_down_count", "6");
        fake.set("carrier_up_count", "7");
        assert!(watch.glance() && watch.poll());
        assert_eq!(watch.state(), state(true, true, 6));
    }

    #[test]
    fn set_down_and_up_without_a_carrier_event() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("flags", "0x1002");
        fake.set("carrier", "");
        assert!(watch.poll() && !watch.state().usable);
        fake.set("flags", "0x1003");
        fake.set("carrier", "1");
        assert!(watch.poll());
        assert_eq!(watch.state(), state(true, true, 4));
    }

    #[test]
    fn a_vanished_interface_stays_so() {
        let fake = Fake::new();
        let mut watch = fake.watch();
        fake.set("flags", "");
        assert!(watch.poll() && watch.vanished());
        fake.set("flags", "0x1003");
        assert!(!watch.poll() && !watch.glance());
        assert_eq!(watch.state(), state(false, false, 4));
    }
}
