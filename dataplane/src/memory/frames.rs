//! TESTONLY stand-in for frame memory.
#![allow(missing_docs, clippy::unwrap_used)]

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub const CHUNK_SIZE: usize = 4096;
pub const MAX_SEGMENTS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    Free,
    Held,
    Fill(u8),
    Tx(u8),
    Quarantined(u8),
}

#[derive(Debug)]
#[must_use = "a frame that is not sent or freed leaks its chunks"]
pub struct Frame {
    data: Vec<u8>,
}

pub struct FrameMemory {
    free: AtomicU32,
    total: u32,
    _lock: Mutex<()>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of frame memory: {source}")]
pub struct FrameMemoryError {
    bytes: usize,
    source: std::io::Error,
}

impl Frame {
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len()
    }
}

impl FrameMemory {
    pub fn new(chunks: u32) -> Result<Arc<FrameMemory>, FrameMemoryError> {
        Ok(Arc::new(FrameMemory {
            free: AtomicU32::new(chunks),
            total: chunks,
            _lock: Mutex::new(()),
        }))
    }

    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }

    #[must_use]
    pub fn head<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        &frame.data[..frame.data.len().min(CHUNK_SIZE)]
    }

    pub fn segments<'a>(&'a self, frame: &'a Frame) -> impl Iterator<Item = &'a [u8]> {
        frame.data.chunks(CHUNK_SIZE)
    }

    pub fn write(&self, frame: &mut Frame, offset: usize, bytes: &[u8]) {
        frame.data[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    #[must_use]
    pub fn census(&self) -> Census {
        let free = self.free.load(Ordering::Relaxed);
        Census {
            free,
            held: self.total - free,
            ..Census::default()
        }
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    pub free: u32,
    pub held: u32,
    pub fill: u32,
    pub tx: u32,
    pub quarantined: u32,
}

pub struct ChunkCache {
    memory: Arc<FrameMemory>,
}

impl ChunkCache {
    #[must_use]
    pub fn new(memory: Arc<FrameMemory>) -> ChunkCache {
        ChunkCache { memory }
    }

    #[must_use]
    pub fn memory(&self) -> &Arc<FrameMemory> {
        &self.memory
    }

    pub fn alloc(&mut self, len: usize) -> Option<Frame> {
        let need = u32::try_from(len.div_ceil(CHUNK_SIZE).max(1)).ok()?;
        if need > 4 || self.memory.free.load(Ordering::Relaxed) < need {
            return None;
        }
        self.memory.free.fetch_sub(need, Ordering::Relaxed);
        Some(Frame {
            data: vec![0xee; len],
        })
    }

    pub fn free(&mut self, frame: Frame) {
        let need = u32::try_from(frame.data.len().div_ceil(CHUNK_SIZE).max(1)).unwrap();
        self.memory.free.fetch_add(need, Ordering::Relaxed);
    }
}
