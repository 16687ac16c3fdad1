//! The ops of a GPU, each alone with a cold L2, beside what the card can do and, where there is one, cuBLAS: all in one run, timed by
//! the card's own events. Shapes of a Llama 8B in bf16. `benches/peers/torch_ops.py` has torch do the same work.
//!
//! `cargo bench --features cuda --bench ops -- [device=cuda:0] [only=NAME,...] [--tries N]`. Prints one JSON object a line: `us`, what is
//! read and written at least and how much of the bandwidth that is, what is multiplied and how much of the peak. Attention is held against its
//! formula and against itself without groups, linear layers against cuBLAS: what differs ends the run.
#![allow(clippy::unwrap_used, missing_docs)]
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;
use prefixd::ops::activation::{Activation, Function};
use prefixd::ops::cross_entropy::cross_entropy;
use prefixd::ops::embed::{Embedding, RowSource, device::embed};
use prefixd::ops::gpu::{Buffer, DeviceRows, Gpu, Words};
use prefixd::ops::kv_write::device::{Projection, Slabs, project};
use prefixd::ops::linear::Linear;
use prefixd::ops::norm::Norm;
use prefixd::ops::prefix_attention::device::{DevicePlan, Group, Split, Step, attend};
use prefixd::ops::prefix_attention::{Attention, KvLayout, PAGE, SequenceView};
use prefixd::ops::rope::Frequencies;
use prefixd::ops::sample::Filter;
use prefixd::ops::sample::device::{Block, Choices, Penalties, Sampling};
use prefixd::ops::{Machine, Vector};
use std::ops::Range;
use std::sync::Arc;

const HIDDEN: usize = 4096;
const INNER: usize = 14336;
const VOCAB: usize = 128_256;
const HEADS: usize = 32;
const LAYOUT: KvLayout = KvLayout { kv_heads: 8, head_dim: 128 };
const OWN: usize = 128;

struct Bench {
    gpu: Gpu,
    machine: Arc<Machine>,
    /// Larger than any L2.
    flush: Tensor,
    only: Vec<String>,
    tries: usize,
    bandwidth: f64,
    peak: f64,
}

fn main() -> Result<()> {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let tries = given.iter().position(|a| a == "--tries").and_then(|i| given.get(i + 1)?.parse().ok()).unwrap_or(15);
    let value = |name: &str| given.iter().find_map(|g| g.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
    let index = value("device").and_then(|d| d.strip_prefix("cuda:")?.parse().ok()).unwrap_or(0);
    let gpu = match Gpu::cuda(index) {
        Ok(gpu) => gpu,
        Err(e) => {
            println!("nothing is measured without a GPU: {e}");
            return Ok(());
        }
    };
    let only = value("only").map_or(Vec::new(), |list| list.split(',').map(str::to_owned).collect());
    let machine = Machine::with_gpu(1, gpu.clone());
    let flush = Tensor::zeros((1 << 15, 1 << 13), DType::BF16, &gpu.device())?;
    let mut bench = Bench { gpu, machine, flush, only, tries, bandwidth: 0.0, peak: 0.0 };
    bench.measure_limits()?;
    bench.linear()?;
    bench.attention()?;
    bench.small()
}

impl Bench {
    fn normal(&self, rows: usize, columns: usize, scale: f64) -> Result<Tensor> {
        (Tensor::randn(0f32, 1.0, (rows, columns), &self.gpu.device())? * scale)?.to_dtype(DType::BF16)
    }

    /// Median seconds of `work`, each time with a cold L2: other memory is read before it. Written, it would lie in the L2 until it is written
    /// back, on the time of `work`. 512 MiB take long enough for all launches to be queued behind them.
    fn seconds(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut times = (0..self.tries)
            .map(|_| {
                drop(self.flush.sum(1)?);
                self.gpu.timed(&mut work)
            })
            .collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// A copy of 2 GiB, counted both ways, and a product of 8192^3 by cuBLAS.
    fn measure_limits(&mut self) -> Result<()> {
        let large = Tensor::zeros((1 << 10, 1 << 19), DType::F32, &self.gpu.device())?;
        let (a, b) = (self.normal(8192, 8192, 1.0)?, self.normal(8192, 8192, 1.0)?);
        self.bandwidth = (2u64 << 31) as f64 / self.seconds(|| large.copy().map(drop))?;
        self.peak = 2.0 * 8192f64.powi(3) / self.seconds(|| a.matmul(&b).map(drop))?;
        let (gbps, tflops) = (self.bandwidth / 1e9, self.peak / 1e12);
        println!("{}", serde_json::json!({"op": "limits", "gpu": self.gpu.name(), "gbps": gbps, "tflops": tflops}));
        Ok(())
    }

    /// Prints one line. `beside`: what somebody else takes for it.
    fn report(&self, op: &str, shape: &str, [bytes, flops]: [f64; 2], seconds: f64, beside: Option<(&str, f64)>) {
        let floor = (bytes / self.bandwidth).max(flops / self.peak);
        let round = |x: f64| (x * 1000.0).round() / 1000.0;
        let mut line = serde_json::json!({
            "op": op, "shape": shape, "us": round(seconds * 1e6), "gbps": round(bytes / seconds / 1e9),
            "tflops": round(flops / seconds / 1e12), "of_roofline": round(floor / seconds),
        });
        if let Some((name, other)) = beside {
            line[name] = round(other / seconds).into();
        }
        println!("{line}");
    }

    fn wants(&self, op: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| o == op)
    }

    fn linear(&self) -> Result<()> {
        if !self.wants("linear") {
            return Ok(());
        }
        let shapes = [
            ("qkv", HIDDEN + 2 * LAYOUT.kv_heads * LAYOUT.head_dim, HIDDEN),
            ("o", HIDDEN, HIDDEN),
            ("up", 2 * INNER, HIDDEN),
            ("down", HIDDEN, INNER),
            ("head", VOCAB, HIDDEN),
            ("qkv of Qwen2-0.5B", 1152, 896),
            ("o of Qwen2-0.5B", 896, 896),
            ("up of Qwen2-0.5B", 2 * 4864, 896),
            ("down of Qwen2-0.5B", 896, 4864),
        ];
        for (name, n, k) in shapes {
            let w = self.normal(n, k, 0.02)?;
            let layer = Linear::new(&[w.to_device(&Device::Cpu)?], &[None], &self.machine)?;
            for m in [1, 4, 8, 16, 32, 64, 512] {
                let x = self.normal(m, k, 1.0)?;
                let flat = |y: Tensor| Machine::to_host(&y)?.flatten_all()?.to_vec1::<f32>();
                let (y, want) = (flat(layer.forward(&x)?)?, flat(x.matmul(&w.t()?)?)?);
                let most = want.iter().fold(0f32, |most, y| most.max(y.abs()));
                // Both are sums in f32, rounded to bf16.
                if y.iter().zip(&want).any(|(a, b)| (a - b).abs().is_nan() || (a - b).abs() > most / 128.0) {
                    bail!("linear {name}, {m} rows: not what cuBLAS makes of it");
                }
                let own = self.seconds(|| layer.forward(&x).map(drop))?;
                let cublas = self.seconds(|| x.matmul(&w.t()?).map(drop))?;
                let work = [2.0 * (n * k + m * k + m * n) as f64, 2.0 * (m * n * k) as f64];
                self.report("linear", &format!("{name} {m} x {n} x {k}"), work, own, Some(("cublas_over_own", cublas)));
            }
        }
        Ok(())
    }

    /// Decoding of `sequences` over `adapters` with prefixes of `prefix`, `rows` rows each after `OWN` own ones.
    fn views(sequences: usize, adapters: usize, prefix: usize, rows: usize) -> (Vec<SequenceView>, Vec<u32>) {
        let (of_prefix, of_own) = (prefix.div_ceil(PAGE), (OWN + rows).div_ceil(PAGE));
        let mut table: Vec<u32> = (0..(adapters * of_prefix) as u32).collect();
        let views = (0..sequences).map(|s| {
            let (at, adapter) = (table.len(), s % adapters);
            table.extend((0..of_own).map(|i| (adapters * of_prefix + s * of_own + i) as u32));
            SequenceView {
                rows: s * rows..(s + 1) * rows,
                first: OWN,
                prefix_len: prefix,
                prefix_pages: adapter * of_prefix..(adapter + 1) * of_prefix,
                own_pages: at..table.len(),
            }
        });
        let views = views.collect();
        // Pages in no order, as a pool has them after a while.
        let pages = table.iter().max().map_or(1, |p| p + 1);
        let stride = (1..).map(|i| pages / 2 + i).find(|s| gcd(*s, pages) == 1).unwrap_or(1);
        (
            views,
            table.iter().map(|p| (u64::from(*p) * u64::from(stride) % u64::from(pages)) as u32 * PAGE as u32).collect(),
        )
    }

    fn attention(&self) -> Result<()> {
        if !self.wants("attention") {
            return Ok(());
        }
        let attention =
            Attention { scale: 1.0 / (LAYOUT.head_dim as f32).sqrt(), soft_cap: None, window: None, causal: true };
        let scratch = Arc::new(Buffer::poisoned(&self.gpu, 64 << 20)?);
        let width = LAYOUT.kv_heads * LAYOUT.head_dim;
        let decode = |n, adapters| [16, 64, 256, 1024].map(move |prefix| (n, adapters, prefix, 1));
        let prompts =
            [(1, 1, 0, 512), (8, 8, 64, 128), (1, 1, 0, 2048), (1, 1, 4096, 1), (8, 8, 4096, 1), (64, 64, 256, 1)];
        let cases = decode(64, 16).into_iter().chain(decode(64, 1)).chain(decode(1, 1)).chain(prompts);
        for (sequences, adapters, prefix, rows) in cases {
            let (views, table) = Self::views(sequences, adapters, prefix, rows);
            let slots = (table.iter().max().map_or(0, |s| *s as usize) + PAGE).max(PAGE);
            let slabs = Slabs::new(&self.gpu, DType::BF16, slots, LAYOUT)?;
            let noise: Vec<bf16> = (0..slots * width).map(|i| bf16::from_f32(noise(i))).collect();
            slabs.keys.write(0, &noise)?;
            slabs.values.write(0, &noise)?;
            let q = self.normal(sequences * rows, HEADS * LAYOUT.head_dim, 1.0)?;
            let step = Step { sequences: &views, table: &table, slots, layout: LAYOUT, heads: HEADS, attention };
            let run = |group| -> Result<(Vec<Vec<f32>>, f64)> {
                let split = Split::Auto { sms: self.gpu.multiprocessors() };
                let plan = Arc::new(DevicePlan::new(&self.gpu, &step, split, group, &scratch)?);
                let out = Machine::to_host(&attend(&self.gpu, &q, &slabs, &plan)?)?.to_vec2::<f32>()?;
                Ok((out, self.seconds(|| attend(&self.gpu, &q, &slabs, &plan).map(drop))?))
            };
            let ((out, auto), (apart, alone)) = (run(Group::Auto)?, run(Group::Never)?);
            if out != apart {
                bail!("attention of {sequences} x {rows}, prefix {prefix}: groups change bits");
            }
            self.check_attention(&q, &views, &table, &out)?;
            let seen = adapters.min(sequences) * prefix + sequences * (OWN + rows);
            let pairs = sequences * rows * prefix + sequences * (rows * OWN + rows * (rows + 1) / 2);
            let io = 4 * sequences * rows * HEADS * LAYOUT.head_dim;
            let work = [(4 * seen * width + io) as f64, 4.0 * (pairs * HEADS * LAYOUT.head_dim) as f64];
            let shape =
                format!("{sequences} sequences of {rows} rows, {adapters} adapters, prefix {prefix}, own {OWN}");
            self.report("attention", &shape, work, auto, Some(("ungrouped_over_own", alone)));
        }
        Ok(())
    }

    /// Some rows and heads against the formula in f64: what no test of small models launches is launched here.
    fn check_attention(&self, q: &Tensor, views: &[SequenceView], table: &[u32], out: &[Vec<f32>]) -> Result<()> {
        let (dim, group) = (LAYOUT.head_dim, HEADS / LAYOUT.kv_heads);
        let q = Machine::to_host(q)?.to_vec2::<f32>()?;
        let last = views.len() - 1;
        for (s, head) in [(0, 0), (last / 2, group), (last, HEADS - 1)] {
            let view = &views[s];
            for row in [view.rows.start, view.rows.end - 1] {
                let slot = |pages: &Range<usize>, p: usize| table[pages.start + p / PAGE] as usize + p % PAGE;
                let own = view.first + row - view.rows.start + 1;
                let slots = (0..view.prefix_len).map(|p| slot(&view.prefix_pages, p));
                let slots: Vec<usize> = slots.chain((0..own).map(|p| slot(&view.own_pages, p))).collect();
                let value = |slot: usize, d: usize| {
                    f64::from(bf16::from_f32(noise((slot * LAYOUT.kv_heads + head / group) * dim + d)).to_f32())
                };
                let q = &q[row][head * dim..(head + 1) * dim];
                let score = |slot: &usize| -> f64 {
                    let dot: f64 = q.iter().enumerate().map(|(d, q)| f64::from(*q) * value(*slot, d)).sum();
                    dot / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = slots.iter().map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let norm: f64 = weights.iter().sum();
                for d in 0..dim {
                    let want = slots.iter().zip(&weights).map(|(slot, w)| w * value(*slot, d)).sum::<f64>() / norm;
                    let got = f64::from(out[row][head * dim + d]);
                    // Values are within 1; weights and the result are rounded to bf16.
                    if (got - want).abs().is_nan() || (got - want).abs() > 1e-2 {
                        bail!("attention: row {row}, head {head}, element {d} is {got}, should be {want}");
                    }
                }
            }
        }
        Ok(())
    }

    fn small(&self) -> Result<()> {
        let vector = |n: usize| vec![1f32; n];
        let norm = Norm::rms(vector(HIDDEN), 1e-5, &self.machine)?;
        let silu = Activation::new(Function::Silu, true, &self.machine);
        let table = Linear::new(&[self.normal(VOCAB, HIDDEN, 1.0)?.to_device(&Device::Cpu)?], &[None], &self.machine)?;
        let embedding = Embedding { table: table.clone(), scale: 1.0, positions: None };
        let soft = self.machine.rows(&[], HIDDEN)?;
        let half = LAYOUT.head_dim / 2;
        let frequencies = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
        let rope = Frequencies { inv_freq: Vector::new(frequencies, &self.machine)?, scale: 1.0 };
        let projection = Projection { heads: HEADS, norm: None, rope: Some(Arc::new(rope)) };
        let kv = LAYOUT.kv_heads * LAYOUT.head_dim;
        for m in [1, 64, 512] {
            let x = self.normal(m, HIDDEN, 1.0)?;
            let bytes = |elements: usize| [2.0 * elements as f64, 0.0];
            if self.wants("norm") {
                let own = self.seconds(|| norm.forward(&x).map(drop))?;
                self.report("norm", &format!("{m} x {HIDDEN}"), bytes(2 * m * HIDDEN), own, None);
            }
            if self.wants("activation") {
                let x = self.normal(m, 2 * INNER, 1.0)?;
                let own = self.seconds(|| silu.forward(&x).map(drop))?;
                self.report("activation", &format!("{m} x {INNER}"), bytes(3 * m * INNER), own, None);
            }
            let ids: Vec<_> = (0..m as u32).map(|i| RowSource::Token(i * 7919 % VOCAB as u32)).collect();
            let positions: Vec<u32> = (0..m as u32).collect();
            let rows = Arc::new(DeviceRows::new(&self.gpu, &ids, &positions, &positions)?);
            if self.wants("embed") {
                let own = self.seconds(|| embed(&self.gpu, &embedding, &soft, &rows).map(drop))?;
                self.report("embed", &format!("{m} x {HIDDEN}"), bytes(2 * m * HIDDEN), own, None);
            }
            if self.wants("kv_write") {
                let slabs = Slabs::new(&self.gpu, DType::BF16, m.next_multiple_of(PAGE), LAYOUT)?;
                let qkv = self.normal(m, HIDDEN + 2 * kv, 1.0)?;
                let own = self.seconds(|| project(&self.gpu, &qkv, &rows, &slabs, &projection).map(drop))?;
                self.report(
                    "kv_write",
                    &format!("{m} x {}", HIDDEN + 2 * kv),
                    bytes(2 * m * (HIDDEN + 2 * kv)),
                    own,
                    None,
                );
            }
            if self.wants("sample") && m <= 64 {
                let logits = (Tensor::randn(0f32, 1.0, (m, VOCAB), &self.gpu.device())? * 3.0)?;
                let before = Arc::new(Buffer::poisoned(&self.gpu, 4 * m)?);
                let mut sampling = Sampling::new(&self.gpu, &before)?;
                for (name, temperature, top_k, top_p) in [
                    ("greedy", 0.0, 0, 1.0),
                    ("temperature", 1.0, 0, 1.0),
                    ("top-k 50, top-p 0.9", 1.0, 50, 0.9),
                    ("top-p 0.9", 1.0, 0, 0.9),
                ] {
                    let (filter, mut choices) = (Filter { temperature, top_k, top_p, min_p: 0.0 }, Choices::default());
                    (0..m).for_each(|row| choices.push(row, &filter, 0.37, &Penalties::NONE, [], &[]));
                    let mut words = Words::default();
                    let block = Block { rows: 0..m, choices, wanted: Vec::new() };
                    let plan = sampling.plan(&[block], &mut words)?;
                    let carried = words.carry(&self.gpu)?;
                    let own = self.seconds(|| sampling.choose(&plan, 0, &logits, &carried))?;
                    self.report("sample", &format!("{m} x {VOCAB}, {name}"), bytes(2 * m * VOCAB), own, None);
                }
            }
            if self.wants("cross_entropy") && m > 1 {
                let targets: Vec<u32> = (0..m as u32).collect();
                let own = self.seconds(|| cross_entropy(&x, &targets, &table, None, true).map(drop))?;
                let work = [2.0 * 2.0 * (VOCAB * HIDDEN) as f64, 4.0 * (m * VOCAB * HIDDEN) as f64];
                self.report("cross_entropy", &format!("{m} x {VOCAB}, gradient too"), work, own, None);
            }
        }
        Ok(())
    }
}

/// K and V by their place.
fn noise(i: usize) -> f32 {
    ((i * 40_503) & 1023) as f32 / 512.0 - 1.0
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
