//! A build for CUDA on a machine without a GPU: with no driver, and with the one that stands in (`scripts/cuda-stand-in.sh`).
use std::process::Command;

const SIX: &str = "--num-requests 6 --output-len 6 --concurrency 3 --num-adapters 2";

/// `prefixd bench` of `requests`: whether it ended well, and all it wrote.
fn bench(requests: &str, args: &[&str], variables: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefixd"));
    command.args("bench --prefix-len 5 --prompt-len 7 --warmup 0".split(' ').chain(requests.split(' ')));
    for (name, _) in std::env::vars_os() {
        // Those of the tests are no settings of a server.
        if name.to_string_lossy().starts_with("PREFIXD_") {
            command.env_remove(name);
        }
    }
    command.args(args).env("PREFIXD_LOG", "warn").env("RUST_BACKTRACE", "1").envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = [output.stderr, output.stdout].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

/// The same on the driver that stands in; `None`, with the reason printed, without it.
fn bench_there(requests: &str, args: &[&str], variables: &[(&str, &str)]) -> Option<(bool, String)> {
    if std::env::var_os("CUDA_STAND_IN").is_none() {
        println!("skipped: no driver stands in (scripts/cuda-stand-in.sh)");
        return None;
    }
    Some(bench(requests, &[&["--device", "cuda:0"], args].concat(), variables))
}

#[test]
fn cuda_without_a_driver_is_refused_or_the_cpu_serves() {
    let nowhere = [("LD_LIBRARY_PATH", "")];
    let (well, text) = bench(SIX, &["--device", "cuda:0"], &nowhere);
    if well {
        println!("skipped: this machine has a GPU");
        return;
    }
    assert!(text.contains("`device` is cuda:0") && text.contains("needs the NVIDIA driver"), "{text}");
    assert!(!text.contains("stack backtrace") && !text.contains(" at ./"), "{text}");
    let (well, text) = bench(SIX, &["--device", "auto"], &nowhere);
    assert!(well && text.contains("6 completed, none failed"), "{text}");
    assert_eq!(text.matches("no CUDA device").count(), 1, "{text}");
}

#[test]
fn cuda_says_what_a_device_has_no_memory_for() {
    for mib in ["16", "33", "36"] {
        let Some((well, text)) = bench_there(SIX, &[], &[("CUDA_STAND_IN_MIB", mib)]) else { return };
        assert!(!well && text.contains("the GPU has no memory left for this"), "{mib}: {text}");
        assert!(!text.contains("needs the NVIDIA driver") && !text.contains(" at ./"), "{mib}: {text}");
    }
    let (well, text) = bench_there(SIX, &[], &[("CUDA_STAND_IN_MIB", "2048")]).unwrap();
    assert!(!well && text.contains("of 2048 MiB are free") && text.contains("training.activation_mib"), "{text}");
}

#[test]
fn cuda_steps_that_cannot_be_recorded_are_launched_one_by_one() {
    let kv = ["--kv-tokens", "1024"];
    let Some((well, text)) = bench_there(SIX, &kv, &[]) else { return };
    assert!(well && text.contains("6 completed, none failed") && !text.contains("cannot be recorded"), "{text}");
    let (well, text) = bench_there(SIX, &kv, &[("CUDA_STAND_IN_REFUSE", "graph")]).unwrap();
    assert!(well && text.contains("6 completed, none failed") && text.contains("cannot be recorded"), "{text}");
}

#[test]
fn cuda_without_memory_for_a_step_ends_the_requests_of_that_step() {
    // The adapters are compiled by then.
    let refuse = [("CUDA_STAND_IN_REFUSE", "memory:600")];
    let Some((well, text)) = bench_there(SIX, &["--kv-tokens", "1024", "--enforce-eager"], &refuse) else { return };
    assert!(well && text.matches("step failed").count() == 1 && text.contains("no memory left"), "{text}");
    assert!(text.contains("3 completed, 3 failed (3 RESOURCE_EXHAUSTED)"), "{text}");
}

/// The figures of the line that the driver writes at the end: graphs, copies to the device, from it, on it, allocations, launches and waits.
fn counts(text: &str) -> [i64; 7] {
    let line = text.lines().find_map(|line| line.strip_prefix("stand-in driver: ")).unwrap_or_else(|| panic!("{text}"));
    let of = |what: &str| {
        let part = line.split(", ").find(|part| part.contains(what)).unwrap_or_else(|| panic!("{line}"));
        part.split(' ').next().unwrap().parse().unwrap()
    };
    ["graphs", "copies to the device", "from it", "on it", "allocations", "launches", "waits"].map(of)
}

#[test]
fn cuda_decodes_with_one_copy_one_graph_one_wait_and_nothing_else_a_step() {
    let run = |tokens: usize| {
        let one = format!("--num-requests 1 --output-len {tokens} --concurrency 1 --num-adapters 1");
        let (well, text) = bench_there(&one, &["--kv-tokens", "1024"], &[("CUDA_STAND_IN_LOG", "1")])?;
        assert!(well, "{text}");
        Some(counts(&text))
    };
    // The 13 rows more lie in a page of the pool that the shorter run has opened too: debug builds poison a new one, which costs copies.
    let Some(few) = run(11) else { return };
    let many = run(24).unwrap();
    let more: [i64; 7] = std::array::from_fn(|i| many[i] - few[i]);
    let [graphs, to, from, on, allocations, launches, waits] = more;
    assert_eq!([graphs, to, from], [13; 3]);
    assert_eq!([on, allocations, launches], [0; 3], "outside of graphs");
    // Around the first and the last step a wait more or less is a matter of time.
    assert!((10..=16).contains(&waits), "{waits} waits in 13 steps");
}
