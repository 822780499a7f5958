//! ADR 0005: whether the stable Rust compiler, and whether clang, can compile a function for the kernel's BPF
//! machine, and whether the source of aya, if its folder is given, has batch map calls.

use std::path::Path;
use std::process::{Command, ExitCode};

use vnic_evidence::Claims;

const RUST: &str = "#![no_std]\n#[unsafe(no_mangle)]\npub extern \"C\" fn pass() -> u32 { 2 }\n";
const C: &str = "__attribute__((section(\"xdp.frags\"), used)) int pass(void *c) { return 2; }\n";

/// Runs a compiler in `dir`: whether it succeeded, and the first line that it complained with.
fn compile(dir: &Path, program: &str, words: &str) -> (bool, String) {
    match Command::new(program)
        .args(words.split_whitespace())
        .current_dir(dir)
        .output()
    {
        Ok(output) => {
            let complaint = String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or("")
                .to_owned();
            (output.status.success(), complaint)
        }
        Err(error) => (false, error.to_string()),
    }
}

/// Whether any file below `dir` has `word` in it.
fn mentions(dir: &Path, word: &str) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let found = if path.is_dir() {
            mentions(&path, word)?
        } else {
            std::fs::read_to_string(&path)?.contains(word)
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

fn main() -> ExitCode {
    let mut claims = Claims::default();
    let dir = std::env::temp_dir().join(format!("vnic-evidence-{}", std::process::id()));
    let written = std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::write(dir.join("pass.rs"), RUST))
        .and_then(|()| std::fs::write(dir.join("pass.bpf.c"), C));
    if let Err(error) = written {
        claims.check("the temporary folder can be written", false, error);
        return claims.exit();
    }

    let version = Command::new("rustc").arg("--version").output();
    let version = version
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
        .unwrap_or_default();
    let (built, complaint) = compile(
        &dir,
        "rustc",
        "--edition 2024 --crate-type lib --target bpfel-unknown-none pass.rs",
    );
    claims.check(
        "this rustc has no core library for BPF",
        !built,
        format!("{version}: {complaint}"),
    );
    let (built, complaint) = compile(&dir, "rustc", "-Z unstable-options --version");
    claims.check(
        "and does not let cargo build one (-Z build-std)",
        !built,
        complaint,
    );

    let (built, complaint) = compile(&dir, "clang", "-O2 -target bpf -c pass.bpf.c -o pass.bpf.o");
    let bytes = std::fs::metadata(dir.join("pass.bpf.o"))
        .map(|m| m.len())
        .unwrap_or(0);
    claims.check(
        "clang compiles C for BPF",
        built && bytes > 0,
        format!("{bytes} bytes of object {complaint}"),
    );

    match std::env::args().nth(1) {
        Some(source) => {
            let found = mentions(Path::new(&source), "_BATCH");
            let seen = format!("\"_BATCH\" in {source}: {found:?}");
            claims.check("aya has no batch map calls", matches!(found, Ok(false)), seen);
        }
        None => println!("[ - ] aya's source was not searched: give its src folder as the argument"),
    }
    let _ = std::fs::remove_dir_all(&dir);
    claims.exit()
}
