//! What the generator can do at most.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use vnic_tests::frontend::Pages;

use super::device::DEVICE_CPU;
use super::report::Section;
use super::{GENERATOR_CPU, Settings, bind, on_cpu, patiently, undisturbed};
use crate::driver::{Packed, RingKind, Split};
use crate::flood::{Flood, FloodPlan};
use crate::frames::{MIN_FRAME, Traffic};
use crate::idle_device;
use crate::joined::{process_time, share_of_two};
use crate::port::{Port, PortPlan};

/// Floods a device that does nothing.
///
/// # Errors
/// None: what fails is in the table.
pub(super) fn run(settings: &Settings) -> Result<Vec<Section>> {
    let columns = ["split", "packed"];
    let mut section = Section::new(
        "The generator alone",
        "Million frames a second, one way, over a thread on the device's CPU that returns bursts of 32 without looking at a frame. \
         A rate far below this is the device's own; in one that is near it, as with packed rings, the generator has a part. \
         With split rings sending costs an index a burst, whatever is in it.",
        1,
        &columns,
    );
    for (load, flows) in [("1024 flows", 1024), ("65,536 flows", 65_536)] {
        for _ in 0..settings.runs {
            for (name, packed) in columns.into_iter().zip([false, true]) {
                let outcome = patiently(|| {
                    on_cpu(GENERATOR_CPU, || {
                        if packed {
                            flood::<Packed>(settings, flows, packed)
                        } else {
                            flood::<Split>(settings, flows, packed)
                        }
                    })
                });
                section.add(load, name, outcome);
            }
        }
    }
    Ok(vec![section])
}

fn flood<K: RingKind>(settings: &Settings, flows: u32, packed: bool) -> Result<f64> {
    let plan = PortPlan {
        packed,
        in_order: false,
        queue_size: 1024,
        sends: Traffic {
            from: [0x52, 0x54, 0, 0, 0, 1],
            to: [0x52, 0x54, 0, 0, 0, 2],
            frames: flows,
            flows,
            first_flow: 0,
            sizes: vec![MIN_FRAME],
        },
        receives: MIN_FRAME,
        receive_buffer: None,
        stride: None,
        pages: Pages::HugeIfFree,
    };
    let layout = plan.layout()?;
    let memories = [plan.memory(&layout)?, plan.memory(&layout)?];
    let mut ports: Vec<Port<'_, K::Ring<'_>>> =
        memories.iter().map(|memory| Port::new(&layout, memory)).collect();
    let [from, to] = memories.each_ref().map(|memory| memory.region());
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let device = scope.spawn(|| -> Result<()> {
            bind(DEVICE_CPU)?;
            idle_device::run(packed, (from, &layout), (to, &layout), &stop);
            Ok(())
        });
        let plan = FloodPlan {
            senders: 1,
            warm_up: Duration::from_secs_f64(settings.warm_up()),
            measured: Duration::from_secs_f64(settings.seconds),
            pauses: FloodPlan::PAUSES,
        };
        let (began, before) = (Instant::now(), process_time());
        let report = Flood::new(&mut ports, plan).run();
        let share = before.and_then(|before| share_of_two(before, began));
        stop.store(true, Ordering::Relaxed);
        match device.join() {
            Ok(outcome) => {
                outcome?;
                undisturbed("the generator", share?)?;
                report
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    anyhow::ensure!(report.ports[1].received > 0, "no frame came back");
    Ok(report.received_rate() / 1e6)
}
