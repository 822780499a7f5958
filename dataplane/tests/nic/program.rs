//! What the XDP program takes and counts, and that it goes with who attached it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use vnic_dataplane::probe::{Asker, write_probe};
use vnic_dataplane::program::ProgramError;

use super::*;

#[test]
fn only_frames_to_guests_are_taken() {
    in_namespace(1, || {
        let mut rig = Rig::new(AttachMode::Auto);
        let host = Station::on(NIC);
        let to_host = frame(HOST, FAR, 100);
        rig.peer.send(&to_host);
        assert_eq!(host.receive(), to_host);
        let to_guest = frame(GUEST, FAR, 100);
        rig.peer.send(&to_guest);
        assert_eq!(rig.receive(), to_guest);
        rig.program.forget_mac(GUEST).unwrap();
        rig.program.forget_mac(GUEST).unwrap();
        rig.peer.send(&to_guest);
        assert_eq!(host.receive(), to_guest);
        // Tagged frames go by their address, too; a packet socket shows them without the tag, so count.
        rig.program.allow_mac(GUEST).unwrap();
        let mut tagged = frame(GUEST, FAR, 100);
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        rig.peer.send(&tagged);
        assert_eq!(rig.receive(), tagged);
        let counters = rig.program.counters().unwrap();
        assert_eq!(counters.redirected, 2);
        assert!(counters.passed >= 2);
        rig.finish();
    });
}

/// What a target sends back to the probes of `HOST`.
fn answer_to(asked: &[u8]) -> Vec<u8> {
    let mut answer = [&HOST.0[..], &FAR.0, &asked[12..]].concat();
    match asked[12..14] {
        [8, 6] => {
            answer[21] = 2;
            answer[22..28].copy_from_slice(&FAR.0);
            answer[28..32].copy_from_slice(&asked[38..42]);
        }
        [8, 0] => {
            answer[26..30].copy_from_slice(&asked[30..34]);
            answer[34] = 0;
        }
        _ => answer[54] = 136,
    }
    answer
}

#[test]
fn answers_to_probes_are_counted_and_reach_the_host() {
    in_namespace(1, || {
        let mut program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        let (answers, peer) = (program.answers(), Station::on(PEER));
        let asker = |address: &str| Asker {
            mac: HOST,
            address: Some(address.parse().unwrap()),
        };
        let (nic, mut count) = (5, 0);
        for (target, other, address) in [
            ("192.0.2.1", "192.0.2.2", "192.0.2.9"),
            ("icmp:192.0.2.1", "icmp:192.0.2.2", "192.0.2.9"),
            ("2001:db8::1", "2001:db8::2", "2001:db8::9"),
        ] {
            let target = target.parse().unwrap();
            program.expect_answers(HOST, nic, target).unwrap();
            let mut asked = Vec::new();
            write_probe(&mut asked, &asker(address), target, Some(FAR));
            let answer = answer_to(&asked);
            let passed = program.counters().unwrap().passed;
            // Neither the question itself, nor somebody else's answer, nor one to another address, nor half of one.
            let mut question = asked.clone();
            question[..6].copy_from_slice(&HOST.0);
            let mut to_another = answer.clone();
            to_another[5] ^= 0x40;
            let mut of_another = Vec::new();
            write_probe(
                &mut of_another,
                &asker(address),
                other.parse().unwrap(),
                Some(FAR),
            );
            for frame in [
                &question,
                &to_another,
                &answer_to(&of_another),
                &answer[..40].to_vec(),
                &answer,
            ] {
                peer.send(frame);
            }
            until("the frames at the host", || {
                (program.counters().unwrap().passed >= passed + 5).then_some(())
            });
            count += 1;
            let all = answers.read();
            assert_eq!((all[5].count, all[5].from), (count, FAR), "{target}");
            assert!(all[5].at_ns > 0 && all.iter().map(|answer| answer.count).sum::<u64>() == count);
        }
        // An echo that somebody else on the host asked for.
        let target = "icmp:192.0.2.1".parse().unwrap();
        program.expect_answers(HOST, nic, target).unwrap();
        let mut asked = Vec::new();
        write_probe(&mut asked, &asker("192.0.2.9"), target, Some(FAR));
        let mut foreign = answer_to(&asked);
        foreign[38] ^= 1;
        program.expect_no_answers(GUEST).unwrap();
        peer.send(&foreign);
        peer.send(&answer_to(&asked));
        until("the answer", || (answers.read()[5].count > count).then_some(()));
        assert_eq!(answers.read()[5].count, count + 1);
        program.expect_no_answers(HOST).unwrap();
        let passed = program.counters().unwrap().passed;
        peer.send(&answer_to(&asked));
        until("the frame at the host", || {
            (program.counters().unwrap().passed > passed).then_some(())
        });
        assert_eq!(answers.read()[5].count, count + 1);
    });
}

fn attached() -> bool {
    ip(&["-d", "link", "show", NIC]).contains("xdp")
}

#[test]
fn the_program_goes_with_its_handle() {
    in_namespace(1, || {
        let program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        assert_eq!(program.mode(), AttachMode::Native);
        assert!(attached());
        drop(program);
        // A process that another test is just starting may hold the descriptor until it executes its program.
        let end = Instant::now() + net::PATIENCE;
        while attached() {
            assert!(Instant::now() < end, "the program is still attached");
        }
    });
}

/// Set for the process that [`the_program_goes_with_a_killed_process`] starts, which is this test again.
const HOLD: &str = "VNIC_TEST_HOLD_THE_PROGRAM";

#[test]
fn the_program_goes_with_a_killed_process() {
    if std::env::var_os(HOLD).is_some() {
        let _program = Program::attach(index(NIC), NIC, AttachMode::Auto).unwrap();
        println!("\nholding");
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    in_namespace(1, || {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "program::the_program_goes_with_a_killed_process",
                "--nocapture",
            ])
            .env(HOLD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let held = lines.map_while(Result::ok).any(|line| line == "holding");
        let there = attached();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(held && there);
        until("the kernel to detach", || (!attached()).then_some(()));
    });
}

#[test]
fn a_foreign_program_is_left_alone() {
    in_namespace(1, || {
        for (first, second) in [
            (AttachMode::Native, AttachMode::Auto),
            (AttachMode::Skb, AttachMode::Auto),
        ] {
            let _foreign = Program::attach(index(NIC), NIC, first).unwrap();
            let error = Program::attach(index(NIC), NIC, second).err().unwrap();
            assert!(matches!(error, ProgramError::ForeignProgram { .. }), "{error}");
            assert!(error.to_string().contains("ip link set dev nic xdp off"));
        }
        let error = Program::attach(9999, "gone", AttachMode::Auto).err().unwrap();
        assert!(matches!(error, ProgramError::NoInterface { .. }), "{error}");
    });
}
