#![allow(clippy::unwrap_used)]
//! Against the CPU op on the same values, with unused slots poisoned, and bit for bit across ways to cut the work.
use super::super::{Plan, prefix_attention};
use super::*;
use crate::ops::Machine;
use crate::ops::kv_write::{Part, kv_write};
use candle_core::Device;
use half::{bf16, f16};

const PLAIN: Attention = Attention { scale: 0.3, soft_cap: None, window: None, causal: true };
/// Every way to cut: split, grouped.
const CUTS: [(Split, Group); 5] = [
    (Split::Never, Group::Never),
    (Split::Always, Group::Never),
    (Split::Always, Group::Always),
    (Split::Auto { sms: 1 }, Group::Always),
    (Split::Auto { sms: 132 }, Group::Auto),
];

fn noise(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 977 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32).collect()
}

fn rounded(values: Vec<f32>, dtype: DType) -> Vec<f32> {
    let n = values.len();
    let narrow = Tensor::from_vec(values, n, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    narrow.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn buffer(gpu: &Gpu, values: &[f32], dtype: DType) -> Arc<Buffer> {
    Arc::new(
        match dtype {
            DType::BF16 => Buffer::new(gpu, &values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>()),
            DType::F16 => Buffer::new(gpu, &values.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>()),
            _ => Buffer::new(gpu, values),
        }
        .unwrap(),
    )
}

/// Rounding of the result and of the weights; for f32 of sums in another order.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 4e-6,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

struct Sequence {
    /// Which prefix.
    prefix: usize,
    first: usize,
    rows: usize,
}

struct Case {
    dtype: DType,
    heads: usize,
    layout: KvLayout,
    /// Lengths.
    prefixes: Vec<usize>,
    sequences: Vec<Sequence>,
    attention: Attention,
    /// Elements of a row of q behind its heads.
    gap: usize,
}

/// K or V rows of prefixes and of sequences, by name: `[rows, kv_heads * head_dim]` each.
struct Data {
    prefix: Vec<[Vec<f32>; 2]>,
    own: Vec<[Vec<f32>; 2]>,
    q: Vec<Vec<f32>>,
}

impl Case {
    fn data(&self) -> Data {
        let width = self.layout.kv_heads * self.layout.head_dim;
        let mut seed = 0;
        let mut rows = |n: usize, width: usize| {
            seed += 1;
            rounded(noise(seed, n * width), self.dtype)
        };
        let pair = |n: usize, rows: &mut dyn FnMut(usize, usize) -> Vec<f32>| [rows(n, width), rows(n, width)];
        Data {
            prefix: self.prefixes.iter().map(|n| pair(*n, &mut rows)).collect(),
            own: self.sequences.iter().map(|s| pair(s.first + s.rows, &mut rows)).collect(),
            q: self.sequences.iter().map(|s| rows(s.rows, self.heads * self.layout.head_dim + self.gap)).collect(),
        }
    }

    /// Pages in a scattered order: views of `which` sequences, table of pages, number of pages, and where each K and V row goes.
    fn pages(&self, which: &[usize]) -> (Vec<SequenceView>, Vec<u32>, usize) {
        let count = |n: usize| n.div_ceil(PAGE);
        let own = which.iter().map(|i| count(self.sequences[*i].first + self.sequences[*i].rows));
        let total = self.prefixes.iter().map(|n| count(*n)).sum::<usize>() + own.sum::<usize>() + 3;
        let step =
            (2..).find(|step| total % step != 0 && (2..=*step).all(|d| step % d != 0 || total % d != 0)).unwrap();
        let mut table: Vec<u32> = (0..total - 3).map(|i| ((i * step + 1) % total) as u32).collect();
        let mut next = 0;
        let mut take = |n: usize| {
            next += count(n);
            next - count(n)..next
        };
        let prefixes: Vec<_> = self.prefixes.iter().map(|n| take(*n)).collect();
        let mut row = 0;
        let view = |i: &usize| {
            let s = &self.sequences[*i];
            row += s.rows;
            SequenceView {
                rows: row - s.rows..row,
                first: s.first,
                prefix_len: self.prefixes[s.prefix],
                prefix_pages: prefixes[s.prefix].clone(),
                own_pages: take(s.first + s.rows),
            }
        };
        let views = which.iter().map(view).collect();
        table.truncate(next);
        (views, table, total)
    }

    /// Calls `put(slot, part, row)` for each row of K (0) and V (1).
    fn fill(
        &self,
        data: &Data,
        which: &[usize],
        views: &[SequenceView],
        table: &[u32],
        mut put: impl FnMut(&[u32], usize, &[f32]),
    ) {
        let slots = |pages: &Range<usize>, n: usize| -> Vec<u32> {
            (0..n).map(|i| table[pages.start + i / PAGE] * PAGE as u32 + (i % PAGE) as u32).collect()
        };
        for (i, view) in which.iter().zip(views) {
            let s = &self.sequences[*i];
            for part in 0..2 {
                put(&slots(&view.prefix_pages, view.prefix_len), part, &data.prefix[s.prefix][part]);
                put(&slots(&view.own_pages, s.first + s.rows), part, &data.own[*i][part]);
            }
        }
    }

    fn q(&self, data: &Data, which: &[usize]) -> Tensor {
        let width = self.heads * self.layout.head_dim + self.gap;
        let rows: Vec<f32> = which.iter().flat_map(|i| data.q[*i].clone()).collect();
        Tensor::from_vec(rows.clone(), (rows.len() / width, width), &Device::Cpu).unwrap()
    }

    fn on_cpu(&self, data: &Data, which: &[usize]) -> Vec<f32> {
        let (views, table, total) = self.pages(which);
        let KvLayout { kv_heads, head_dim } = self.layout;
        let slab = |shape: (usize, usize, usize, usize)| Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap();
        let slabs = [slab((total, kv_heads, head_dim, PAGE)), slab((total, kv_heads, PAGE, head_dim))];
        self.fill(data, which, &views, &table, |slots, part, rows| {
            if slots.is_empty() {
                return;
            }
            let rows = Tensor::from_slice(rows, (slots.len(), kv_heads * head_dim), &Device::Cpu).unwrap();
            let name = [Part::Key, Part::Value][part];
            kv_write(&slabs[part], &rows, name, self.layout, &slots.into(), 0).unwrap();
        });
        let plan = Arc::new(Plan::new(views, table, self.layout, self.heads));
        let [keys, values] = &slabs;
        let out = prefix_attention(&self.q(data, which), keys, values, &plan, self.attention, &Machine::new(1));
        out.unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn on_gpu(&self, data: &Data, which: &[usize], (split, group): (Split, Group), order: u32) -> Vec<f32> {
        let gpu = Gpu::emulated(order);
        let (views, table, total) = self.pages(which);
        let width = self.layout.kv_heads * self.layout.head_dim;
        let slots = total * PAGE;
        let mut slabs = [vec![f32::NAN; slots * width], vec![f32::NAN; slots * width]];
        self.fill(data, which, &views, &table, |slots, part, rows| {
            for (slot, row) in slots.iter().zip(rows.chunks_exact(width)) {
                slabs[part][*slot as usize * width..][..width].copy_from_slice(row);
            }
        });
        let [keys, values] = slabs.map(|slab| buffer(&gpu, &slab, self.dtype));
        let slabs = Slabs { keys, values, dtype: self.dtype, slots, layout: self.layout };
        let first_slots: Vec<u32> = table.iter().map(|page| page * PAGE as u32).collect();
        let scratch = Arc::new(Buffer::poisoned(&gpu, 1 << 24).unwrap());
        let plan = DevicePlan::new(&gpu, &self.step(&views, &first_slots, slots), split, group, &scratch).unwrap();
        let q = self.q(data, which).to_dtype(self.dtype).unwrap();
        let out = attend(&gpu, &q, &slabs, &Arc::new(plan)).unwrap();
        out.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn step<'a>(&self, sequences: &'a [SequenceView], table: &'a [u32], slots: usize) -> Step<'a> {
        let Case { layout, heads, attention, .. } = *self;
        Step { sequences, table, slots, layout, heads, attention }
    }

    /// All of it: values, cuts, orders of threads, and each sequence alone.
    fn check(&self, name: &str) {
        let (data, all) = (self.data(), (0..self.sequences.len()).collect::<Vec<_>>());
        let want = self.on_cpu(&data, &all);
        let first = self.on_gpu(&data, &all, CUTS[0], 0);
        assert_eq!(first.len(), want.len());
        for (i, (got, want)) in first.iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= tolerance(self.dtype), "{name} [{i}]: {got}, the CPU has {want}");
        }
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for (i, cut) in CUTS.into_iter().enumerate().skip(1) {
            let order = [0, 1, 20_261][i % 3];
            assert_eq!(bits(&first), bits(&self.on_gpu(&data, &all, cut, order)), "{name}: {cut:?}, order {order}");
        }
        assert_eq!(bits(&first), bits(&self.on_gpu(&data, &all, CUTS[0], 7)), "{name}: order");
        let (width, mut row) = (self.heads * self.layout.head_dim, 0);
        for i in all {
            let rows = self.sequences[i].rows;
            let alone = self.on_gpu(&data, &[i], CUTS[i % CUTS.len()], 1);
            assert_eq!(bits(&first[row * width..(row + rows) * width]), bits(&alone), "{name}: sequence {i} alone");
            row += rows;
        }
    }
}

/// xorshift: the same cases at each run.
struct Random(u64);

impl Random {
    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        from[(self.0 >> 20) as usize % from.len()].clone()
    }
}

#[test]
fn a_grid_of_cases_agrees_with_the_cpu() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    // Dims in turn, so that each is met in each type.
    let dims = [64, 128, 96, 32, 80, 256, 8, 40];
    for i in 0..36 {
        let dtype = [DType::BF16, DType::F32, DType::F16][i % 3];
        let head_dim = if dtype == DType::F32 { random.pick(&[6, 16, 64, 80, 256, 33]) } else { dims[i / 3 % 8] };
        let (ratio, kv_heads) = (random.pick(&[1, 2, 7, 8]), random.pick(&[1, 2]));
        let mut attention = PLAIN;
        match i % 5 {
            1 => attention.window = Some(random.pick(&[1, 3, 17, 100, 256, 270])),
            2 => attention.soft_cap = Some(0.7),
            3 => attention.causal = false,
            _ => {}
        }
        let lengths = [0, 1, 15, 16, 17, 255, 256, 300];
        let prefixes: Vec<usize> = vec![lengths[i % 8], random.pick(&lengths)];
        let sequence = |_| {
            let first = if attention.causal { random.pick(&[0, 0, 1, 14, 16, 63, 250, 257]) } else { 0 };
            Sequence { prefix: random.pick(&[0, 0, 1]), first, rows: random.pick(&[1, 1, 1, 2, 5, 20]) }
        };
        let sequences = (0..2 + i % 4).map(sequence).collect();
        let gap = if dtype == DType::F32 { 3 } else { 8 * (i % 2) };
        let layout = KvLayout { kv_heads, head_dim };
        let case = Case { dtype, heads: ratio * kv_heads, layout, prefixes, sequences, attention, gap };
        case.check(&format!("case {i}, {dtype:?}, {head_dim}, {ratio} heads"));
    }
}

/// Every variant of the kernel, with full tiles and with one row.
#[test]
fn every_variant() {
    for dtype in [DType::BF16, DType::F16] {
        for (head_dim, rows) in [(32, 66), (64, 1), (64, 65), (96, 3), (96, 34), (128, 2), (128, 37), (256, 19)] {
            let sequences = vec![
                Sequence { prefix: 0, first: 0, rows },
                Sequence { prefix: 0, first: 30, rows: 1 },
                Sequence { prefix: 0, first: 0, rows: 1 },
            ];
            let layout = KvLayout { kv_heads: 1, head_dim };
            let prefixes = vec![70];
            let case = Case { dtype, heads: 1, layout, prefixes, sequences, attention: PLAIN, gap: 0 };
            case.check(&format!("{head_dim} x {rows} {dtype:?}"));
        }
    }
}

/// More heads over one KV head than a unit has vectors.
#[test]
fn many_heads() {
    let sequences = vec![Sequence { prefix: 0, first: 3, rows: 2 }, Sequence { prefix: 0, first: 0, rows: 1 }];
    let layout = KvLayout { kv_heads: 1, head_dim: 256 };
    let case = Case { dtype: DType::BF16, heads: 20, layout, prefixes: vec![20], sequences, attention: PLAIN, gap: 0 };
    case.check("20 heads");
}

/// Packed rows: runs start anywhere, the last one ends with the last row, and the sums come along.
#[test]
fn packed_rows() {
    for (dtype, head_dim) in [(DType::F32, 24), (DType::BF16, 64), (DType::F16, 80)] {
        for attention in [PLAIN, Attention { window: Some(9), ..PLAIN }, Attention { causal: false, ..PLAIN }] {
            let layout = KvLayout { kv_heads: 2, head_dim };
            let (heads, mut q, mut own, mut sequences) = (4, 0, 24, Vec::new());
            for (prefix, n) in [(0..5, 3), (0..5, 18), (5..24, 4), (24..24, 6)] {
                sequences.push(PackedSequence { queries: q..q + n, prefix, own: own..own + n });
                (q, own) = (q + n, own + n);
            }
            let packed = Arc::new(PackedPlan { sequences, layout, heads });
            let tensor = |seed, rows: usize, heads: usize| {
                let values = rounded(noise(seed, rows * heads * head_dim), dtype);
                Tensor::from_vec(values, (rows, heads * head_dim), &Device::Cpu).unwrap()
            };
            let (q, k, v) = (tensor(1, q, heads), tensor(2, own, 2), tensor(3, own, 2));
            let rows = |t: &Tensor, from: usize, to: usize| t.narrow(0, from, to - from).unwrap();
            let stored = Tensor::cat(&[rows(&k, 0, 24), rows(&v, 0, 24)], 1).unwrap();
            let qkv = Tensor::cat(&[q.clone(), rows(&k, 24, own), rows(&v, 24, own)], 1).unwrap();
            let machine = Machine::new(1);
            let want = super::super::packed_attention(&qkv, Some(&stored), &packed, attention, &machine).unwrap();
            let (want, m) = (want.flatten_all().unwrap().to_vec1::<f32>().unwrap(), q.dim(0).unwrap());
            let (views, table) = packed_views(&packed);
            let mut all: Option<(Vec<u32>, Vec<f32>)> = None;
            for (i, (split, group)) in CUTS.into_iter().enumerate() {
                let gpu = Gpu::emulated(i as u32);
                let step = Step { sequences: &views, table: &table, slots: own, layout, heads, attention };
                let scratch = Arc::new(Buffer::poisoned(&gpu, 1 << 20).unwrap());
                let plan = Arc::new(DevicePlan::new(&gpu, &step, split, group, &scratch).unwrap());
                let lse = Arc::new(Buffer::poisoned(&gpu, m * heads * 4).unwrap());
                let op = OverRows { plan, lse: Some(lse.clone()) };
                let [q, k, v] = [&q, &k, &v].map(|t| t.to_dtype(dtype).unwrap());
                let out = gpu.apply3(op, &q, &k, &v).unwrap().to_dtype(DType::F32).unwrap();
                let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
                for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                    assert!((got - want).abs() <= tolerance(dtype), "{dtype:?} {attention:?} [{i}]: {got}, {want}");
                }
                let lse = lse.read::<f32>(0, m * heads).unwrap();
                check_sums(&packed, attention, &q, &k, &lse);
                let bits = out.iter().map(|x| x.to_bits()).collect();
                let (first, sums) = all.get_or_insert((bits, lse.clone()));
                assert_eq!(*first, out.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                assert_eq!(*sums, lse);
            }
        }
    }
}

/// `lse` is the logarithm of the sum of exponentials, straight from the formula.
fn check_sums(plan: &PackedPlan, a: Attention, q: &Tensor, k: &Tensor, lse: &[f32]) {
    let rows = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    let (q, k, dim) = (rows(q), rows(k), plan.layout.head_dim);
    for s in &plan.sequences {
        let keys: Vec<usize> = s.prefix.clone().chain(s.own.clone()).collect();
        for (i, row) in s.queries.clone().enumerate() {
            let position = s.prefix.len() + i;
            for head in 0..plan.heads {
                let kv_head = head / (plan.heads / plan.layout.kv_heads);
                let mut sum = 0.0;
                for (j, key) in keys.iter().enumerate() {
                    let (q, k) = (&q[row][head * dim..][..dim], &k[*key][kv_head * dim..][..dim]);
                    let product: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    if (!a.causal || j <= position) && a.window.is_none_or(|w| j + w > position) {
                        sum += (product * f64::from(a.scale)).exp();
                    }
                }
                let got = f64::from(lse[row * plan.heads + head]);
                assert!((got - sum.ln()).abs() < 1e-5 * sum.ln().abs().max(1.0), "{got} {}", sum.ln());
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let gpu = Gpu::emulated(0);
    let scratch = Arc::new(Buffer::poisoned(&gpu, 1 << 16).unwrap());
    let sequence = SequenceView { rows: 0..2, first: 0, prefix_len: 0, prefix_pages: 0..0, own_pages: 0..1 };
    let run = |head_dim: usize, dtype: DType, rows: usize, stride: usize, other: DType| {
        let layout = KvLayout { kv_heads: 1, head_dim };
        let step = Step {
            sequences: std::slice::from_ref(&sequence),
            table: &[0],
            slots: 16,
            layout,
            heads: 2,
            attention: PLAIN,
        };
        let plan = DevicePlan::new(&gpu, &step, Split::Never, Group::Never, &scratch)?;
        let slabs = Slabs::new(&gpu, other, 16, layout)?;
        let q = Tensor::zeros((rows, stride), dtype, &Device::Cpu)?;
        attend(&gpu, &q, &slabs, &Arc::new(plan)).map(|_| ())
    };
    assert!(run(8, DType::BF16, 2, 16, DType::BF16).is_ok());
    let wrong = [
        (run(6, DType::BF16, 2, 16, DType::BF16), "multiples of 8"),
        (run(8, DType::BF16, 3, 16, DType::BF16), "[3, 16]"),
        (run(8, DType::BF16, 2, 8, DType::BF16), "[2, 8]"),
        (run(8, DType::BF16, 2, 17, DType::BF16), "[2, 17]"),
        (run(8, DType::F32, 2, 16, DType::BF16), "F32"),
    ];
    for (result, word) in wrong {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
}
