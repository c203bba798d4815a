//! Every fuzz target: its corpus, then changed inputs for a while.
//!
//! Each target runs in a process of its own, since a panic on any thread of it is a failure and
//! some change the process they are in. The input that was running is kept.
//! `REPLAY_SECONDS` (2) is how long changed inputs run for each target; with a name as argument
//! only the targets whose name contains it run, and `REPLAY_INPUT=FILE` runs one input.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use replay::TARGETS;

/// Tells the process which target to run.
const TARGET: &str = "REPLAY_TARGET";
const INPUT: &str = "REPLAY_INPUT";
const SECONDS: &str = "REPLAY_SECONDS";
/// Longest input that is made up.
const MAX_BYTES: usize = 4096;

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(TARGET) {
        run_target(&name);
        return ExitCode::SUCCESS;
    }
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let wanted = |name: &str| filter.as_ref().is_none_or(|filter| name.contains(filter));
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let mut failed = false;
    for (name, _) in TARGETS.iter().filter(|(name, _)| wanted(name)) {
        failed |= !run_process(name, scratch.path());
    }
    ExitCode::from(u8::from(failed))
}

fn run_process(name: &str, scratch: &Path) -> bool {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .env(TARGET, name)
        .env("TMPDIR", scratch)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .expect("start a target");
    let out = String::from_utf8_lossy(&child.stdout);
    if child.status.success() {
        println!("{name:16} {}", out.trim());
        return true;
    }
    let kept = std::env::temp_dir().join(format!("replay-{name}.input"));
    let _ = fs::copy(last_input(scratch), &kept);
    println!(
        "{name:16} FAILED ({}): {}\nthe input is {}; run it again with {INPUT}={0} cargo test -p \
         replay {name}",
        child.status,
        String::from_utf8_lossy(&child.stderr),
        kept.display(),
    );
    false
}

fn last_input(scratch: &Path) -> PathBuf {
    scratch.join("input")
}

fn run_target(name: &str) {
    // A panic on a thread of the target's own counts as well.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.expect("a target");
    let running = last_input(&std::env::temp_dir());
    let run = |input: &[u8]| {
        fs::write(&running, input).expect("keep the input");
        target(input);
    };
    if let Ok(file) = std::env::var(INPUT) {
        return run(&fs::read(file).expect("the input"));
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let mut seeds: Vec<Vec<u8>> = fs::read_dir(corpus.join(name))
        .map(|entries| {
            let read = |entry: std::io::Result<fs::DirEntry>| fs::read(entry.ok()?.path()).ok();
            entries.filter_map(read).collect()
        })
        .unwrap_or_default();
    seeds.sort();
    for seed in &seeds {
        run(seed);
    }
    let seconds = std::env::var(SECONDS)
        .ok()
        .and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
    // The same inputs each time, as many as the time allows.
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut changed = 0_u64;
    while Instant::now() < end {
        run(&mutate(&seeds, &mut rng));
        changed += 1;
    }
    println!("{} of the corpus, {changed} changed", seeds.len());
}

/// A seed with some of its bytes changed, or bytes made up.
fn mutate(seeds: &[Vec<u8>], rng: &mut TestRng) -> Vec<u8> {
    let below = |rng: &mut TestRng, limit: usize| {
        usize::try_from(rng.next_u64()).unwrap_or(0) % limit.max(1)
    };
    let pick = below(rng, seeds.len() + 1);
    let mut input = match seeds.get(pick) {
        Some(seed) => seed.clone(),
        None => {
            let mut bytes = vec![0; below(rng, 512)];
            rng.fill_bytes(&mut bytes);
            bytes
        }
    };
    for _ in 0..=below(rng, 8) {
        let at = below(rng, input.len() + 1);
        let byte = rng.next_u32().to_le_bytes()[0];
        match below(rng, 6) {
            0 => input.insert(at, byte),
            1 => input.truncate(at),
            2 if at < input.len() => input[at] ^= 1 << (byte % 8),
            3 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff][usize::from(byte) % 5],
            4 => {
                // Part of another input.
                let other = seeds
                    .get(below(rng, seeds.len()))
                    .cloned()
                    .unwrap_or_default();
                let from = below(rng, other.len());
                input.splice(at.., other.into_iter().skip(from));
            }
            _ if at < input.len() => input[at] = byte,
            _ => {}
        }
    }
    input.truncate(MAX_BYTES);
    input
}
