use super::*;

const UP: Input = Input::Carrier {
    up: true,
    down_count: Some(0),
};

fn carrier(up: bool, count: u32) -> Input {
    Input::Carrier {
        up,
        down_count: Some(count),
    }
}

fn failed_kicks(count: u32, errno: i32) -> Input {
    Input::KickFailed { errno, count }
}

/// A set of NICs with a carrier from the start.
struct Lab {
    health: Health,
    events: Vec<Event>,
}

impl Lab {
    fn new(nics: u8, config: HealthConfig) -> Lab {
        let mut health = Health::new(config);
        let mut events = Vec::new();
        for nic in 0..nics {
            health.add(nic);
            health.input(nic, 0, UP, &mut events);
        }
        Lab { health, events }
    }

    /// What changed: NIC, alive, cause.
    fn input(&mut self, nic: NicIndex, now: Millis, input: Input) -> Vec<(NicIndex, bool, Cause)> {
        self.events.clear();
        self.health.input(nic, now, input, &mut self.events);
        self.changes(now)
    }

    fn tick(&mut self, now: Millis) -> Vec<(NicIndex, bool, Cause)> {
        self.events.clear();
        self.health.tick(now, &mut self.events);
        self.changes(now)
    }

    fn changes(&self, now: Millis) -> Vec<(NicIndex, bool, Cause)> {
        assert!(self.events.iter().all(|event| event.at == now));
        self.events
            .iter()
            .map(|event| (event.nic, event.alive, event.cause))
            .collect()
    }
}

fn patient() -> HealthConfig {
    HealthConfig {
        updelay_ms: 100,
        ..HealthConfig::default()
    }
}

#[test]
fn carriers_of_the_start_need_no_updelay() {
    let lab = Lab::new(3, patient());
    assert_eq!(lab.health.alive(), 0b111);
    assert_eq!(
        lab.events,
        (0..3)
            .map(|nic| Event {
                nic,
                alive: true,
                cause: Cause::Fit,
                at: 0
            })
            .collect::<Vec<_>>()
    );
}

#[test]
fn down_at_once_and_up_after_the_updelay() {
    let mut lab = Lab::new(2, patient());
    assert_eq!(
        lab.input(1, 10, carrier(false, 1)),
        [(1, false, Cause::CarrierLost)]
    );
    assert_eq!(lab.health.alive(), 1);
    assert_eq!(lab.input(1, 50, carrier(true, 1)), []);
    assert_eq!(lab.health.next_deadline(50), Some(100));
    assert_eq!(lab.tick(149), []);
    assert_eq!(lab.tick(150), [(1, true, Cause::Fit)]);
    assert_eq!(lab.health.next_deadline(150), None);
    let report = lab.health.report(1, 150).unwrap();
    assert_eq!((report.losses, report.since), (1, Some((Cause::Fit, 150))));
}

#[test]
fn a_carrier_that_goes_again_starts_the_updelay_anew() {
    let mut lab = Lab::new(2, patient());
    lab.input(1, 10, carrier(false, 1));
    lab.input(1, 20, carrier(true, 1));
    assert_eq!(lab.input(1, 90, carrier(false, 2)), [], "it was not alive");
    lab.input(1, 100, carrier(true, 2));
    assert_eq!(lab.tick(199), []);
    assert_eq!(lab.tick(200), [(1, true, Cause::Fit)]);
}

#[test]
fn a_loss_that_nobody_saw_is_in_the_count() {
    let mut lab = Lab::new(2, patient());
    assert_eq!(
        lab.input(0, 10, carrier(true, 1)),
        [(0, false, Cause::CarrierBlinked)]
    );
    assert_eq!(lab.input(0, 11, carrier(true, 1)), []);
    assert_eq!(lab.tick(110), [(0, true, Cause::Fit)]);
}

#[test]
fn without_an_updelay_a_blink_is_over_at_the_next_tick() {
    let mut lab = Lab::new(
        2,
        HealthConfig {
            updelay_ms: 0,
            ..patient()
        },
    );
    assert_eq!(
        lab.input(0, 10, carrier(true, 1)),
        [(0, false, Cause::CarrierBlinked)]
    );
    assert_eq!(lab.health.next_deadline(10), Some(0));
    assert_eq!(lab.tick(10), [(0, true, Cause::Fit)]);
}

#[test]
fn the_only_nic_that_blinks_is_back_at_once() {
    let mut lab = Lab::new(1, patient());
    assert_eq!(
        lab.input(0, 10, carrier(true, 1)),
        [(0, false, Cause::CarrierBlinked), (0, true, Cause::LastResort)]
    );
}

#[test]
fn with_no_nic_alive_the_first_carrier_is_taken_at_once() {
    let mut lab = Lab::new(2, patient());
    lab.input(0, 10, carrier(false, 1));
    assert_eq!(
        lab.input(1, 11, carrier(false, 1)),
        [(1, false, Cause::CarrierLost)]
    );
    assert_eq!(lab.health.alive(), 0);
    assert_eq!(lab.input(1, 20, carrier(true, 1)), [(1, true, Cause::LastResort)]);
    assert_eq!(lab.input(0, 21, carrier(true, 1)), [], "there is one");
    assert_eq!(lab.tick(121), [(0, true, Cause::Fit)]);
    assert_eq!(lab.health.alive(), 0b11);
}

#[test]
fn a_flapping_nic_is_left_out_until_it_is_quiet() {
    let mut lab = Lab::new(2, patient());
    let mut count = 0;
    let mut changes = 0;
    // 10 Hz for 5 s.
    for cycle in 0..50 {
        let now = 1000 + cycle * 100;
        count += 1;
        changes += lab.input(1, now, carrier(false, count)).len();
        changes += lab.input(1, now + 50, carrier(true, count)).len();
        changes += lab.tick(now + 99).len();
    }
    assert_eq!(changes, 1, "it died once and came back never");
    assert_eq!(lab.tick(6_200), [], "the updelay alone does not bring it back");
    assert_eq!(lab.health.report(1, 6_200).unwrap().fitness, Fitness::Flapping);
    let wait = lab.health.next_deadline(6_200).unwrap();
    assert!(wait <= 20_000, "bounded: {wait}");
    assert_eq!(lab.tick(6_200 + wait - 10), []);
    assert_eq!(lab.tick(6_200 + wait), [(1, true, Cause::Fit)]);
}

#[test]
fn a_flapping_nic_is_better_than_none() {
    let mut lab = Lab::new(1, patient());
    for count in 1..10 {
        assert_eq!(
            lab.input(0, count * 10, carrier(false, count)),
            [(0, false, Cause::CarrierLost)]
        );
        assert_eq!(
            lab.input(0, count * 10 + 5, carrier(true, count)),
            [(0, true, Cause::LastResort)]
        );
    }
}

/// NICs that are probed, with an updelay of 100 ms.
fn probed(nics: u8) -> Lab {
    let mut lab = Lab::new(nics, patient());
    for nic in 0..nics {
        assert_eq!(lab.input(nic, 0, Input::Probing { on: true }), []);
    }
    lab
}

#[test]
fn a_probed_nic_comes_back_after_carrier_answer_and_updelay() {
    let mut lab = probed(2);
    lab.input(0, 1, Input::ProbeOk);
    lab.input(1, 1, Input::ProbeOk);
    lab.input(1, 10, carrier(false, 1));
    lab.input(1, 20, carrier(true, 1));
    assert_eq!(
        lab.tick(500),
        [],
        "what it answered before its loss does not count"
    );
    assert_eq!(lab.health.report(1, 500).unwrap().fitness, Fitness::NotProbed);
    assert_eq!(lab.input(1, 501, Input::ProbeOk), [(1, true, Cause::Fit)]);
}

#[test]
fn three_lost_probes_kill_a_nic_and_an_answer_brings_it_back_after_the_updelay() {
    let mut lab = probed(2);
    lab.input(0, 1, Input::ProbeOk);
    lab.input(1, 1, Input::ProbeOk);
    assert_eq!(lab.input(0, 2, Input::ProbeLost), []);
    assert_eq!(lab.input(0, 3, Input::ProbeLost), []);
    assert_eq!(lab.input(0, 4, Input::ProbeOk), [], "not in a row");
    for at in 5..7 {
        assert_eq!(lab.input(0, at, Input::ProbeLost), []);
    }
    assert_eq!(
        lab.input(0, 7, Input::ProbeLost),
        [(0, false, Cause::ProbesLost { count: 3 })]
    );
    assert_eq!(lab.input(0, 20, Input::ProbeOk), []);
    assert_eq!(lab.health.next_deadline(20), Some(100));
    assert_eq!(lab.tick(119), []);
    assert_eq!(lab.tick(120), [(0, true, Cause::Fit)]);
}

#[test]
fn a_target_that_nobody_reaches_is_held_against_no_nic() {
    let mut lab = probed(2);
    lab.input(0, 1, Input::ProbeOk);
    lab.input(1, 1, Input::ProbeOk);
    for at in 2..4 {
        lab.input(0, at, Input::ProbeLost);
        lab.input(1, at, Input::ProbeLost);
    }
    let first = lab.input(0, 4, Input::ProbeLost);
    assert_eq!(first, [(0, false, Cause::ProbesLost { count: 3 })]);
    assert_eq!(lab.input(1, 4, Input::ProbeLost), [(0, true, Cause::Fit)]);
    // Nor is one left out that comes back meanwhile.
    lab.input(1, 10, carrier(false, 1));
    lab.input(1, 20, carrier(true, 1));
    assert_eq!(lab.tick(120), [(1, true, Cause::Fit)]);
    // Now there are answers again, on one of them.
    lab.input(1, 121, Input::ProbeLost);
    lab.input(1, 122, Input::ProbeLost);
    lab.input(1, 123, Input::ProbeLost);
    let told = lab.input(0, 130, Input::ProbeOk);
    assert_eq!(told, [(1, false, Cause::ProbesLost { count: 3 })]);
}

#[test]
fn a_nic_that_is_not_probed_is_better_than_one_whose_probes_are_lost() {
    let mut lab = Lab::new(2, patient());
    lab.input(1, 0, Input::Probing { on: true });
    for at in 1..3 {
        assert_eq!(lab.input(1, at, Input::ProbeLost), []);
    }
    let told = lab.input(1, 3, Input::ProbeLost);
    assert_eq!(told, [(1, false, Cause::ProbesLost { count: 3 })]);
    assert_eq!(
        lab.input(1, 50, Input::Probing { on: false }),
        [(1, true, Cause::Fit)]
    );
}

#[test]
fn stalls_and_failed_kicks_are_held_against_a_nic_for_a_while() {
    let mut lab = Lab::new(2, patient());
    let waiting = |for_ms, paused| Input::TxWaiting { for_ms, paused };
    assert_eq!(lab.input(0, 10, waiting(99, false)), []);
    assert_eq!(lab.input(0, 10, waiting(999, true)), [], "pause frames");
    assert_eq!(
        lab.input(0, 20, waiting(100, false)),
        [(0, false, Cause::TxStalled { for_ms: 100 })]
    );
    assert_eq!(lab.tick(1_019), []);
    assert_eq!(lab.tick(1_020), [(0, true, Cause::Fit)]);
    for _ in 0..15 {
        assert_eq!(lab.input(1, 1_100, failed_kicks(1, 105)), []);
    }
    assert_eq!(
        lab.input(1, 2_100, failed_kicks(1, 105)),
        [],
        "that was another second"
    );
    assert_eq!(
        lab.input(1, 2_200, failed_kicks(1, 100)),
        [(1, false, Cause::KickFailed { errno: 100 })]
    );
}

/// Lets time pass as the thread that watches the links does, and then half the clock's range at once.
fn half_the_clock_later(lab: &mut Lab, now: Millis) -> Millis {
    for elapsed in (0..60_000).step_by(20) {
        lab.tick(now + elapsed);
    }
    now + (1 << 31) + 1
}

#[test]
fn what_is_over_does_not_come_back_when_half_the_clock_has_passed() {
    let mut lab = Lab::new(2, patient());
    let down = failed_kicks(1, 100);
    assert_eq!(lab.input(0, 10, down).len(), 1, "a fault");
    let now = half_the_clock_later(&mut lab, 10);
    assert_eq!(lab.health.alive(), 0b11);
    assert_eq!(lab.tick(now), []);
    assert_eq!(lab.health.report(0, now).unwrap().fitness, Fitness::Fit);

    let mut lab = Lab::new(2, patient());
    lab.input(0, 10, carrier(false, 1));
    lab.input(0, 20, carrier(true, 1));
    let now = half_the_clock_later(&mut lab, 20);
    let fitness = lab.health.report(0, now).unwrap().fitness;
    assert_eq!(fitness, Fitness::Fit, "no updelay");

    let mut lab = Lab::new(2, patient());
    for count in 1..4 {
        lab.input(0, count * 10, carrier(false, count));
        lab.input(0, count * 10 + 5, carrier(true, count));
    }
    let now = half_the_clock_later(&mut lab, 35);
    assert_eq!(lab.tick(now), []);
    lab.input(0, now, carrier(false, 4));
    lab.input(0, now, carrier(true, 4));
    let told = lab.tick(now + 100);
    assert_eq!(told, [(0, true, Cause::Fit)], "one loss is no flapping");

    let mut lab = Lab::new(2, patient());
    for _ in 0..15 {
        lab.input(0, 10, failed_kicks(1, 105));
    }
    let now = half_the_clock_later(&mut lab, 10);
    assert_eq!(lab.input(0, now, failed_kicks(1, 105)), []);
}

#[test]
fn kicks_that_fail_now_and_then_are_never_counted_together() {
    let mut lab = Lab::new(2, patient());
    // The clock has never been near 0.
    for round in 0..40 {
        let now = (1 << 31) + 1_000 + round * 60_000;
        assert_eq!(lab.input(0, now, failed_kicks(1, 105)), []);
    }
}

#[test]
fn a_nic_that_has_been_quiet_may_lose_its_carrier_once_again() {
    let mut lab = Lab::new(2, patient());
    for count in 1..4 {
        lab.input(0, count * 10, carrier(false, count));
        lab.input(0, count * 10 + 5, carrier(true, count));
    }
    assert_eq!(lab.tick(200), [], "left out");
    assert_eq!(lab.tick(20_000), [(0, true, Cause::Fit)]);
    lab.input(0, 30_000, carrier(false, 4));
    lab.input(0, 30_000, carrier(true, 4));
    assert_eq!(lab.tick(30_100), [(0, true, Cause::Fit)]);
}

#[test]
fn many_failed_kicks_within_a_second_are_held_against_a_nic_however_seldom_they_are_told() {
    let mut lab = Lab::new(2, patient());
    assert_eq!(lab.input(0, 100, failed_kicks(8, 105)), []);
    assert_eq!(lab.input(0, 200, failed_kicks(7, 105)), []);
    assert_eq!(
        lab.input(0, 300, failed_kicks(1, 105)),
        [(0, false, Cause::KickFailed { errno: 105 })]
    );
    assert_eq!(lab.input(1, 300, failed_kicks(15, 105)), []);
    assert_eq!(lab.tick(1_300), [(0, true, Cause::Fit)]);
    assert_eq!(lab.input(1, 1_300, failed_kicks(15, 105)), [], "another second");
}

/// How often a NIC comes back within a minute that fails each time it is used.
fn comebacks(fault: impl Fn(&mut Lab, Millis)) -> u32 {
    let mut lab = Lab::new(2, patient());
    let mut comebacks = 0;
    for now in (1_000..61_000).step_by(20) {
        if lab.health.alive() & 1 == 1 {
            fault(&mut lab, now);
            assert_eq!(lab.health.alive(), 0b10);
        }
        comebacks += u32::from(lab.tick(now).contains(&(0, true, Cause::Fit)));
    }
    comebacks
}

#[test]
fn a_nic_that_fails_each_time_it_is_used_is_used_seldom() {
    let kicks = comebacks(|lab, now| _ = lab.input(0, now, failed_kicks(1, 100)));
    assert!((5..20).contains(&kicks), "{kicks}");
    let stalled = Input::TxWaiting {
        for_ms: 500,
        paused: false,
    };
    let stalls = comebacks(|lab, now| _ = lab.input(0, now, stalled));
    assert!((5..20).contains(&stalls), "{stalls}");
}

#[test]
fn one_fault_that_lasts_is_one() {
    let mut lab = Lab::new(2, patient());
    for at in (0..3_000).step_by(100) {
        lab.input(0, at, failed_kicks(1, 100));
    }
    assert_eq!(lab.tick(3_899), []);
    assert_eq!(lab.tick(3_900), [(0, true, Cause::Fit)]);
}

#[test]
fn kicks_that_fail_for_want_of_a_carrier_cost_nothing_more() {
    let mut lab = Lab::new(2, patient());
    for count in 1..3 {
        let now = count * 100;
        lab.input(0, now, carrier(false, count));
        lab.input(0, now + 10, failed_kicks(20, 100));
        lab.input(0, now + 20, carrier(true, count));
        lab.input(0, now + 30, failed_kicks(1, 100));
    }
    assert_eq!(lab.tick(1_230), [(0, true, Cause::Fit)]);
}

#[test]
fn a_nic_half_of_whose_probes_are_lost_is_left_out() {
    let mut lab = probed(2);
    lab.input(1, 1, Input::ProbeOk);
    let mut comebacks = 0;
    for cycle in 0..100 {
        let now = 1_000 + cycle * 300;
        comebacks += lab.input(0, now, Input::ProbeOk).len();
        comebacks += lab.tick(now + 200).len();
        for at in 201..204 {
            lab.input(0, now + at, Input::ProbeLost);
        }
    }
    assert!(comebacks < 4, "{comebacks}");
    let end = 1_000 + 100 * 300;
    lab.input(0, end, Input::ProbeOk);
    assert_eq!(lab.health.report(0, end).unwrap().fitness, Fitness::Flapping);
    assert_eq!(lab.tick(end + 20_100), [(0, true, Cause::Fit)]);
}

#[test]
fn a_target_that_comes_and_goes_makes_no_nic_flap() {
    let mut lab = probed(2);
    for cycle in 0..20 {
        let now = 1_000 + cycle * 1_000;
        for nic in 0..2 {
            lab.input(nic, now, Input::ProbeOk);
        }
        lab.tick(now + 200);
        assert_eq!(lab.health.alive(), 0b11, "cycle {cycle}");
        for at in 201..210 {
            for nic in 0..2 {
                lab.input(nic, now + at, Input::ProbeLost);
            }
        }
    }
}

/// As the thread that watches the links finds that an interface is gone, and back.
fn vanish_and_return(lab: &mut Lab, nic: NicIndex, now: Millis, probed: bool) {
    lab.input(nic, now, Input::Link { up: false });
    lab.health.add_again(nic, now + 50, probed);
    assert_eq!(lab.input(nic, now + 50, Input::Link { up: true }), []);
    assert_eq!(lab.input(nic, now + 50, UP), []);
}

#[test]
fn an_interface_that_is_back_waits_for_the_updelay_and_an_answer() {
    let mut lab = Lab::new(2, patient());
    vanish_and_return(&mut lab, 1, 1_000, false);
    assert_eq!(lab.tick(1_149), []);
    assert_eq!(lab.tick(1_150), [(1, true, Cause::Fit)]);

    let mut lab = Lab::new(2, patient());
    lab.input(1, 0, Input::Probing { on: true });
    lab.input(1, 1, Input::ProbeOk);
    vanish_and_return(&mut lab, 1, 1_000, true);
    assert_eq!(lab.tick(5_000), []);
    assert_eq!(lab.health.report(1, 5_000).unwrap().fitness, Fitness::NotProbed);
    assert_eq!(lab.input(1, 5_000, Input::ProbeOk), [(1, true, Cause::Fit)]);
}

#[test]
fn an_interface_that_comes_and_goes_is_left_out_like_a_carrier() {
    let mut lab = Lab::new(2, patient());
    for count in 1..4 {
        lab.input(1, count * 10, carrier(false, count));
        lab.input(1, count * 10 + 5, carrier(true, count));
    }
    vanish_and_return(&mut lab, 1, 100, false);
    assert_eq!(lab.tick(1_000), []);
    let report = lab.health.report(1, 1_000).unwrap();
    assert_eq!((report.fitness, report.losses), (Fitness::Flapping, 3));
    assert_eq!(lab.tick(30_000), [(1, true, Cause::Fit)]);
}

#[test]
fn the_only_interface_that_is_back_is_used_at_once() {
    let mut lab = Lab::new(1, patient());
    lab.input(0, 10, Input::Link { up: false });
    lab.health.add_again(0, 20, true);
    lab.input(0, 20, Input::Link { up: true });
    assert_eq!(lab.input(0, 20, UP), [(0, true, Cause::LastResort)]);
}

#[test]
fn a_link_that_is_down_has_no_carrier_to_speak_of() {
    let mut lab = Lab::new(2, patient());
    assert_eq!(
        lab.input(0, 5, Input::Link { up: false }),
        [(0, false, Cause::LinkDown)]
    );
    assert_eq!(lab.input(0, 6, Input::Link { up: true }), []);
    assert_eq!(lab.tick(106), [(0, true, Cause::Fit)]);
}

#[test]
fn removing_the_last_alive_nic_wakes_another() {
    let mut lab = Lab::new(2, patient());
    lab.input(1, 10, carrier(false, 1));
    lab.input(1, 20, carrier(true, 1));
    lab.events.clear();
    lab.health.remove(0, 30, &mut lab.events);
    assert_eq!(lab.changes(30), [(1, true, Cause::LastResort)]);
    assert!(lab.health.report(0, 30).is_none());
    assert_eq!(lab.input(0, 40, carrier(false, 9)), [], "nobody knows it");
    assert_eq!(lab.input(200, 40, UP), []);
}

proptest::proptest! {
    /// Whatever comes in: a NIC without a carrier is dead, and while one has a carrier some NIC is alive.
    #[test]
    fn someone_is_alive_while_there_is_a_carrier(
        probing in 0u8..8,
        steps in proptest::collection::vec((0u8..3, 0u8..8, 0u32..400), 1..200)
    ) {
        let mut lab = Lab::new(3, patient());
        for nic in (0..3).filter(|nic| probing >> nic & 1 == 1) {
            lab.input(nic, 0, Input::Probing { on: true });
        }
        let (mut now, mut up, mut link, mut counts) = (0, [true; 3], [true; 3], [0u32; 3]);
        for (nic, kind, elapsed) in steps {
            now += elapsed;
            let at = usize::from(nic);
            let input = match kind {
                0 | 1 => {
                    counts[at] += u32::from(up[at] && kind == 0);
                    up[at] = kind == 1;
                    carrier(up[at], counts[at])
                }
                2 => { counts[at] += 1; carrier(up[at], counts[at]) }
                3 => { link[at] = !link[at]; Input::Link { up: link[at] } }
                4 => Input::ProbeOk,
                5 => Input::ProbeLost,
                6 => Input::TxWaiting { for_ms: elapsed, paused: false },
                _ => failed_kicks(1, 100),
            };
            lab.input(nic, now, input);
            let usable = (0..3).filter(|&at| up[at] && link[at]).fold(0u32, |set, at| set | 1 << at);
            let alive = lab.health.alive();
            proptest::prop_assert_eq!(alive & !usable, 0);
            proptest::prop_assert_eq!(alive != 0, usable != 0);
        }
    }
}
