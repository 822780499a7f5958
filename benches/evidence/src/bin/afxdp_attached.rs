//! ADR 0004: what a NIC looks like after an `afxdp` 0.4.0 socket was made on it and dropped, and what the crate says
//! of an error. Needs root; works in a network namespace of its own. Build with `--features afxdp`.

use std::process::ExitCode;
use std::sync::Arc;

use afxdp::buf_mmap::BufMmap;
use afxdp::mmap_area::{MmapArea, MmapAreaOptions};
use afxdp::socket::{Socket, SocketOptions};
use afxdp::umem::Umem;
use vnic_evidence::{Claims, ip, ip_output, private_netns};

/// A socket on queue 0 of `nic`, made and dropped; the crate's error if it has one.
fn socket(nic: &str) -> Result<(), String> {
    let (area, _buffers): (Arc<MmapArea<()>>, Vec<BufMmap<()>>) =
        MmapArea::new(1024, 4096, MmapAreaOptions::default()).map_err(|error| format!("area: {error:?}"))?;
    let (umem, _completion, _fill) = Umem::new(area, 512, 512).map_err(|error| format!("UMEM: {error}"))?;
    let options = SocketOptions {
        copy_mode: true,
        ..Default::default()
    };
    Socket::new(umem, nic, 0, 512, 512, options)
        .map(drop)
        .map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    let set_up = private_netns()
        .and_then(|()| ip("link add ev0 type veth peer name ev1"))
        .and_then(|()| ip("link set ev0 up"))
        .and_then(|()| ip("link set ev1 up"));
    if let Err(error) = set_up {
        claims.check("a pair of veth NICs can be made (run as root)", false, error);
        return claims.exit();
    }
    let attached =
        |nic: &str| ip_output(&format!("link show {nic}")).is_ok_and(|text| text.contains("prog/xdp"));
    let before = attached("ev0");
    let made = socket("ev0");
    let after = attached("ev0");
    claims.check(
        "the XDP program stays on the NIC when every object of the crate is dropped",
        made.is_ok() && !before && after,
        format!("socket {made:?}; program before: {before}, after: {after}"),
    );
    let error = socket("nosuchnic").err().unwrap_or_default();
    claims.check(
        "errors are negative numbers that name nothing",
        error.contains("os error -"),
        error,
    );
    claims.exit()
}
