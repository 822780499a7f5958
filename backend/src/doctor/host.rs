//! What the host as a whole must have.

use super::{Finding, Findings, Level};
use crate::host::survey::HostFacts;

/// Kernels by what they brought; the first takes XDP programs that handle frames of several buffers.
const NEEDED: (u32, u32) = (5, 18);
const MULTI_BUFFER: (u32, u32) = (6, 6);
const TX_METADATA: (u32, u32) = (6, 8);
const TX_BUDGET: (u32, u32) = (6, 17);

/// Frame memory of one NIC queue and one worker with the default ring sizes, in bytes.
const LEAST_FRAME_MEMORY: u64 = (4096 + 2 * 2048) * 4096;
/// Sockets, eventfds, maps and connections of a daemon with many ports.
const OPEN_FILES: u64 = 4096;

pub(super) fn judge(facts: &HostFacts) -> Vec<Finding> {
    let mut findings = Findings::of(None);
    kernel(facts, &mut findings);
    privileges(facts, &mut findings);
    memory(facts, &mut findings);
    cpus(facts, &mut findings);
    findings.list
}

fn kernel(facts: &HostFacts, findings: &mut Findings) {
    use Level::{Note, Problem, Warning};
    let release = &facts.kernel_release;
    if facts.af_xdp {
        findings.ok("af-xdp", format!("kernel {release} has AF_XDP sockets"));
    } else {
        findings.add(
            Problem,
            "af-xdp",
            format!("kernel {release} has no AF_XDP sockets"),
            "every NIC is driven by them",
            "run a kernel built with CONFIG_XDP_SOCKETS=y (Debian's are)",
        );
    }
    let Some(version) = facts.kernel_version else {
        findings.add(
            Note,
            "kernel",
            format!("cannot tell the version of kernel {release}"),
            "features that come with newer kernels are not judged",
            "",
        );
        return;
    };
    if version < NEEDED {
        findings.add(
            Problem,
            "kernel",
            format!("kernel {release} is older than 5.18"),
            "it does not load the XDP program, which handles frames of several buffers",
            "apt install linux-image-amd64 from a newer release, and reboot",
        );
    }
    let since = |(major, minor): (u32, u32)| format!("kernel {release} is older than {major}.{minor}");
    for (check, wanted, why) in [
        (
            "multi-buffer",
            MULTI_BUFFER,
            "frames above 3.5 KiB (jumbo) cannot pass AF_XDP",
        ),
        (
            "tx-metadata",
            TX_METADATA,
            "checksums of guests' frames cannot be left to the NIC",
        ),
        (
            "tx-budget",
            TX_BUDGET,
            "in copy mode, one system call sends at most 32 frames",
        ),
    ] {
        if version < wanted {
            findings.add(
                Note,
                check,
                since(wanted),
                why,
                "a newer kernel, if that matters here",
            );
        } else {
            findings.ok(check, format!("kernel {}.{} or newer", wanted.0, wanted.1));
        }
    }
    if facts.bpf_jit == Some(false) {
        findings.add(
            Warning,
            "bpf-jit",
            "BPF programs are interpreted",
            "the XDP program runs for every frame that a NIC receives",
            "sysctl net.core.bpf_jit_enable=1",
        );
    }
}

fn privileges(facts: &HostFacts, findings: &mut Findings) {
    if facts.missing_capabilities.is_empty() {
        findings.ok("privileges", "may open AF_XDP sockets and load BPF programs");
    } else {
        let missing = facts.missing_capabilities.join(" ");
        findings.add(
            Level::Note,
            "privileges",
            format!("the doctor runs without {missing}"),
            "vnicd needs them; what the doctor cannot see without them is not judged",
            format!("run both as root, or give vnicd's unit AmbientCapabilities={missing}"),
        );
    }
    match facts.memlock {
        None => findings.ok("memlock", "locked memory is not limited"),
        Some(_) if facts.may_lock_memory => {
            findings.ok(
                "memlock",
                "CAP_IPC_LOCK: the limit of locked memory does not count",
            );
        }
        Some(limit) if limit < LEAST_FRAME_MEMORY => findings.add(
            Level::Problem,
            "memlock",
            format!("at most {} KiB of memory may be locked", limit / 1024),
            "frame memory is locked once for every NIC queue, 32 MiB and more each time",
            "ulimit -l unlimited, LimitMEMLOCK=infinity in the unit, or CAP_IPC_LOCK",
        ),
        Some(limit) => findings.add(
            Level::Note,
            "memlock",
            format!("at most {} MiB of memory may be locked", limit >> 20),
            "frame memory counts once for every NIC queue; vnicd says at start if that is too little",
            "LimitMEMLOCK=infinity in the unit",
        ),
    }
    match facts.open_files {
        Some(limit) if limit < OPEN_FILES => findings.add(
            Level::Note,
            "open-files",
            format!("at most {limit} open files"),
            "a port with 8 queue pairs takes about 50",
            format!("ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} in the unit"),
        ),
        _ => findings.ok("open-files", "enough open files"),
    }
}

fn memory(facts: &HostFacts, findings: &mut Findings) {
    let (all, free) = facts.huge_pages;
    let size = facts.huge_page_kib;
    let reserve = "sysctl vm.nr_hugepages=512";
    if facts.huge_page_kib != 2048 {
        findings.add(
            Level::Note,
            "huge-pages",
            format!("the default huge page has {size} KiB"),
            "frame memory uses 2 MiB pages; how many of those are free is not judged",
            "cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
        );
    } else if all == 0 {
        findings.add(
            Level::Warning,
            "huge-pages",
            "no 2 MiB huge pages are reserved",
            "frame memory then lies on ordinary pages, which costs TLB misses",
            reserve,
        );
    } else if free * size * 1024 < LEAST_FRAME_MEMORY {
        findings.add(
            Level::Warning,
            "huge-pages",
            format!("{free} of {all} huge pages are free"),
            "frame memory that does not fit lies on ordinary pages, which costs TLB misses",
            format!("sysctl vm.nr_hugepages={}", all + 512),
        );
    } else {
        findings.ok(
            "huge-pages",
            format!("{free} of {all} huge pages are free ({} MiB)", free * size / 1024),
        );
    }
}

fn cpus(facts: &HostFacts, findings: &mut Findings) {
    let isolated = &facts.isolated;
    if isolated.is_empty() {
        findings.add(
            Level::Note,
            "cpu-isolation",
            format!("none of {} CPUs is isolated", facts.cpus),
            "other programs and guests' vCPUs may run on the workers' CPUs, which shows as latency",
            "isolcpus=2,3 nohz_full=2,3 on the kernel's command line, and vnicd --cpus 2,3",
        );
    } else {
        findings.ok("cpu-isolation", format!("CPUs {isolated} are isolated"));
        if facts.nohz_full.is_empty() {
            findings.add(
                Level::Note,
                "nohz-full",
                "isolated CPUs still have the timer tick",
                "a busy worker is interrupted up to 1000 times a second",
                format!("nohz_full={isolated} on the kernel's command line"),
            );
        }
    }
    if facts.irqbalance {
        findings.add(
            Level::Note,
            "irqbalance",
            "irqbalance runs",
            "it may move the NICs' interrupts to the workers' CPUs",
            "IRQBALANCE_BANNED_CPULIST= in /etc/default/irqbalance, with the workers' CPUs",
        );
    }
    let slow: Vec<&str> = facts
        .governors
        .iter()
        .map(String::as_str)
        .filter(|governor| *governor != "performance")
        .collect();
    if !slow.is_empty() {
        findings.add(
            Level::Note,
            "cpu-governor",
            format!("CPU frequency governor: {}", slow.join(", ")),
            "an idle CPU that clocks down makes the first frames slow",
            "cpupower frequency-set -g performance",
        );
    }
}
