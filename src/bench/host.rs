//! The machine in one line.
use std::fs;

/// Processor, cores that this process may use, memory: what times depend on first.
pub fn describe() -> String {
    let field = |file: &str, key: &str| {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let processor = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = field("/proc/meminfo", "MemTotal").and_then(|kib| kib.trim_end_matches(" kB").parse::<f64>().ok());
    let memory = memory.map(|kib| format!(", {:.0} GiB", kib / f64::from(1 << 20))).unwrap_or_default();
    format!("{processor}, {cores} core{}{memory}, {}", if cores == 1 { "" } else { "s" }, std::env::consts::OS)
}
