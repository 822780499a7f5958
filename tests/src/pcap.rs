//! Frames in capture files (the classic pcap format), for programs that read and write those.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// The first word of a file with microsecond stamps, in the byte order of its writer.
const MAGIC: u32 = 0xa1b2_c3d4;
/// The same of a file with nanosecond stamps.
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// Bytes before the first frame.
const FILE_HEADER: usize = 24;
/// Bytes before each frame.
const FRAME_HEADER: usize = 16;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;

/// Writes a file of these frames.
///
/// # Errors
/// Those of the file system.
pub fn write<'a>(path: &Path, frames: impl IntoIterator<Item = &'a Vec<u8>>) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    // Version 2.4, no time zone, no accuracy, frames of any length.
    let header = [MAGIC, 2 | (4 << 16), 0, 0, 65535, ETHERNET];
    header
        .iter()
        .try_for_each(|word| file.write_all(&word.to_le_bytes()))?;
    for frame in frames {
        let length = u32::try_from(frame.len())?;
        for word in [0, 0, length, length] {
            file.write_all(&word.to_le_bytes())?;
        }
        file.write_all(frame)?;
    }
    Ok(file.flush()?)
}

/// Reads all frames of a file that this machine's byte order was used for.
///
/// # Errors
/// If it is no such file, or ends within a frame.
pub fn read(path: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&bytes).with_context(|| format!("reading {}", path.display()))
}

fn parse(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let Some((header, mut rest)) = bytes.split_first_chunk::<FILE_HEADER>() else {
        bail!("{} bytes are no pcap file", bytes.len());
    };
    let known = word(header, 0).is_some_and(|magic| [MAGIC, MAGIC_NANOSECONDS].contains(&magic));
    ensure!(known, "not a pcap file of this byte order");
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let number = frames.len();
        let kept = word(rest, 8).with_context(|| format!("the header of frame {number} is cut off"))?;
        let end = FRAME_HEADER + usize::try_from(kept)?;
        let frame = rest
            .get(FRAME_HEADER..end)
            .with_context(|| format!("frame {number} is cut off"))?;
        ensure!(
            word(rest, 12) == Some(kept),
            "only {kept} bytes of frame {number} were kept"
        );
        frames.push(frame.to_vec());
        rest = &rest[end..];
    }
    Ok(frames)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("frames.pcap");
        let frames: Vec<Vec<u8>> = (0..5u8).map(|byte| vec![byte; 60 + usize::from(byte)]).collect();
        write(&path, &frames)?;
        assert_eq!(read(&path)?, frames);
        Ok(())
    }

    #[test]
    fn a_file_cut_off_is_an_error() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("frames.pcap");
        write(&path, &[vec![1; 60]])?;
        let whole = fs::read(&path)?;
        assert!(parse(&whole[..whole.len() - 1]).is_err());
        assert!(parse(&whole[..FILE_HEADER + 3]).is_err());
        assert!(parse(&whole[..3]).is_err());
        Ok(())
    }
}
