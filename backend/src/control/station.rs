//! A station as an operator writes it: `mac 52:54:00:12:34:56`, with ` vlan 100` behind it if its frames are tagged.

use vnic_lb::pinned::Station;

/// A text names no station.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0:.80}` names no station, and in topology pinned a guest's address decides instead of its sessions: write for \
     example `mac 52:54:00:12:34:56`, with ` vlan 100` behind it if its frames are tagged, or copy one from `vnic status`"
)]
pub struct StationError(String);

/// Reads a station.
///
/// # Errors
///
/// [`StationError`].
pub fn parse(text: &str) -> Result<Station, StationError> {
    let fail = || StationError(text.to_owned());
    let words: Vec<&str> = text.split_whitespace().collect();
    let (mac, vlan) = match *words {
        ["mac", mac] => (mac, None),
        ["mac", mac, "vlan", vlan] => (mac, Some(vlan)),
        _ => return Err(fail()),
    };
    let id = |text: &str| text.parse().ok().filter(|id| (1..=4094).contains(id));
    Ok(Station {
        mac: mac.parse().map_err(|_| fail())?,
        vlan: vlan.map_or(Some(0), id).ok_or_else(fail)?,
    })
}

/// Writes a station as [`parse`] reads it.
#[must_use]
pub fn text(station: Station) -> String {
    match station.vlan {
        0 => format!("mac {}", station.mac),
        vlan => format!("mac {} vlan {vlan}", station.mac),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for written in ["mac 52:54:00:00:00:01", "mac 52:54:00:00:00:01 vlan 4094"] {
            assert_eq!(parse(written).map(text).as_deref(), Ok(written));
        }
        for wrong in [
            "",
            "mac",
            "tcp 10.0.0.1:80 10.0.0.2:40000",
            "mac 52:54:00:00:00",
            "mac 52:54:00:00:00:01 vlan 0",
            "mac 52:54:00:00:00:01 vlan 4095",
            "mac 52:54:00:00:00:01 vlan",
            "52:54:00:00:00:01",
        ] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("`mac 52:54:00:12:34:56`"), "{error}");
        }
    }
}
