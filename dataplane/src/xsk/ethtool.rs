//! What ethtool(8) asks of an interface: its driver, and its features (offloads), through the SIOCETHTOOL ioctl.

use std::ffi::CString;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
/// Commands of linux/ethtool.h.
const GDRVINFO: u32 = 0x03;
const GSTRINGS: u32 = 0x1b;
const GSSET_INFO: u32 = 0x37;
const GFEATURES: u32 = 0x3a;
const SFEATURES: u32 = 0x3b;
/// The string set of features' names.
const SS_FEATURES: u32 = 4;
/// Bytes of each name (ETH_GSTRING_LEN).
const NAME_LEN: usize = 32;
/// More than the kernel has (64): what it says beyond is not believed.
const MAX_FEATURES: usize = 1024;
/// `struct ethtool_drvinfo`: the command, five texts of 32 bytes, 12 reserved bytes, five numbers.
const DRVINFO_WORDS: usize = (4 + 5 * 32 + 12 + 5 * 4) / 4;

/// An interface of the network namespace in which this was opened.
pub struct Ethtool {
    socket: OwnedFd,
    request: libc::ifreq,
}

// SAFETY: what keeps `ifreq` from being Send is a pointer that it may hold. This one holds none (zeros, and a name): `ask` puts one into
// a copy of its own.
unsafe impl Send for Ethtool {}

/// A feature of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Whether it is on.
    pub active: bool,
    /// Whether it can be changed; `[fixed]` in the words of ethtool(8) if not.
    pub changeable: bool,
}

impl Ethtool {
    /// Opens an interface by name; that it exists shows with the first question.
    ///
    /// # Errors
    ///
    /// A name that is none, or those of socket(2).
    pub fn open(ifname: &str) -> io::Result<Ethtool> {
        let name = CString::new(ifname)?;
        // SAFETY: ifreq is plain data for which all zeroes is valid.
        let mut request: libc::ifreq = unsafe { zeroed() };
        if name.as_bytes_with_nul().len() > request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        // SAFETY: no memory is involved; the result is checked and owned at once.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Ethtool { socket, request })
    }

    /// The driver's name; virtual interfaces have one, too (`veth`, `tun`).
    ///
    /// # Errors
    ///
    /// ENODEV without such an interface; EOPNOTSUPP.
    pub fn driver(&self) -> io::Result<String> {
        let mut info = [0u32; DRVINFO_WORDS];
        info[0] = GDRVINFO;
        // SAFETY: the kernel writes one ethtool_drvinfo, which is as long as `info`.
        unsafe { self.ask(&mut info) }?;
        Ok(text(&info[1..1 + NAME_LEN / 4]))
    }

    /// A feature by the name that `ethtool -k` derives its own from, such as `rx-vlan-hw-parse`; `None` if this kernel has none of
    /// that name.
    ///
    /// # Errors
    ///
    /// ENODEV without such an interface.
    pub fn feature(&self, name: &str) -> io::Result<Option<Feature>> {
        let names = self.feature_names()?;
        let Some(bit) = names.iter().position(|known| known == name) else {
            return Ok(None);
        };
        let blocks = names.len().div_ceil(32);
        // struct ethtool_gfeatures: command, blocks; per block: available, requested, active, never changed.
        let mut answer = vec![0u32; 2 + 4 * blocks];
        answer[0] = GFEATURES;
        answer[1] = u32::try_from(blocks).map_err(io::Error::other)?;
        // SAFETY: the kernel writes no more blocks than the second word says, and the vector holds these.
        unsafe { self.ask(&mut answer) }?;
        let block = &answer[2 + bit / 32 * 4..][..4];
        let is_in = |word: u32| word >> (bit % 32) & 1 == 1;
        Ok(Some(Feature {
            active: is_in(block[2]),
            changeable: is_in(block[0]) && !is_in(block[3]),
        }))
    }

    /// Switches a feature.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_NET_ADMIN; EOPNOTSUPP if it is fixed or unknown, or if the driver left it as it was.
    pub fn set_feature(&self, name: &str, on: bool) -> io::Result<()> {
        let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let names = self.feature_names()?;
        let bit = names
            .iter()
            .position(|known| known == name)
            .ok_or_else(unsupported)?;
        let blocks = names.len().div_ceil(32);
        // struct ethtool_sfeatures: command, blocks; per block: valid, requested.
        let mut order = vec![0u32; 2 + 2 * blocks];
        order[0] = SFEATURES;
        order[1] = u32::try_from(blocks).map_err(io::Error::other)?;
        order[2 + bit / 32 * 2] = 1 << (bit % 32);
        order[3 + bit / 32 * 2] = u32::from(on) << (bit % 32);
        // SAFETY: the kernel reads as many blocks as the second word says, and the vector holds these.
        unsafe { self.ask(&mut order) }?;
        match self.feature(name)? {
            Some(feature) if feature.active == on => Ok(()),
            _ => Err(unsupported()),
        }
    }

    fn feature_names(&self) -> io::Result<Vec<String>> {
        // struct ethtool_sset_info: command, reserved, a mask of 64 bits, the length of the one set that is asked for.
        let mask = (1u64 << SS_FEATURES).to_ne_bytes();
        let [low, high] = [&mask[..4], &mask[4..]].map(|half| {
            let mut word = [0; 4];
            word.copy_from_slice(half);
            u32::from_ne_bytes(word)
        });
        let mut info = [GSSET_INFO, 0, low, high, 0];
        // SAFETY: the kernel writes one length for each bit of the mask, which has one.
        unsafe { self.ask(&mut info) }?;
        let count = info[4] as usize;
        if count == 0 || count > MAX_FEATURES {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // struct ethtool_gstrings: command, set, count, then the names.
        let mut strings = vec![0u32; 3 + count * NAME_LEN / 4];
        strings[0] = GSTRINGS;
        strings[1] = SS_FEATURES;
        strings[2] = info[4];
        // SAFETY: the kernel writes the names of all its features, whose number is a constant of the running kernel that it has
        // just told; the vector holds as many.
        unsafe { self.ask(&mut strings) }?;
        Ok(strings[3..].chunks(NAME_LEN / 4).map(text).collect())
    }

    /// # Safety
    ///
    /// `data` must be as long as what the kernel reads and writes for the command in its first word.
    unsafe fn ask(&self, data: &mut [u32]) -> io::Result<()> {
        let mut request = self.request;
        request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        // SAFETY: `request` names an interface with an ending zero (`open` left room for it) and points to `data`, which is live and
        // borrowed mutably, and long enough as the caller promises.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// A text of the C interface, up to its ending zero.
fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
