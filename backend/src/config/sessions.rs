//! How long sessions are kept, and how many may come: `--timeouts` and `--limits`, or the file's `[timeouts]` and `[limits]`.

use std::collections::BTreeMap;

use serde::Deserialize;
use vnic_lb::limits::{SessionLimits, Timeouts};

use super::check::in_range;
use super::error::ConfigError;
use super::raw::Given;

/// Longest idle time: 24 days, beyond which the balancer's clock of milliseconds could be taken for one that is behind.
const MAX_TIMEOUT_S: u32 = 24 * 24 * 3600;
/// Highest cap: the most sessions that a table holds.
const MAX_LIMIT: u32 = 1 << 24;

/// Numbers that were written, by their keys.
pub(super) type Numbers = BTreeMap<&'static str, Given<i64>>;

/// The numbers of `above`, and those of `below` that it does not have.
pub(super) fn over(above: Numbers, mut below: Numbers) -> Numbers {
    below.extend(above);
    below
}

/// A table of the file whose keys set the fields of `$settings`, all of one range.
macro_rules! table {
    ($(#[$doc:meta])* $file:ident for $settings:ident { $($key:literal = $field:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $file { $(#[serde(rename = $key)] $field: Option<i64>,)+ }

        impl $file {
            /// Every key.
            pub const KEYS: &'static [&'static str] = &[$($key),+];

            /// What was written at a place that messages name.
            pub fn written_in(self, place: &str) -> Numbers {
                let all = [$(($key, self.$field)),+];
                let given = |value, key| Given::new(value, format!("`{key}` in {place}"));
                all.into_iter().filter_map(|(key, value)| Some((key, given(value?, key)))).collect()
            }

            fn field<'s>(settings: &'s mut $settings, key: &str) -> Option<&'s mut u32> {
                match key { $($key => Some(&mut settings.$field),)+ _ => None }
            }
        }
    };
}

table! {
    /// `[timeouts]`, in seconds.
    FileTimeouts for Timeouts {
        "tcp-syn-s" = tcp_syn_ms,
        "tcp-one-way-s" = tcp_one_way_ms,
        "tcp-established-s" = tcp_established_ms,
        "tcp-closing-s" = tcp_closing_ms,
        "tcp-reset-s" = tcp_reset_ms,
        "udp-one-way-s" = udp_one_way_ms,
        "udp-two-way-s" = udp_two_way_ms,
        "icmp-s" = icmp_ms,
        "fragment-s" = fragment_ms,
        "other-s" = other_ms,
    }
}

table! {
    /// `[limits]`.
    FileLimits for SessionLimits {
        "half-open" = half_open,
        "new-per-second" = new_per_second,
        "fragments" = fragments,
    }
}

/// The idle times, each its default unless it was written.
pub(super) fn timeouts(written: &Numbers) -> Result<Timeouts, ConfigError> {
    let mut timeouts = Timeouts::default();
    for (key, given) in written {
        let seconds = in_range(given.value, 1u32, MAX_TIMEOUT_S, &given.origin)?;
        if let Some(field) = FileTimeouts::field(&mut timeouts, key) {
            *field = seconds * 1000;
        }
    }
    Ok(timeouts)
}

/// The caps, each its default unless it was written.
pub(super) fn limits(written: &Numbers) -> Result<SessionLimits, ConfigError> {
    let mut limits = SessionLimits::default();
    for (key, given) in written {
        let most = in_range(given.value, 0u32, MAX_LIMIT, &given.origin)?;
        if let Some(field) = FileLimits::field(&mut limits, key) {
            *field = most;
        }
    }
    Ok(limits)
}
