//! The work list of a step: which rows run together.
use super::{KvLayout, PAGE, ROWS, SequenceView};
use candle_core::{Result, bail};
use std::collections::HashMap;
use std::ops::Range;

/// Sequences that run side by side.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Group {
    /// Those with one prefix: its first page and its length tell, as pages are never shared in part.
    Prefix(u32, usize),
    /// One without a prefix.
    Alone(usize),
}

/// The work list of one step; every layer uses the same.
pub struct Plan {
    pub(super) sequences: Vec<SequenceView>,
    pub(super) pages: Vec<u32>,
    /// What runs together for each KV head, the long ones first; ranges of `parts`.
    pub(super) units: Vec<Range<usize>>,
    /// A sequence and some of its rows.
    pub(super) parts: Vec<(usize, Range<usize>)>,
    pub(super) layout: KvLayout,
    pub(super) heads: usize,
}

impl Plan {
    /// `heads` query heads read `layout.kv_heads` KV heads, `heads / kv_heads` each.
    pub fn new(sequences: Vec<SequenceView>, pages: Vec<u32>, layout: KvLayout, heads: usize) -> Self {
        let mut groups: HashMap<Group, Vec<usize>> = HashMap::new();
        let mut order = Vec::new();
        for (i, s) in sequences.iter().enumerate() {
            let first = pages.get(s.prefix_pages.start).filter(|_| s.prefix_len > 0);
            let group = first.map_or(Group::Alone(i), |page| Group::Prefix(*page, s.prefix_len));
            let members = groups.entry(group).or_default();
            if members.is_empty() {
                order.push(group);
            }
            members.push(i);
        }
        let (mut units, mut parts) = (Vec::new(), Vec::new());
        for key in order {
            let (mut start, mut rows, mut cost) = (parts.len(), 0, 0);
            for i in groups.remove(&key).unwrap_or_default() {
                let s = &sequences[i];
                let mut from = s.rows.start;
                while from < s.rows.end {
                    let to = s.rows.end.min(from + ROWS - rows);
                    parts.push((i, from..to));
                    cost += (to - from) * (s.prefix_len + s.first + to - s.rows.start);
                    rows += to - from;
                    from = to;
                    if rows == ROWS {
                        units.push((cost, start..parts.len()));
                        (start, rows, cost) = (parts.len(), 0, 0);
                    }
                }
            }
            if rows > 0 {
                units.push((cost, start..parts.len()));
            }
        }
        units.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
        let units = units.into_iter().map(|(_, parts)| parts).collect();
        Plan { sequences, pages, units, parts, layout, heads }
    }

    /// Everything that the kernel indexes by.
    pub(super) fn check(&self, rows: usize, pages: usize) -> Result<()> {
        let mut next = 0;
        for s in &self.sequences {
            let own = s.first + s.rows.len();
            let table = |r: &Range<usize>| self.pages.get(r.clone()).map_or(0, <[u32]>::len) * PAGE;
            if s.rows.start != next || table(&s.prefix_pages) < s.prefix_len || table(&s.own_pages) < own {
                bail!("prefix_attention: {s:?} does not follow row {next} or lacks pages");
            }
            next = s.rows.end;
        }
        if next != rows || self.pages.iter().any(|p| *p as usize >= pages) {
            bail!("prefix_attention: {next} rows planned, {rows} given, {pages} pages");
        }
        Ok(())
    }
}
