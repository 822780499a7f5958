//! Why a NIC became alive or dead.

use std::fmt;

use crate::Millis;

/// Why a NIC became alive or dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It has a carrier, for long enough, and whatever else it needs.
    Fit,
    /// No NIC was alive, and this is the best that has a carrier.
    LastResort,
    /// Its carrier has not been told yet.
    Unknown,
    /// The interface is administratively down or gone.
    LinkDown,
    /// The carrier is lost.
    CarrierLost,
    /// The carrier was lost and came back before anybody looked.
    CarrierBlinked,
    /// The carrier has not lasted long enough.
    Updelay,
    /// The NIC has failed too often lately.
    Flapping,
    /// No probe has been answered yet.
    NotProbed,
    /// Probes are not answered.
    ProbesLost {
        /// How many in a row.
        count: u32,
    },
    /// Frames are not sent.
    TxStalled {
        /// For how many milliseconds.
        for_ms: Millis,
    },
    /// Kicks fail.
    KickFailed {
        /// The last error number.
        errno: i32,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Fit => out.write_str("the carrier is up and nothing is against it"),
            Cause::LastResort => out.write_str("the carrier is up and no other NIC is alive"),
            Cause::Unknown => out.write_str("its carrier is not known yet"),
            Cause::LinkDown => out.write_str("the interface is down or gone"),
            Cause::CarrierLost => out.write_str("the carrier is lost"),
            Cause::CarrierBlinked => out.write_str("the carrier was lost for a moment"),
            Cause::Updelay => out.write_str("the carrier has not lasted long enough"),
            Cause::Flapping => out.write_str("it has failed too often lately"),
            Cause::NotProbed => out.write_str("no probe has been answered yet"),
            Cause::ProbesLost { count } => write!(out, "{count} probes in a row were not answered"),
            Cause::TxStalled { for_ms } => write!(out, "no frame was sent for {for_ms} ms"),
            Cause::KickFailed { errno } => write!(out, "the kernel refuses to send: error {errno}"),
        }
    }
}
