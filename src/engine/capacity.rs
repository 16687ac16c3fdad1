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

/// Memory of the GPU that the model lies on.
#[derive(Clone, Copy, Debug)]
pub struct GpuMemory {
    /// Bytes that are free, weights loaded.
    pub free: usize,
    /// Bytes that there are.
    pub total: usize,
    /// Bytes that the activations of a step take.
    pub activations: usize,
    /// Bytes that training may take.
    pub training: usize,
}

/// Pages of `page_bytes` each, as `config` asks: by tokens, by memory, or neither (on a GPU what weights, activations and others
/// leave of its share, else 65,536 tokens, at most a quarter of the memory that is available).
///
/// # Errors
/// `InvalidArgument` when that is not one page, `ResourceExhausted` when a GPU has no room for what was asked.
pub fn pages(config: &EngineConfig, page_bytes: usize, gpu: Option<GpuMemory>) -> Result<usize> {
    let budget = gpu.map(|m| {
        let kept = (m.total as f64 * (1.0 - config.gpu_memory_utilization)) as usize;
        m.free.saturating_sub(kept).saturating_sub(m.activations).saturating_sub(m.training)
    });
    let pages = match (config.kv_tokens, config.kv_memory_mib, budget) {
        (0, 0, Some(budget)) => budget / page_bytes,
        (0, 0, None) => pages_for(DEFAULT_TOKENS).min(available_memory() / MEMORY_SHARE / page_bytes),
        (0, mib, _) => mib.saturating_mul(1 << 20) / page_bytes,
        (tokens, ..) => pages_for(tokens),
    };
    if let (Some(m), Some(budget)) = (gpu, budget)
        && (pages == 0 || pages.saturating_mul(page_bytes) > budget)
    {
        let mib = |bytes: usize| bytes >> 20;
        let text = format!(
            "the KV pool needs {} MiB ({pages} pages of {page_bytes} bytes), the GPU has {} MiB for it: {} of {} MiB are free, \
             {} MiB are for activations, {} MiB for training (training.activation_mib, training.batch_mib), \
             engine.gpu_memory_utilization is {}",
            mib(pages.max(1).saturating_mul(page_bytes)),
            mib(budget),
            mib(m.free),
            mib(m.total),
            mib(m.activations),
            mib(m.training),
            config.gpu_memory_utilization
        );
        return Err(Error::exhausted(text, None));
    }
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
            pages(&EngineConfig { kv_tokens, kv_memory_mib, ..EngineConfig::default() }, page_bytes, None)
        };
        assert_eq!(of(33, 5, 1 << 20).unwrap(), 3);
        assert_eq!(of(0, 5, 1 << 20).unwrap(), 5);
        assert_eq!(of(0, 0, 16).unwrap(), 4096);
        assert!(of(0, 0, 1 << 60).is_err());
        let e = of(0, 1, 2 << 20).unwrap_err().to_string();
        assert!(e.contains("kv_memory_mib") && e.contains("2097152"), "{e}");
    }

    #[test]
    fn a_gpu_gives_what_its_share_leaves() {
        let memory = GpuMemory { free: 70 << 30, total: 80 << 30, activations: 1 << 30, training: 1 << 30 };
        let of = |kv_tokens, kv_memory_mib, memory| {
            pages(&EngineConfig { kv_tokens, kv_memory_mib, ..EngineConfig::default() }, 1 << 20, Some(memory))
        };
        // 70 GiB less the tenth of 80 that is kept and 2 for activations and training.
        assert_eq!(of(0, 0, memory).unwrap(), 60 << 10);
        assert_eq!(of(32, 0, memory).unwrap(), 2);
        assert_eq!(of(0, 5, memory).unwrap(), 5);
        let e = of(0, 61 << 10, memory).unwrap_err().to_string();
        assert!(e.contains("62464 MiB") && e.contains("has 61440 MiB") && e.contains("0.9"), "{e}");
        assert!(e.contains("1024 MiB for training (training.activation_mib"), "{e}");
        let e = of(0, 0, GpuMemory { free: 9 << 30, ..memory }).unwrap_err().to_string();
        assert!(e.contains("1 MiB") && e.contains("has 0 MiB"), "{e}");
    }
}
