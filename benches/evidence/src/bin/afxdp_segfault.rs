//! ADR 0004: `afxdp` 0.4.0 lets safe code touch memory that it has unmapped. Build with `--features afxdp`.
#![forbid(unsafe_code)]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use afxdp::buf::Buf;
use afxdp::buf_mmap::BufMmap;
use afxdp::mmap_area::{MmapArea, MmapAreaOptions};
use vnic_evidence::Claims;

/// The program: buffers outlive the area that they lie in. It compiles, and it has no `unsafe`.
fn write_to_a_buffer_of_a_dropped_area() {
    let (area, mut buffers): (_, Vec<BufMmap<()>>) =
        MmapArea::new(4, 4096, MmapAreaOptions::default()).expect("16 KiB");
    drop(area);
    buffers[0].get_data_mut()[0] = 1;
}

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some() {
        write_to_a_buffer_of_a_dropped_area();
        return ExitCode::SUCCESS;
    }
    let mut claims = Claims::default();
    let this = std::env::current_exe().expect("the path of this program");
    match Command::new(this).arg("child").status() {
        Ok(status) => claims.check("safe code segfaults", status.signal() == Some(11), status),
        Err(error) => claims.check("safe code segfaults", false, error),
    }
    claims.exit()
}
