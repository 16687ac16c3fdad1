//! The work lists against the definition: every pair that meets is in one item of each list, and in order.
use super::super::plan::{Item, Lists, PART};
use super::*;
use std::collections::HashMap;
use std::ops::Range;

/// Pairs (entry, key) that meet, by the definition.
fn pairs(plan: &PackedPlan, a: Attention) -> HashMap<(usize, usize), usize> {
    let group = plan.heads / plan.layout.kv_heads;
    let mut all = HashMap::new();
    for s in &plan.sequences {
        let keys: Vec<usize> = s.prefix.clone().chain(s.own.clone()).collect();
        for (i, row) in s.queries.clone().enumerate() {
            let position = s.prefix.len() + i;
            for (j, key) in keys.iter().enumerate() {
                if (!a.causal || j <= position) && a.window.is_none_or(|w| j + w > position) {
                    (0..group).for_each(|h| *all.entry((row * group + h, *key)).or_default() += 1);
                }
            }
        }
    }
    all
}

/// Those that a kernel would find, given whether the tile is of keys; and that each tile is in one item or in parts.
fn found(items: &[Item], a: Attention, group: usize, keys: bool) -> HashMap<(usize, usize), usize> {
    let mut all = HashMap::new();
    for item in items {
        for run in &item.runs {
            assert!(!run.range.is_empty());
            for (own, other) in item.tile.clone().flat_map(|own| run.range.clone().map(move |other| (own, other))) {
                let (entry, key) = if keys { (other, own) } else { (own, other) };
                let distance = (entry / group) as i64 - key as i64 + run.offset;
                if a.window.is_none_or(|w| distance < w as i64) && (!a.causal || distance >= 0) {
                    *all.entry((entry, key)).or_default() += 1;
                }
            }
        }
    }
    all
}

fn covers(tiles: impl Iterator<Item = Range<usize>>, end: usize) {
    let mut tiles: Vec<_> = tiles.collect();
    tiles.sort_by_key(|t| t.start);
    let mut next = 0;
    for tile in tiles {
        assert_eq!(tile.start, next);
        next = tile.end;
    }
    assert_eq!(next, end);
}

#[test]
fn every_pair_is_met_once() {
    let mut uneven = jobs();
    // Prefixes that overlap in part.
    uneven.push((3..9, 5));
    for (kv_heads, heads) in [(1, 1), (2, 4), (1, 7)] {
        let (plan, rows) = plan(&uneven, KvLayout { kv_heads, head_dim: 2 }, heads);
        let group = heads / kv_heads;
        for (name, attention) in attentions() {
            let want = pairs(&plan, attention);
            let keys = Lists::keys(&plan, attention, rows + 2, 16);
            assert_eq!(found(&keys.items, attention, group, true), want, "{name}, keys");
            covers(keys.items.iter().map(|i| i.tile.clone()), rows + 2);
            let queries = Lists::queries(&plan, attention, 16);
            assert_eq!(found(&queries.items, attention, group, false), want, "{name}, queries");
            covers(queries.items.iter().map(|i| i.tile.clone()), plan.sequences.last().unwrap().queries.end * group);
            assert!(keys.items.iter().chain(&queries.items).all(|i| i.tile.len() <= 16 && i.part.is_none()));
        }
    }
}

#[test]
fn long_lists_are_cut_in_order() {
    let jobs: Vec<_> = (0..5).map(|i| (0..20, 300 + i)).collect();
    let (plan, rows) = plan(&jobs, KvLayout { kv_heads: 1, head_dim: 2 }, 4);
    let lists = Lists::keys(&plan, PLAIN, rows, 16);
    assert_eq!(found(&lists.items, PLAIN, 4, true), pairs(&plan, PLAIN));
    // Two tiles of the prefix; own rows of one sequence stay below the limit.
    assert_eq!(lists.sums.iter().map(|s| s.0.clone()).collect::<Vec<_>>(), [0..16, 16..20]);
    assert_eq!(lists.parts(), 2 * (4 * 1510usize).div_ceil(PART));
    for (tile, parts) in &lists.sums {
        let mut entries = Vec::new();
        for part in parts.clone() {
            let item = lists.items.iter().find(|i| i.part == Some(part)).unwrap();
            assert_eq!(item.tile, *tile);
            assert!(item.runs.iter().map(|r| r.range.len()).sum::<usize>() <= PART);
            entries.extend(item.runs.iter().flat_map(|r| r.range.clone()));
        }
        assert!(entries.is_sorted() && entries.len() == 4 * 1510, "in the order of the sequences");
    }
    let sizes: Vec<usize> = lists.items.iter().map(|i| i.runs.iter().map(|r| r.range.len()).sum()).collect();
    assert!(sizes.is_sorted_by(|a, b| a >= b), "the long ones first");
}
