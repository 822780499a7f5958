//! What the environment says of activated sockets: `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` (sd_listen_fds(3)).

use std::os::fd::RawFd;

/// The first descriptor that systemd hands over (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;
/// More sockets than ports can be: a bound on what a variable can make us do.
const MAX_SOCKETS: u32 = 1024;

/// The sockets that came with the start of this process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Activated {
    /// Name and descriptor of each, in the order handed over. Names need not differ, nor be a port's.
    pub sockets: Vec<(String, RawFd)>,
    /// Why there are none although the variables are set: they are meant for another process.
    pub meant_for: Option<u32>,
}

/// Variables that contradict themselves.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivationError {
    /// Not a number, or a senseless one.
    #[error(
        "socket activation: {variable}={value} is not a number from 0 to {max}: start vnicd from a .socket unit, with \
         systemd-socket-activate, or without this variable"
    )]
    NotANumber {
        /// Which variable.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// The most that makes sense.
        max: u32,
    },
    /// `LISTEN_FDS` and `LISTEN_FDNAMES` disagree.
    #[error(
        "socket activation: {sockets} sockets were handed over with {names} names: give each its own \
         FileDescriptorName= (with systemd-socket-activate: --fdname=NAME:NAME)"
    )]
    NamesDoNotMatch {
        /// Sockets.
        sockets: usize,
        /// Names.
        names: usize,
    },
    /// No `LISTEN_FDNAMES` at all.
    #[error(
        "socket activation: {sockets} sockets were handed over without names, so that nothing says which port is whose: \
         give each its own FileDescriptorName= (with systemd-socket-activate: --fdname=NAME:NAME), or pass a single \
         one as `--fd 3`"
    )]
    NoNames {
        /// Sockets.
        sockets: usize,
    },
}

impl Activated {
    /// Reads the environment of this process.
    pub fn from_environment() -> Result<Activated, ActivationError> {
        Activated::read(|name| std::env::var(name).ok(), std::process::id())
    }

    /// [`Activated::from_environment`] with the environment and the process id passed in.
    fn read(variable: impl Fn(&str) -> Option<String>, own_pid: u32) -> Result<Activated, ActivationError> {
        let number = |name: &'static str, max: u32| {
            let Some(value) = variable(name) else {
                return Ok(None);
            };
            match value.parse().ok().filter(|number| *number <= max) {
                Some(number) => Ok(Some(number)),
                None => Err(ActivationError::NotANumber {
                    variable: name,
                    value,
                    max,
                }),
            }
        };
        let (Some(pid), Some(count)) = (
            number("LISTEN_PID", u32::MAX)?,
            number("LISTEN_FDS", MAX_SOCKETS)?,
        ) else {
            return Ok(Activated::default());
        };
        if pid != own_pid {
            return Ok(Activated {
                sockets: Vec::new(),
                meant_for: Some(pid),
            });
        }
        let descriptors: Vec<RawFd> = (FIRST_FD..).take(usize::try_from(count).unwrap_or(0)).collect();
        if descriptors.is_empty() {
            return Ok(Activated::default());
        }
        let sockets = descriptors.len();
        let listed = variable("LISTEN_FDNAMES").ok_or(ActivationError::NoNames { sockets })?;
        let names: Vec<String> = listed.split(':').map(str::to_owned).collect();
        if names.len() != sockets {
            return Err(ActivationError::NamesDoNotMatch {
                sockets,
                names: names.len(),
            });
        }
        Ok(Activated {
            sockets: names.into_iter().zip(descriptors).collect(),
            meant_for: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Activated, ActivationError> {
        let find = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Activated::read(find, 42)
    }

    #[test]
    fn named_sockets_get_the_descriptors_from_3_on() {
        let two = read(&[
            ("LISTEN_PID", "42"),
            ("LISTEN_FDS", "2"),
            ("LISTEN_FDNAMES", "a:b"),
        ]);
        let sockets = vec![("a".to_owned(), 3), ("b".to_owned(), 4)];
        assert_eq!(two.unwrap().sockets, sockets);
    }

    #[test]
    fn without_variables_or_for_another_process_there_is_nothing() {
        assert_eq!(read(&[]).unwrap(), Activated::default());
        assert_eq!(read(&[("LISTEN_FDS", "1")]).unwrap(), Activated::default());
        let none = read(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "0")]);
        assert_eq!(none.unwrap(), Activated::default());
        let other = read(&[("LISTEN_PID", "41"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "a")]);
        assert_eq!(other.unwrap().meant_for, Some(41));
    }

    #[test]
    fn contradictions_are_told() {
        type Variables<'a> = &'a [(&'a str, &'a str)];
        let cases: &[(Variables, &[&str])] = &[
            (
                &[("LISTEN_PID", "x"), ("LISTEN_FDS", "1")],
                &["LISTEN_PID=x", "not a number"],
            ),
            (
                &[("LISTEN_PID", "42"), ("LISTEN_FDS", "-1")],
                &["LISTEN_FDS=-1", "0 to 1024"],
            ),
            (
                &[("LISTEN_PID", "42"), ("LISTEN_FDS", "4294967295")],
                &["LISTEN_FDS=4294967295", "0 to 1024"],
            ),
            (
                &[("LISTEN_PID", "42"), ("LISTEN_FDS", "2")],
                &["2 sockets", "without names", "FileDescriptorName=", "--fd 3"],
            ),
            (
                &[("LISTEN_PID", "42"), ("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "a")],
                &["2 sockets", "1 names", "FileDescriptorName="],
            ),
        ];
        for (variables, fragments) in cases {
            let message = read(variables).unwrap_err().to_string();
            for fragment in *fragments {
                assert!(
                    message.contains(fragment),
                    "`{fragment}` is missing in: {message}"
                );
            }
        }
    }
}
