//! How many pages the KV pool gets.
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::kv::{PAGE_TOKENS, pages_for};

/// Tokens that the pool holds where nobody says.
const DEFAULT_TOKENS: usize = 1 << 16;
/// Share of the available memory that it may take then.
const MEMORY_SHARE: usize = 4;
/// Assumed where the system does not tell what is available.
const UNKNOWN_MEMORY: usize = 4 << 30;

/// Pages of `page_bytes` each, as `config` asks: by tokens, by memory, or neither (65,536 tokens, at most a quarter of
/// the memory that is available).
///
/// # Errors
/// `InvalidArgument` when that is not one page.
pub fn pages(config: &EngineConfig, page_bytes: usize) -> Result<usize> {
    let pages = match (config.kv_tokens, config.kv_memory_mib) {
        (0, 0) => pages_for(DEFAULT_TOKENS).min(available_memory() / MEMORY_SHARE / page_bytes),
        (0, mib) => mib.saturating_mul(1 << 20) / page_bytes,
        (tokens, _) => pages_for(tokens),
    };
    if pages == 0 {
        let rule = format!("one page of {PAGE_TOKENS} tokens takes {page_bytes} bytes");
        return Err(Error::invalid("engine.kv_memory_mib", config.kv_memory_mib, rule));
    }
    // A slot is a u32.
    Ok(pages.min(u32::MAX as usize / PAGE_TOKENS))
}

/// `MemAvailable` of Linux, in bytes.
fn available_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map_or(UNKNOWN_MEMORY, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tokens_win_over_memory_and_memory_over_the_default() {
        let of = |kv_tokens, kv_memory_mib, page_bytes| {
            pages(&EngineConfig { kv_tokens, kv_memory_mib, ..EngineConfig::default() }, page_bytes)
        };
        assert_eq!(of(33, 5, 1 << 20).unwrap(), 3);
        assert_eq!(of(0, 5, 1 << 20).unwrap(), 5);
        assert_eq!(of(0, 0, 16).unwrap(), 4096);
        assert!(of(0, 0, 1 << 60).is_err());
        let e = of(0, 1, 2 << 20).unwrap_err().to_string();
        assert!(e.contains("kv_memory_mib") && e.contains("2097152"), "{e}");
    }
}
