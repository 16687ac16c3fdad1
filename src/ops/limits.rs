//! What this machine's cores can do, measured: what the CPU ops are compared with.
use super::Pool;
use super::linear::{Buffer, Kind, bench_tile};
use std::hint::black_box;
use std::time::Instant;

/// Larger than any cache.
const READ_BYTES: usize = 512 << 20;
/// Times that each measurement is made; the best counts, so that a busy neighbour does not lower the bar.
const TRIES: usize = 5;

/// Bytes a second that all threads of `pool` read from memory together.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    // A product with one row reads its weights once and does little else; so does this sum, and it does even less.
    // In huge pages, as weights lie.
    let data = Buffer::zeroed(READ_BYTES / 4);
    let (data, chunk) = (data.as_slice(), 1 << 18);
    let best = (0..TRIES).map(|_| {
        let began = Instant::now();
        pool.for_each(data.len() / chunk, |i| {
            let mut sum = [0u32; 64];
            read(&data[i * chunk..(i + 1) * chunk], &mut sum);
            black_box(sum);
        });
        began.elapsed().as_secs_f64()
    });
    READ_BYTES as f64 / best.fold(f64::INFINITY, f64::min)
}

simd! {
    fn read(data: &[u32], sum: &mut [u32; 64]) {
        let mut own = *sum;
        for chunk in data.chunks_exact(64) {
            own.iter_mut().zip(chunk).for_each(|(s, x)| *s = s.wrapping_add(*x));
        }
        *sum = own;
    }
}

/// Multiplications and additions a second of all threads of `pool` with weights of `kind`, everything in the first cache.
pub fn peak(kind: Kind, pool: &Pool) -> f64 {
    let units = 64 * pool.threads();
    let best = (0..TRIES).map(|_| {
        let began = Instant::now();
        let done = std::sync::atomic::AtomicU64::new(0);
        pool.for_each(units, |_| {
            done.fetch_add(bench_tile(kind), std::sync::atomic::Ordering::Relaxed);
        });
        done.into_inner() as f64 / began.elapsed().as_secs_f64()
    });
    2.0 * best.fold(0.0, f64::max)
}
