//! What the messages mean: the state of one port as its front-end sees it.

use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vnic_dataplane::memory::guest::{GuestMemory, GuestMemoryError, RegionSpec};
use vnic_dataplane::virtq::RingSpec;
use vnic_lb::mac::Mac;

use super::fault::{Fault, Refusal};
use super::features::{self, MAX_MEM_SLOTS};
use super::message::{Code, Message, Reply, Request};
use super::regions::{RegionTable, SharedRegion};
use super::vring::{self, Format, RingView, Vring};
use crate::config::MAX_QUEUE_PAIRS;

/// What GET_QUEUE_NUM counts. Front-ends disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueNum {
    /// Queue pairs, as QEMU takes it.
    Pairs,
    /// Single rings, as Cloud Hypervisor takes it. The default because it serves both: QEMU compares the number with the
    /// queue pairs that its user asked for and sees room to spare; should they exceed what the port has, the first
    /// message for a ring too many says so.
    #[default]
    Rings,
}

/// What is fixed for the life of a port.
#[derive(Debug, Clone, Copy)]
pub struct DeviceConfig {
    /// Queue pairs that the front-end may use, 1 to [`MAX_QUEUE_PAIRS`]; brought into this range if it is not.
    pub max_queue_pairs: u16,
    /// How to answer GET_QUEUE_NUM.
    pub queue_num_as: QueueNum,
}

/// Maps guest memory; a seam, so that the protocol can be tested without mapping any.
pub trait MapMemory {
    /// The mapped memory.
    type Memory;

    /// Maps a whole table, never an empty one.
    fn map(&self, regions: &[RegionSpec]) -> Result<Arc<Self::Memory>, GuestMemoryError>;

    /// Maps one region beside those that are mapped.
    fn add(&self, memory: &Self::Memory, region: &RegionSpec) -> Result<Arc<Self::Memory>, GuestMemoryError>;

    /// Leaves a region out; the others stay mapped as they are.
    fn remove(&self, memory: &Self::Memory, guest_addr: u64, user_addr: u64, size: u64) -> Arc<Self::Memory>;
}

/// Maps for real.
#[derive(Debug, Clone, Copy, Default)]
pub struct MapGuestMemory;

impl MapMemory for MapGuestMemory {
    type Memory = GuestMemory;

    fn map(&self, regions: &[RegionSpec]) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        GuestMemory::new(regions)
    }

    fn add(&self, memory: &GuestMemory, region: &RegionSpec) -> Result<Arc<GuestMemory>, GuestMemoryError> {
        memory.with_region(region)
    }

    fn remove(&self, memory: &GuestMemory, guest_addr: u64, user_addr: u64, size: u64) -> Arc<GuestMemory> {
        memory.without_region(guest_addr, user_addr, size)
    }
}

/// What a message came to.
#[derive(Debug)]
#[must_use = "a reply or a quiesce is waited for"]
pub enum Step {
    /// Handled.
    Done {
        /// To be sent.
        reply: Option<Reply>,
        /// What workers should run may differ now: look at [`Device::rings`] again. Always set after a quiesce, whose
        /// stopped rings are to be started again.
        changed: bool,
        /// It was refused, as the reply says, and changed nothing: worth a line in the log, within the port's budget.
        refused: Option<Fault>,
    },
    /// It changes something that running rings use. Stop this port's rings, hand their positions back with
    /// [`Device::set_base`], then call [`Device::complete`]. Handle no other message before.
    Quiesce(Pending),
    /// The guest is to be announced (SEND_RARP), if it is this port's: a device knows rings, and not who the guest is.
    Announce {
        /// Under this address.
        mac: Mac,
        /// The request, if the front-end waits to hear whether it was taken.
        acknowledge: Option<Code>,
    },
}

/// A checked request that waits for the port's rings to stand still. Dropping it forgets the request and closes its fds;
/// then the connection is to be ended too.
#[derive(Debug)]
#[must_use = "the front-end waits for it"]
pub struct Pending {
    message: Message,
    quiesced: bool,
}

impl Pending {
    /// The request, for logs.
    #[must_use]
    pub fn code(&self) -> Code {
        self.message.code
    }
}

/// One port, as its front-end sets it up.
pub struct Device<M: MapMemory = MapGuestMemory> {
    config: DeviceConfig,
    mapper: M,
    /// `None` until SET_FEATURES.
    features: Option<u64>,
    protocol: VhostUserProtocolFeatures,
    table: RegionTable,
    memory: Option<Arc<M::Memory>>,
    vrings: Vec<Vring>,
}

impl Device {
    /// A port that no front-end has touched.
    #[must_use]
    pub fn new(config: DeviceConfig) -> Device {
        Device::with_mapper(config, MapGuestMemory)
    }

    /// The guest address of a region whose file was found cut short: the front-end is to go, see [`GuestMemory::lost`].
    #[must_use]
    pub fn lost_memory(&self) -> Option<u64> {
        self.memory.as_ref()?.lost()
    }

    /// What is needed to run a ring; `None` while it is not runnable or does not exist.
    #[must_use]
    pub fn ring_spec(&self, ring: usize) -> Option<RingSpec> {
        let vring = self.vrings.get(ring).filter(|vring| vring.ready())?;
        let memory = Arc::clone(self.memory.as_ref()?);
        let addrs = vring.addrs?;
        let has = |feature| self.features() & feature != 0;
        Some(RingSpec {
            packed: self.format() == Format::Packed,
            size: vring.size,
            desc_addr: addrs.desc,
            avail_addr: addrs.avail,
            used_addr: addrs.used,
            base: self.base(vring),
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC),
            mergeable: has(features::MRG_RXBUF),
            version_1: has(features::VERSION_1),
            call: vring.call.clone(),
            memory,
        })
    }
}

impl<M: MapMemory> Device<M> {
    /// As [`Device::new`], with memory mapped by `mapper`.
    pub fn with_mapper(config: DeviceConfig, mapper: M) -> Device<M> {
        let max_queue_pairs = config.max_queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
        let mut device = Device {
            config: DeviceConfig {
                max_queue_pairs,
                ..config
            },
            mapper,
            features: None,
            protocol: VhostUserProtocolFeatures::empty(),
            table: RegionTable::default(),
            memory: None,
            vrings: Vec::new(),
        };
        device.reset();
        device
    }

    /// Handles a message, as far as that is possible without touching running rings.
    ///
    /// A request that is well-formed but refused is answered if the front-end asked for that (REPLY_ACK) and a [`Fault`]
    /// otherwise; a refused request changes nothing.
    pub fn handle(&mut self, message: Message) -> Result<Step, Fault> {
        if let Err(cause) = self.check(&message.request) {
            return self.refuse(&message, cause, false);
        }
        if let Request::SendRarp(mac) = message.request {
            return Ok(Step::Announce {
                mac,
                acknowledge: self.acknowledges(&message).then_some(message.code),
            });
        }
        let quiesced = self.disturbs_running(&message.request);
        let pending = Pending { message, quiesced };
        if quiesced {
            return Ok(Step::Quiesce(pending));
        }
        self.complete(pending)
    }

    /// Carries out a request whose time has come: no ring of the port runs. Never asks for another quiesce.
    pub fn complete(&mut self, pending: Pending) -> Result<Step, Fault> {
        let Pending {
            mut message,
            quiesced,
        } = pending;
        let runnable_before = self.any_running();
        let request = std::mem::replace(&mut message.request, Request::Unsupported);
        match self.apply(message.code, request) {
            Ok(Applied { answer, touched }) => {
                let reply = match answer {
                    None if self.acknowledges(&message) => Some(Reply::number(message.code, 0)),
                    answer => answer,
                };
                let changed = quiesced || (touched && (runnable_before || self.any_running()));
                Ok(Step::Done {
                    reply,
                    changed,
                    refused: None,
                })
            }
            Err(cause) => self.refuse(&message, cause, quiesced),
        }
    }

    /// Notes how far a ring was processed. To be called for each ring that was stopped, before
    /// [`complete`](Device::complete).
    pub fn set_base(&mut self, ring: usize, base: u32) {
        if let Some(vring) = self.vrings.get_mut(ring) {
            vring.base = Some(base);
        }
    }

    /// All rings that the port may have.
    pub fn rings(&self) -> impl Iterator<Item = RingView<'_>> {
        self.vrings.iter().enumerate().map(|(index, vring)| RingView {
            index,
            runnable: self.running(vring),
            enabled: vring.enabled,
            started: vring.started,
            size: vring.size,
            addrs: vring.addrs.as_ref(),
            base: self.base(vring),
            told: vring.told.unwrap_or(self.format().first_base()),
            stopped: vring.stopped,
            kick: vring.kick.clone(),
            call: vring.call.clone(),
            err: vring.err.clone(),
            features: self.features(),
        })
    }

    /// Acknowledged features; none before SET_FEATURES.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features.unwrap_or(0)
    }

    /// The regions that the front-end shares.
    #[must_use]
    pub fn memory(&self) -> &[SharedRegion] {
        self.table.regions()
    }

    /// The front-end went away: all that it set up is forgotten, every fd closed, memory let go. Stop the port's rings
    /// first; a ring that still holds the memory keeps it mapped.
    pub fn reset(&mut self) {
        self.features = None;
        self.protocol = VhostUserProtocolFeatures::empty();
        self.table = RegionTable::default();
        self.memory = None;
        self.vrings.clear();
        self.vrings
            .resize_with(usize::from(self.config.max_queue_pairs) * 2, Vring::default);
    }

    fn format(&self) -> Format {
        match self.features {
            None => Format::Unknown,
            Some(bits) if bits & features::RING_PACKED != 0 => Format::Packed,
            Some(_) => Format::Split,
        }
    }

    /// Where a ring goes on.
    fn base(&self, vring: &Vring) -> u32 {
        vring.base.unwrap_or(self.format().first_base())
    }

    fn running(&self, vring: &Vring) -> bool {
        vring.ready() && self.memory.is_some()
    }

    fn any_running(&self) -> bool {
        self.vrings.iter().any(|vring| self.running(vring))
    }

    /// What can be refused before anything is disturbed.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        match *request {
            Request::SetFeatures(bits) => offered(bits, features::OFFERED),
            Request::SetProtocolFeatures(bits) => offered(bits, features::OFFERED_PROTOCOL.bits()),
            Request::GetMaxMemSlots => self.negotiated(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS),
            Request::SetMemTable(ref regions) => RegionTable::replaced(regions).map(drop),
            Request::AddMemReg(ref region) => {
                self.negotiated(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                self.table.with(region).map(drop)
            }
            Request::RemMemReg {
                guest_addr,
                user_addr,
                size,
            } => {
                self.negotiated(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
                self.table.without(guest_addr, user_addr, size).map(drop)
            }
            Request::SetVringNum { ring, size } => {
                self.vring(ring)?;
                vring::checked_size(self.format(), size).map(drop)
            }
            Request::SetVringAddr { ring, flags, addrs } => {
                self.vring(ring)?;
                vring::checked_addrs(self.format(), flags, addrs)
            }
            Request::SetVringBase { ring, base } => {
                self.vring(ring)?;
                vring::checked_base(self.format(), base).map(drop)
            }
            Request::SetVringEnable { ring, value } => {
                self.vring(ring)?;
                vring::checked_enable(value).map(drop)
            }
            Request::GetVringBase { ring }
            | Request::SetVringKick { ring, .. }
            | Request::SetVringCall { ring, .. }
            | Request::SetVringErr { ring, .. } => self.vring(ring).map(drop),
            Request::Unsupported => Err(Refusal::NotNegotiated),
            // GET_QUEUE_NUM may be sent as soon as MQ was seen on offer, which it always is; SEND_RARP likewise.
            Request::GetFeatures
            | Request::GetProtocolFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::GetQueueNum
            | Request::SendRarp(_) => Ok(()),
        }
    }

    /// Whether a request changes what a running ring was given. Kick and error fds are not: the waiting side takes
    /// them from [`rings`](Device::rings) any time.
    fn disturbs_running(&self, request: &Request) -> bool {
        let running = |ring| self.vring(ring).ok().filter(|vring| self.running(vring));
        match *request {
            Request::SetMemTable(_) | Request::AddMemReg(_) | Request::RemMemReg { .. } => self.any_running(),
            Request::SetFeatures(bits) => {
                let enables = bits & features::PROTOCOL_FEATURES == 0;
                let sees = |vring: &Vring| bits != self.features() || (enables && !vring.enabled);
                self.vrings.iter().any(|vring| self.running(vring) && sees(vring))
            }
            Request::SetVringNum { ring, size } => {
                running(ring).is_some_and(|vring| u32::from(vring.size) != size)
            }
            Request::SetVringAddr { ring, addrs, .. } => {
                running(ring).is_some_and(|vring| vring.addrs != Some(addrs))
            }
            // A front-end that asks for a reply to SET_VRING_ENABLE lets the guest go on once it has one: no frame sent
            // after that may still meet the old state.
            Request::SetVringEnable { ring, value } => {
                running(ring).is_some_and(|vring| vring.enabled != (value == 1))
            }
            Request::SetVringBase { ring, .. }
            | Request::GetVringBase { ring }
            | Request::SetVringCall { ring, .. } => running(ring).is_some(),
            _ => false,
        }
    }

    /// Changes the state, wholly or not at all.
    fn apply(&mut self, code: Code, request: Request) -> Result<Applied, Refusal> {
        let number = |value| {
            Ok(Applied {
                answer: Some(Reply::number(code, value)),
                touched: false,
            })
        };
        match request {
            Request::GetFeatures => return number(features::OFFERED),
            Request::GetProtocolFeatures => return number(features::OFFERED_PROTOCOL.bits()),
            Request::GetQueueNum => {
                return number(match self.config.queue_num_as {
                    QueueNum::Pairs => self.config.max_queue_pairs.into(),
                    QueueNum::Rings => u64::from(self.config.max_queue_pairs) * 2,
                });
            }
            Request::GetMaxMemSlots => return number(u64::try_from(MAX_MEM_SLOTS).unwrap_or(u64::MAX)),
            // Ignored: owners need no bookkeeping on a socket, and RESET_OWNER is deprecated because back-ends read
            // different things into it. SEND_RARP changes nothing here.
            Request::SetOwner | Request::ResetOwner | Request::SendRarp(_) => {
                return Ok(Applied {
                    answer: None,
                    touched: false,
                });
            }
            Request::SetProtocolFeatures(bits) => {
                self.protocol = VhostUserProtocolFeatures::from_bits_retain(bits)
            }
            Request::SetFeatures(bits) => {
                self.features = Some(bits);
                if bits & features::PROTOCOL_FEATURES == 0 {
                    self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
                }
            }
            Request::SetMemTable(regions) => {
                let table = RegionTable::replaced(&regions)?;
                let memory = match regions.as_slice() {
                    [] => None,
                    regions => Some(self.mapper.map(regions).map_err(Refusal::Map)?),
                };
                (self.table, self.memory) = (table, memory);
            }
            Request::AddMemReg(region) => {
                let table = self.table.with(&region)?;
                let memory = match &self.memory {
                    Some(memory) if table.regions().len() == self.table.regions().len() => {
                        Ok(Arc::clone(memory))
                    }
                    Some(memory) => self.mapper.add(memory, &region),
                    None => self.mapper.map(&[region]),
                };
                (self.table, self.memory) = (table, Some(memory.map_err(Refusal::Map)?));
            }
            Request::RemMemReg {
                guest_addr,
                user_addr,
                size,
            } => {
                let table = self.table.without(guest_addr, user_addr, size)?;
                let memory = self.memory.as_ref().filter(|_| !table.regions().is_empty());
                let memory = memory.map(|memory| {
                    if table.regions().len() == self.table.regions().len() {
                        Arc::clone(memory)
                    } else {
                        self.mapper.remove(memory, guest_addr, user_addr, size)
                    }
                });
                (self.table, self.memory) = (table, memory);
            }
            Request::SetVringNum { ring, size } => {
                self.vring_mut(ring)?.size = vring::checked_size(self.format(), size)?;
            }
            Request::SetVringAddr { ring, addrs, .. } => self.vring_mut(ring)?.addrs = Some(addrs),
            Request::SetVringBase { ring, base } => {
                let base = vring::checked_base(self.format(), base)?;
                let vring = self.vring_mut(ring)?;
                (vring.base, vring.told) = (Some(base), Some(base));
            }
            Request::SetVringEnable { ring, value } => {
                self.vring_mut(ring)?.enabled = vring::checked_enable(value)?
            }
            Request::GetVringBase { ring } => {
                // Stopped, not reset: size, addresses, enabled and call fd stay. The kick fd goes: the ring starts again
                // by being given one.
                let vring = self.vring_mut(ring)?;
                vring.started = false;
                vring.kick = None;
                let base = self.base(self.vring(ring)?);
                let vring = self.vring_mut(ring)?;
                (vring.told, vring.stopped) = (Some(base), true);
                let answer = Some(Reply::vring_state(code, ring, base));
                return Ok(Applied {
                    answer,
                    touched: true,
                });
            }
            Request::SetVringKick { ring, fd } => {
                let vring = self.vring_mut(ring)?;
                vring.kick = fd;
                (vring.started, vring.stopped) = (true, false);
            }
            Request::SetVringCall { ring, fd } => self.vring_mut(ring)?.call = fd,
            Request::SetVringErr { ring, fd } => self.vring_mut(ring)?.err = fd,
            Request::Unsupported => return Err(Refusal::NotNegotiated),
        }
        Ok(Applied {
            answer: None,
            touched: true,
        })
    }

    fn refuse(&self, message: &Message, cause: Refusal, changed: bool) -> Result<Step, Fault> {
        let code = message.code;
        let refused = Fault::Refused { code, cause };
        if code.has_own_reply() || !self.acknowledges(message) {
            return Err(refused);
        }
        Ok(Step::Done {
            reply: Some(Reply::number(code, 1)),
            changed,
            refused: Some(refused),
        })
    }

    /// Whether the front-end waits to hear whether this request was carried out.
    fn acknowledges(&self, message: &Message) -> bool {
        message.need_reply && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn negotiated(&self, feature: VhostUserProtocolFeatures) -> Result<(), Refusal> {
        if self.protocol.contains(feature) {
            Ok(())
        } else {
            Err(Refusal::NotNegotiated)
        }
    }

    fn vring(&self, ring: u32) -> Result<&Vring, Refusal> {
        let rings = self.vrings.len();
        usize::try_from(ring)
            .ok()
            .and_then(|index| self.vrings.get(index))
            .ok_or(Refusal::NoSuchRing { ring, rings })
    }

    fn vring_mut(&mut self, ring: u32) -> Result<&mut Vring, Refusal> {
        let rings = self.vrings.len();
        usize::try_from(ring)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or(Refusal::NoSuchRing { ring, rings })
    }
}

/// What [`Device::apply`] did.
struct Applied {
    /// The request's own reply.
    answer: Option<Reply>,
    /// Something that rings are run by may have changed.
    touched: bool,
}

fn offered(bits: u64, offer: u64) -> Result<(), Refusal> {
    match bits & !offer {
        0 => Ok(()),
        extra => Err(Refusal::Features { extra }),
    }
}

#[cfg(test)]
mod tests;
