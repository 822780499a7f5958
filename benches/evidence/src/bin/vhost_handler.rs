//! ADR 0001: what `vhost` 0.18's `BackendReqHandler` does with QEMU's messages and with an impolite front-end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vnic_evidence::{Claims, NEED_REPLY, message, pending, send, vring_state};

/// A device that accepts everything that a net back-end must, and nothing else.
struct Device {
    refuse_vring_num: bool,
}

/// Answer to requests that no case here sends.
fn unused<T>() -> Result<T> {
    Err(Error::InvalidOperation("not part of this experiment"))
}

#[rustfmt::skip]
impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> { Ok(()) }
    fn get_features(&mut self) -> Result<u64> {
        Ok(1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }
    fn set_features(&mut self, _: u64) -> Result<()> { Ok(()) }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK)
    }
    fn set_protocol_features(&mut self, _: u64) -> Result<()> { Ok(()) }
    fn get_queue_num(&mut self) -> Result<u64> { Ok(1) }
    fn set_vring_enable(&mut self, _: u32, _: bool) -> Result<()> { Ok(()) }
    fn set_vring_call(&mut self, _: u8, _: Option<File>) -> Result<()> { Ok(()) }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> { Ok(()) }
    fn set_vring_num(&mut self, _: u32, _: u32) -> Result<()> {
        if self.refuse_vring_num { Err(Error::InvalidParam) } else { Ok(()) }
    }

    fn reset_owner(&mut self) -> Result<()> { unused() }
    fn reset_device(&mut self) -> Result<()> { unused() }
    fn set_mem_table(&mut self, _: &[VhostUserMemoryRegion], _: Vec<File>, _: Option<bool>)
        -> Result<Option<Vec<u64>>> { unused() }
    fn set_vring_addr(&mut self, _: u32, _: VhostUserVringAddrFlags, _: u64, _: u64, _: u64, _: u64)
        -> Result<()> { unused() }
    fn set_vring_base(&mut self, _: u32, _: u32) -> Result<()> { unused() }
    fn get_vring_base(&mut self, _: u32) -> Result<VhostUserVringState> { unused() }
    fn set_vring_kick(&mut self, _: u8, _: Option<File>) -> Result<()> { unused() }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> { unused() }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> { unused() }
    fn set_backend_req_fd(&mut self, _: Backend) {}
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> { unused() }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> { unused() }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> { unused() }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> { unused() }
    fn get_max_mem_slots(&mut self) -> Result<u64> { unused() }
    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File, _: Option<bool>)
        -> Result<Option<u64>> { unused() }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> { unused() }
    fn set_device_state_fd(&mut self, _: VhostTransferStateDirection, _: VhostTransferStatePhase, _: File)
        -> Result<Option<File>> { unused() }
    fn check_device_state(&mut self) -> Result<()> { unused() }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> { unused() }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> { unused() }
}

type Handler = BackendReqHandler<Mutex<Device>>;

/// A handler and the front-end's end of its socket.
fn connected(refuse_vring_num: bool) -> (Handler, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("socketpair");
    let device = Arc::new(Mutex::new(Device { refuse_vring_num }));
    (BackendReqHandler::from_stream(ours, device), theirs)
}

/// The same, after the messages that negotiate REPLY_ACK and, if asked, bit 30 of the features.
fn negotiated(refuse_vring_num: bool, features: bool) -> (Handler, UnixStream) {
    let (mut handler, mut peer) = connected(refuse_vring_num);
    let acked = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    send(&mut peer, &message(FrontendReq::GET_FEATURES, 0, &[]));
    send(
        &mut peer,
        &message(FrontendReq::SET_PROTOCOL_FEATURES, 0, &acked.bits().to_ne_bytes()),
    );
    let mut sent = 2;
    if features {
        send(
            &mut peer,
            &message(FrontendReq::SET_FEATURES, 0, &(1u64 << 30).to_ne_bytes()),
        );
        sent += 1;
    }
    for _ in 0..sent {
        handler.handle_request().expect("the usual opening is served");
    }
    pending(&mut peer);
    (handler, peer)
}

/// Serves one connection from QEMU's net front-end, the guest's CPU stopped; the last result.
fn serve_qemu() -> std::io::Result<String> {
    let dir = std::env::temp_dir().join(format!("vnic-evidence-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = serve_qemu_at(&dir.join("vhost.sock"));
    std::fs::remove_dir_all(&dir)?;
    result
}

/// The same, on a socket at `path`.
fn serve_qemu_at(path: &std::path::Path) -> std::io::Result<String> {
    let listener = UnixListener::bind(path)?;
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-S",
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "q35,memory-backend=m",
            "-m",
            "64",
        ])
        .args(["-object", "memory-backend-memfd,id=m,size=64M,share=on"])
        .args(["-chardev", &format!("socket,id=c,path={}", path.display())])
        .args([
            "-netdev",
            "vhost-user,id=n,chardev=c",
            "-device",
            "virtio-net-pci,netdev=n",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    listener.set_nonblocking(true)?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) if qemu.try_wait()?.is_none() => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return Err(std::io::Error::other("it ended before it connected")),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut handler = BackendReqHandler::from_stream(
        stream,
        Arc::new(Mutex::new(Device {
            refuse_vring_num: false,
        })),
    );
    let mut served = 0;
    let started = Instant::now();
    let last = loop {
        match handler.handle_request() {
            Ok(()) if started.elapsed() < Duration::from_secs(10) => served += 1,
            Ok(()) => break "still served after 10 s".to_owned(),
            Err(error) => break format!("{served} messages served, then Err({error:?})"),
        }
    };
    qemu.kill()?;
    qemu.wait()?;
    Ok(last)
}

extern "C" fn on_signal(_: libc::c_int) {}

/// Sends a header, lets the handler take it and block, interrupts it, then sends the body.
fn interrupt_between_header_and_body() -> (Result<()>, Result<()>) {
    // SAFETY: the handler does nothing; without SA_RESTART an interrupted recvmsg returns EINTR.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    let (mut handler, mut peer) = negotiated(false, true);
    let socket = handler.as_raw_fd();
    let whole = message(FrontendReq::SET_VRING_NUM, 0, &vring_state(0, 256));
    send(&mut peer, &whole[..12]);
    let done = AtomicBool::new(false);
    // SAFETY: names this thread; it outlives the scope below.
    let this = unsafe { libc::pthread_self() };
    let first = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut unread: libc::c_int = 1;
            while !done.load(Ordering::Acquire) {
                // SAFETY: FIONREAD writes one int; `this` is alive as long as the scope is.
                unsafe {
                    libc::ioctl(socket, libc::FIONREAD, &mut unread);
                    if unread == 0 {
                        libc::pthread_kill(this, libc::SIGUSR1);
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = handler.handle_request();
        done.store(true, Ordering::Release);
        result
    });
    // The body, and enough of a next message that the handler can read a whole header.
    send(&mut peer, &whole[12..]);
    send(&mut peer, &message(FrontendReq::SET_OWNER, 0, &[]));
    (first, handler.handle_request())
}

/// CPU time that this thread has used.
fn cpu_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec that clock_gettime may write.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(
        now.tv_sec.try_into().unwrap_or(0),
        now.tv_nsec.try_into().unwrap_or(0),
    )
}

/// Six bytes of a header, then nothing for 300 ms, then the end: wall and CPU time of one `handle_request`.
fn half_header(nonblocking: bool) -> (Duration, Duration, Result<()>) {
    let (mut handler, mut peer) = connected(false);
    let socket = handler.try_clone_connection().expect("dup");
    socket
        .set_nonblocking(nonblocking)
        .expect("fcntl on our own socket");
    send(&mut peer, &message(FrontendReq::SET_OWNER, 0, &[])[..6]);
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(peer);
    });
    let (wall, cpu) = (Instant::now(), cpu_time());
    let result = handler.handle_request();
    let times = (wall.elapsed(), cpu_time() - cpu);
    closer.join().expect("the closer does not panic");
    (times.0, times.1, result)
}

fn main() -> ExitCode {
    let mut claims = Claims::default();

    match serve_qemu() {
        Ok(last) => claims.check(
            "the handler cannot serve QEMU's net front-end",
            last.contains("InactiveFeature"),
            last,
        ),
        Err(error) => println!("[ - ] QEMU was not run: {error}"),
    }

    let (mut handler, mut peer) = negotiated(false, false);
    send(
        &mut peer,
        &message(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, &vring_state(0, 1)),
    );
    let result = handler.handle_request();
    let answer = pending(&mut peer);
    claims.check(
        "SET_VRING_ENABLE before SET_FEATURES, with REPLY_ACK and NEED_REPLY: an error and no answer",
        matches!(result, Err(Error::InactiveFeature(_))) && answer == 0,
        format!("{result:?}, {answer} bytes of answer"),
    );

    let (mut handler, mut peer) = negotiated(true, true);
    send(
        &mut peer,
        &message(FrontendReq::SET_VRING_NUM, NEED_REPLY, &vring_state(0, 3)),
    );
    let result = handler.handle_request();
    let answer = pending(&mut peer);
    claims.check(
        "a refusal that was answered is returned as an error too, as if the connection had failed",
        result.is_err() && answer == 20,
        format!("{result:?}, {answer} bytes of answer"),
    );

    for (request, body) in [
        (FrontendReq::SEND_RARP, 8),
        (FrontendReq::NET_SET_MTU, 8),
        (FrontendReq::SET_STATUS, 8),
        (FrontendReq::GET_STATUS, 0),
        (FrontendReq::SET_LOG_FD, 0),
    ] {
        let (mut handler, mut peer) = negotiated(false, true);
        send(&mut peer, &message(request, 0, &vec![0; body]));
        let result = handler.handle_request();
        let holds = matches!(result, Err(Error::InvalidMessage));
        claims.check(
            &format!("{request:?} has no dispatch"),
            holds,
            format!("{result:?}"),
        );
    }

    let (wall, _, result) = half_header(false);
    claims.check(
        "blocking socket: half a header holds the thread until the peer acts",
        wall >= Duration::from_millis(250),
        format!("{wall:.0?} in handle_request, then {result:?}"),
    );
    let (wall, cpu, result) = half_header(true);
    claims.check(
        "non-blocking socket: half a header does not return either",
        wall >= Duration::from_millis(250),
        format!("{wall:.0?} in handle_request, {cpu:.0?} of it on the CPU, then {result:?}"),
    );

    let (mut handler, mut peer) = negotiated(false, true);
    let whole = message(FrontendReq::SET_VRING_NUM, 0, &vring_state(0, 256));
    send(&mut peer, &whole[..16]);
    let result = handler.handle_request();
    claims.check(
        "a body that arrives in two parts is an error",
        matches!(result, Err(Error::InvalidMessage)),
        format!("{result:?}"),
    );

    let (first, second) = interrupt_between_header_and_body();
    claims.check(
        "a signal between header and body loses the place in the stream",
        matches!(first, Err(Error::SocketRetry(_))) && second.is_err(),
        format!("{first:?}, and after the body came {second:?}"),
    );

    claims.exit()
}
