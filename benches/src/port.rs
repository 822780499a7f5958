//! A guest without a machine: memory, a queue pair, frames to send, and room for what comes.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use vm_memory::{Bytes as _, GuestAddress, MmapRegion, VolatileMemory as _};
use vnic_tests::frontend::{
    IN_ORDER, Link, MRG_RXBUF, Pages, RING_PACKED, RingEvents, RingPlace, SharedMemory,
};

use crate::driver::{Buffers, DriverRing, place};
use crate::frames::{SEQUENCE, Traffic};

/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER: u32 = 12;
/// Bytes of a cache line.
const LINE: u64 = 64;
/// A buffer's frame begins at a line, with the header before it, as DPDK's driver has it.
const HEADER_OFFSET: u64 = LINE - HEADER as u64;

/// How a port's memory and rings are.
#[derive(Debug, Clone)]
pub struct PortPlan {
    /// Packed rings instead of split ones.
    pub packed: bool,
    /// Negotiates VIRTIO_F_IN_ORDER if the device offers it; for split rings.
    pub in_order: bool,
    /// Descriptors of each ring.
    pub queue_size: u16,
    /// What it sends.
    pub sends: Traffic,
    /// Bytes of the longest frame that it can receive.
    pub receives: u32,
    /// Bytes from one frame in memory to the next; `None`: as far apart as a guest's are.
    pub stride: Option<u32>,
    /// Asks for huge pages.
    pub pages: Pages,
}

/// Where everything is in a port's memory.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Receiving and sending ring.
    pub rings: [RingPlace; 2],
    /// Their buffers.
    pub buffers: [Buffers; 2],
    /// Bytes in all.
    pub bytes: u64,
}

/// Buffers of a guest are not close together: DPDK's are 2304 bytes apart for frames of 1514.
fn spacing(frame: u32) -> u64 {
    (LINE + u64::from(frame)).next_multiple_of(256).max(2048) + 256
}

impl PortPlan {
    /// Lays the memory out.
    ///
    /// # Errors
    /// If frames would overlap.
    pub fn layout(&self) -> Result<Layout> {
        let needed = (LINE + u64::from(self.sends.longest())).next_multiple_of(LINE);
        let stride = self.stride.map_or(spacing(self.sends.longest()), u64::from);
        ensure!(
            stride >= needed && stride.is_multiple_of(LINE),
            "frames of {} bytes need a stride of at least {needed}, a multiple of {LINE}; it is {stride}",
            self.sends.longest()
        );
        // Address 0 is no one's.
        let (receive, end) = place(4096, self.queue_size);
        let (send, end) = place(end, self.queue_size);
        let first_in = end.next_multiple_of(4096) + HEADER_OFFSET;
        let stride_in = spacing(self.receives);
        let first_out =
            (first_in + stride_in * u64::from(self.queue_size)).next_multiple_of(4096) + HEADER_OFFSET;
        let incoming = Buffers {
            first: first_in,
            stride: stride_in,
            count: u32::from(self.queue_size),
            // The whole room of a guest's buffer.
            lengths: vec![u32::try_from(stride_in - 256)?],
            writable: true,
        };
        let outgoing = Buffers {
            first: first_out,
            stride,
            count: self.sends.frames,
            lengths: self.sends.sizes.iter().map(|size| size + HEADER).collect(),
            writable: false,
        };
        let bytes = (first_out + stride * u64::from(self.sends.frames)).next_multiple_of(4096);
        Ok(Layout {
            rings: [receive, send],
            buffers: [incoming, outgoing],
            bytes,
        })
    }

    /// Takes memory and writes all frames into it.
    ///
    /// # Errors
    /// If there is not as much.
    pub fn memory(&self, layout: &Layout) -> Result<SharedMemory> {
        let memory = SharedMemory::new(layout.bytes, self.pages)?;
        for number in 0..self.sends.frames {
            let address = layout.buffers[1].address(number) + u64::from(HEADER);
            let frame = self.sends.frame(number);
            memory.guest().write_slice(&frame, GuestAddress(address))?;
        }
        Ok(memory)
    }

    /// The feature that its rings need.
    #[must_use]
    pub fn needed_features(&self) -> u64 {
        if self.packed { RING_PACKED } else { 0 }
    }
}

/// A port whose rings are laid out, with all its room for frames offered.
pub struct Port<'m, R> {
    /// The ring that receives.
    pub rx: R,
    /// The ring that sends.
    pub tx: R,
    region: &'m MmapRegion,
    buffers: [Buffers; 2],
    /// Of both rings, once a device serves them.
    events: Option<[RingEvents; 2]>,
    /// Notifications that the device asked for.
    pub kicks: u64,
}

impl<'m, R: DriverRing<'m>> Port<'m, R> {
    /// Lays the rings out.
    #[must_use]
    pub fn new(layout: &Layout, memory: &'m SharedMemory) -> Port<'m, R> {
        let region = memory.region();
        let [incoming, outgoing] = layout.buffers.clone();
        let mut port = Port {
            rx: R::new(region, &layout.rings[0], incoming),
            tx: R::new(region, &layout.rings[1], outgoing),
            region,
            buffers: layout.buffers.clone(),
            events: None,
            kicks: 0,
        };
        port.rx.offer(port.rx.size());
        port
    }

    /// Has the device behind a socket serve them; it stops when the link is dropped.
    ///
    /// # Errors
    /// The socket's, or what the device refuses.
    pub fn connect(
        &mut self,
        socket: &Path,
        plan: &PortPlan,
        layout: &Layout,
        memory: &SharedMemory,
    ) -> Result<Link> {
        let liked = MRG_RXBUF | if plan.in_order { IN_ORDER } else { 0 };
        let mut link = Link::connect(socket, 1, plan.needed_features(), liked)
            .with_context(|| format!("the device at {}", socket.display()))?;
        link.share(memory)?;
        let receive = link.start(memory, 0, &layout.rings[0])?;
        let send = link.start(memory, 1, &layout.rings[1])?;
        link.enable(1)?;
        self.events = Some([receive, send]);
        Ok(link)
    }

    /// Offers frames to send.
    ///
    /// # Errors
    /// If the device cannot be notified.
    #[inline]
    pub fn send(&mut self, count: u16) -> Result<()> {
        self.tx.offer(count);
        self.kick(1)
    }

    /// Offers room for frames again.
    ///
    /// # Errors
    /// If the device cannot be notified.
    #[inline]
    pub fn repost(&mut self, count: u16) -> Result<()> {
        self.rx.offer(count);
        self.kick(0)
    }

    #[inline]
    fn kick(&mut self, ring: usize) -> Result<()> {
        let wanted = if ring == 0 {
            self.rx.wants_kick()
        } else {
            self.tx.wants_kick()
        };
        if wanted && let Some(events) = &self.events {
            self.kicks += 1;
            events[ring].kick.write(1).context("notifying the device")?;
        }
        Ok(())
    }

    /// Sets the sequence number of a frame that the device does not have.
    ///
    /// # Panics
    /// If there is no such frame.
    pub fn set_sequence(&self, number: u32, sequence: u32) {
        let at = self.buffers[1].address(number) + u64::from(HEADER);
        let at = usize::try_from(at).expect("an address in memory") + SEQUENCE;
        self.region
            .as_volatile_slice()
            .write_obj(sequence.to_be(), at)
            .expect("a frame in memory");
    }

    /// Reads the frame that has come back at a place of the receiving ring.
    ///
    /// # Errors
    /// If the device says that it wrote what no device can have written.
    pub fn read(&self, position: u16, frame: &mut Vec<u8>) -> Result<()> {
        let incoming = &self.buffers[0];
        let (number, written) = (u32::from(position), self.rx.written(position));
        ensure!(
            (HEADER..=incoming.length(number)).contains(&written),
            "the device says that it wrote {written} bytes into a buffer of {}",
            incoming.length(number)
        );
        let mut bytes = [0; HEADER as usize];
        let at = usize::try_from(incoming.address(number))?;
        let memory = self.region.as_volatile_slice();
        memory.read_slice(&mut bytes, at)?;
        ensure!(
            bytes[10..] == [1, 0],
            "a header says that the frame is in {:?} buffers; it is in one",
            &bytes[10..]
        );
        frame.resize((written - HEADER) as usize, 0);
        memory.read_slice(frame, at + HEADER as usize)?;
        Ok(())
    }
}
