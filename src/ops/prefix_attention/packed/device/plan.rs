//! What each block of the backward kernels does: which keys a tile of queries meets, and which queries a tile of keys.
//!
//! Queries are counted in entries: query row times heads of a group plus head, so a sequence's entries are neighbours.
use super::super::super::Attention;
use super::super::PackedPlan;
use std::cmp::Reverse;
use std::ops::Range;

/// Entries in one part of a tile of keys. A prefix that a whole batch shares is a few tiles with very long lists: in parts it
/// keeps a whole GPU at work. A constant, so that sums do not depend on the device.
pub(super) const PART: usize = 2048;

/// Entries that meet the keys of a tile, or keys that meet its entries: key j and query row i are `i - j + offset` slots apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub range: Range<usize>,
    pub offset: i64,
}

/// A tile of a block, what it meets, and its place in the partial sums, if it is a part.
#[derive(Debug)]
pub(super) struct Item {
    pub tile: Range<usize>,
    pub runs: Vec<Run>,
    pub part: Option<usize>,
}

/// The work of one launch.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// The long ones first.
    pub items: Vec<Item>,
    /// Tiles whose parts are to be added, and their parts.
    pub sums: Vec<(Range<usize>, Range<usize>)>,
}

impl Lists {
    /// Tiles of up to `size` of the `rows` rows of K and V. A tile lies within or outside of each sequence's prefix, and of its
    /// own rows. Rows of nobody have a tile too, whose gradient is 0.
    pub(super) fn keys(plan: &PackedPlan, attention: Attention, rows: usize, size: usize) -> Self {
        let group = plan.heads / plan.layout.kv_heads;
        let ends = |r: &Range<usize>| [r.start, r.end];
        let mut cuts: Vec<usize> =
            plan.sequences.iter().flat_map(|s| [ends(&s.prefix), ends(&s.own)]).flatten().collect();
        cuts.extend([0, rows]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut lists = Lists::default();
        let mut parts = 0;
        for segment in cuts.windows(2) {
            let within = |r: &Range<usize>| r.start <= segment[0] && segment[1] <= r.end;
            let mut meets = Vec::new();
            for s in &plan.sequences {
                let (first, prefix) = (s.queries.start as i64, s.prefix.len() as i64);
                if within(&s.prefix) {
                    meets.push((&s.queries, prefix - first + s.prefix.start as i64));
                }
                // Own slots begin behind the prefix's, and its queries stand at them.
                if within(&s.own) {
                    meets.push((&s.queries, s.own.start as i64 - first));
                }
            }
            for start in (segment[0]..segment[1]).step_by(size) {
                let tile = start..segment[1].min(start + size);
                let (low, high) = (tile.start as i64, tile.end as i64 - 1);
                let runs = meets.iter().filter_map(|(queries, offset)| {
                    let from = if attention.causal { low - offset } else { 0 };
                    let to = attention.window.map_or(i64::MAX, |w| high - offset + as_i64(w));
                    let seen = clamp(queries, from, to);
                    let range = seen.start * group..seen.end * group;
                    (!range.is_empty()).then_some(Run { range, offset: *offset })
                });
                lists.add_keys(tile, runs.collect(), &mut parts);
            }
        }
        lists.sort();
        lists
    }

    fn add_keys(&mut self, tile: Range<usize>, runs: Vec<Run>, parts: &mut usize) {
        let total: usize = runs.iter().map(|r| r.range.len()).sum();
        if total <= PART {
            return self.items.push(Item { tile, runs, part: None });
        }
        let first = *parts;
        let (mut some, mut room) = (Vec::new(), PART);
        for Run { mut range, offset } in runs {
            while !range.is_empty() {
                let end = range.end.min(range.start + room);
                some.push(Run { range: range.start..end, offset });
                room -= end - range.start;
                range.start = end;
                if room == 0 {
                    let runs = std::mem::take(&mut some);
                    self.items.push(Item { tile: tile.clone(), runs, part: Some(*parts) });
                    (*parts, room) = (*parts + 1, PART);
                }
            }
        }
        if !some.is_empty() {
            self.items.push(Item { tile: tile.clone(), runs: some, part: Some(*parts) });
            *parts += 1;
        }
        self.sums.push((tile, first..*parts));
    }

    /// Tiles of up to `size` entries of one sequence: its prefix, then its own keys.
    pub(super) fn queries(plan: &PackedPlan, attention: Attention, size: usize) -> Self {
        let group = plan.heads / plan.layout.kv_heads;
        let mut lists = Lists::default();
        for s in &plan.sequences {
            let (first, prefix) = (s.queries.start as i64, s.prefix.len() as i64);
            let keys = [(&s.prefix, prefix - first + s.prefix.start as i64), (&s.own, s.own.start as i64 - first)];
            let end = s.queries.end * group;
            for start in (s.queries.start * group..end).step_by(size) {
                let tile = start..end.min(start + size);
                let (low, high) = ((tile.start / group) as i64, ((tile.end - 1) / group) as i64);
                let runs = keys.iter().filter_map(|(keys, offset)| {
                    let from = attention.window.map_or(0, |w| low + offset - as_i64(w) + 1);
                    let to = if attention.causal { high + offset + 1 } else { i64::MAX };
                    let range = clamp(keys, from, to);
                    (!range.is_empty()).then_some(Run { range, offset: *offset })
                });
                let runs = runs.collect();
                lists.items.push(Item { tile, runs, part: None });
            }
        }
        lists.sort();
        lists
    }

    /// A long list that starts last keeps one block at work alone. No sum depends on the order of items.
    fn sort(&mut self) {
        self.items.sort_by_key(|item| Reverse(item.runs.iter().map(|r| r.range.len()).sum::<usize>()));
    }

    /// Partial sums that there are.
    pub(super) fn parts(&self) -> usize {
        self.sums.last().map_or(0, |(_, parts)| parts.end)
    }

    /// As the kernels read them: `[items, 5]`, `[runs, 3]`, `[sums, 4]`.
    pub(super) fn encode(&self) -> candle_core::Result<[Vec<i32>; 3]> {
        let int = |v: i64| {
            i32::try_from(v).map_err(|_| candle_core::Error::Msg(format!("packed_attention: {v} rows times heads")))
        };
        let (mut items, mut runs, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for Item { tile, runs: own, part } in &self.items {
            let first = runs.len() / 3;
            for run in own {
                runs.extend([int(run.range.start as i64)?, int(run.range.end as i64)?, int(run.offset)?]);
            }
            let part = part.map_or(-1, |p| p as i64);
            for v in [tile.start as i64, tile.end as i64, first as i64, (runs.len() / 3) as i64, part] {
                items.push(int(v)?);
            }
        }
        for (tile, parts) in &self.sums {
            for v in [tile.start, tile.end, parts.start, parts.end] {
                sums.push(int(v as i64)?);
            }
        }
        Ok([items, runs, sums])
    }
}

fn as_i64(v: usize) -> i64 {
    // A window past every distance is none.
    i64::try_from(v).unwrap_or(i64::MAX).min(1 << 40)
}

/// What of `range` lies in `from..to`.
fn clamp(range: &Range<usize>, from: i64, to: i64) -> Range<usize> {
    let (start, end) = (range.start as i64, range.end as i64);
    let from = from.clamp(start, end);
    from as usize..to.clamp(from, end) as usize
}
