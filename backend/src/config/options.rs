//! The `key=value,...` lists of `--port`, `--nic`, `--timeouts` and `--limits`.

use super::error::ConfigError;
use super::raw::{Given, RawNic, RawPort};
use super::sessions::Numbers;

const PORT_KEYS: &[&str] = &["name", "socket", "mac", "queues", "vlan", "trunk"];
const NIC_KEYS: &[&str] = &[
    "id",
    "queues",
    "zerocopy",
    "attach",
    "weight",
    "set-channels",
    "probe",
];

/// `name=a,socket=PATH[,mac=MAC][,queues=N][,vlan=ID|,trunk=LIST]`
pub(super) fn port(text: &str) -> Result<RawPort, ConfigError> {
    let origin = format!("`--port {text}`");
    let mut pairs = Pairs::new(text.split(','), &origin, PORT_KEYS)?;
    let port = RawPort {
        name: pairs.take("name"),
        socket: pairs.take("socket").map(Into::into),
        fd: None,
        mac: pairs.take("mac"),
        queues: pairs.take_number("queues")?,
        vlan: pairs.take_number("vlan")?,
        trunk: pairs.take("trunk"),
        origin: origin.clone(),
    };
    Ok(port)
}

/// `IF[,id=ID][,queues=N][,set-channels=on|off][,zerocopy=MODE][,attach=MODE][,weight=W][,probe=TARGET]`
pub(super) fn nic(text: &str) -> Result<RawNic, ConfigError> {
    let origin = format!("`--nic {text}`");
    let mut items = text.split(',');
    let ifname = items.next().unwrap_or_default();
    if ifname.is_empty() || ifname.contains('=') {
        return Err(ConfigError::NicWithoutName { origin });
    }
    let mut pairs = Pairs::new(items, &origin, NIC_KEYS)?;
    let nic = RawNic {
        ifname: Some(ifname.to_owned()),
        id: pairs.take("id"),
        queues: pairs.take_number("queues")?,
        zerocopy: pairs.take("zerocopy"),
        attach: pairs.take("attach"),
        weight: pairs.take_number("weight")?,
        set_channels: pairs.take("set-channels"),
        probe: pairs.take("probe"),
        origin: origin.clone(),
    };
    Ok(nic)
}

/// `KEY=N,...` of an option whose values are all numbers.
pub(super) fn numbers(
    option: &str,
    text: &str,
    keys: &'static [&'static str],
) -> Result<Numbers, ConfigError> {
    let origin = format!("`{option} {text}`");
    let mut pairs = Pairs::new(text.split(','), &origin, keys)?;
    let mut numbers = Numbers::new();
    for key in keys {
        if let Some(value) = pairs.take_number(key)? {
            numbers.insert(*key, Given::new(value, format!("`{key}` in {origin}")));
        }
    }
    Ok(numbers)
}

struct Pairs<'a> {
    found: Vec<(&'a str, &'a str)>,
    origin: &'a str,
}

impl<'a> Pairs<'a> {
    fn new(
        items: impl Iterator<Item = &'a str>,
        origin: &'a str,
        allowed: &'static [&'static str],
    ) -> Result<Pairs<'a>, ConfigError> {
        let mut found: Vec<(&str, &str)> = Vec::new();
        for item in items {
            let Some((key, value)) = item.split_once('=').filter(|(_, value)| !value.is_empty()) else {
                return Err(ConfigError::NotKeyValue {
                    origin: origin.to_owned(),
                    item: item.to_owned(),
                    allowed: allowed.join(", "),
                });
            };
            if !allowed.contains(&key) {
                return Err(ConfigError::UnknownKey {
                    origin: origin.to_owned(),
                    key: key.to_owned(),
                    allowed: allowed.join(", "),
                });
            }
            if found.iter().any(|(earlier, _)| *earlier == key) {
                return Err(ConfigError::RepeatedKey {
                    origin: origin.to_owned(),
                    key: key.to_owned(),
                });
            }
            found.push((key, value));
        }
        Ok(Pairs { found, origin })
    }

    fn take(&mut self, key: &str) -> Option<String> {
        self.found
            .iter()
            .find(|(found, _)| *found == key)
            .map(|(_, value)| (*value).to_owned())
    }

    fn take_number(&mut self, key: &str) -> Result<Option<i64>, ConfigError> {
        self.take(key)
            .map(|value| {
                value.parse().map_err(|_| ConfigError::NotANumber {
                    what: format!("`{key}` in {}", self.origin),
                    value,
                })
            })
            .transpose()
    }
}
