#![allow(clippy::unwrap_used)]
use super::*;

const LAYOUT: KvLayout = KvLayout { kv_heads: 2, head_dim: 64 };

/// Sequences `(prefix length, first own index, rows)`; equal prefix lengths are one prefix.
struct Case {
    sequences: Vec<SequenceView>,
    table: Vec<u32>,
    layout: KvLayout,
    heads: usize,
    attention: Attention,
}

impl Case {
    fn new(list: &[(usize, usize, usize)], layout: KvLayout, heads: usize, attention: Attention) -> Self {
        let (mut table, mut row, mut prefixes) = (Vec::new(), 0, HashMap::new());
        let mut sequences = Vec::new();
        for &(prefix_len, first, rows) in list {
            let mut pages = |len: usize| {
                let at = table.len();
                // Never in order, never twice.
                table.extend((0..len.div_ceil(PAGE)).map(|i| ((at + (i ^ 1)) * 3 * PAGE) as u32));
                at..table.len()
            };
            let prefix_pages = prefixes.entry(prefix_len).or_insert_with(|| pages(prefix_len)).clone();
            let own_pages = pages(first + rows);
            sequences.push(SequenceView { rows: row..row + rows, first, prefix_len, prefix_pages, own_pages });
            row += rows;
        }
        Case { sequences, table, layout, heads, attention }
    }

    fn step(&self) -> Step<'_> {
        let slots = (self.table.len() + 2) * 3 * PAGE;
        let Case { sequences, table, layout, heads, attention } = self;
        Step { sequences, table, slots, layout: *layout, heads: *heads, attention: *attention }
    }

    fn list(&self, split: Split, group: Group) -> WorkList {
        WorkList::new(&self.step(), Cut { split, group, scratch: 1 << 30 }).unwrap()
    }

    /// Every (row, head, slot) once, from the right slot; every partial result once; nothing too large. Returns the number of units.
    fn check(&self, split: Split, group: Group) -> usize {
        let list = self.list(split, group);
        let per_group = self.heads / self.layout.kv_heads;
        let at = |i: usize, width: usize, base: usize| &list.data[base + i * width..][..width];
        let mut seen: HashMap<(i32, i32), Vec<i32>> = HashMap::new();
        let (mut written, mut whole) = (HashMap::<i32, (i32, Vec<i32>)>::new(), HashMap::<i32, usize>::new());
        assert!(list.units.is_power_of_two() && list.data.len() == list.combine_at() + list.m * COMBINE);
        let there = |width: usize, base: usize, count: usize, number: usize| {
            let some = (0..number).filter(|i| at(*i, width, base)[count] > 0).count();
            assert!((some..number).all(|i| at(i, width, base).iter().all(|word| *word == 0)), "padding is nothing");
            some
        };
        let units = there(UNIT, 0, 1, list.units);
        for i in 0..units {
            let u = at(i, UNIT, 0);
            assert!((u[1] * u[3]) as usize <= capacity(self.layout.head_dim) && u[1] > 0 && u[3] > 0 && u[4] < u[5]);
            assert!((u[1] * u[3]) as usize <= list.vectors);
            for r in u[0]..u[0] + u[1] {
                let row = at(r as usize, ROW, list.rows_at());
                if u[17] == 0 {
                    *whole.entry(row[0]).or_default() += u[3] as usize;
                }
                for span in u[4]..u[5] {
                    let part = usize::from(span >= u[6]);
                    let start = (span - if part == 1 { u[6] } else { 0 }) * SPAN as i32;
                    let range = row[1 + part].max(start)..row[3 + part].min(start + SPAN as i32);
                    assert!(range.is_empty() || u[9 + part] <= range.start && range.end <= u[11 + part]);
                    for slot in u[13 + part].max(start)..u[15 + part].min(start + SPAN as i32) {
                        assert!(range.contains(&slot), "all rows are said to see {slot}");
                    }
                    let place =
                        |slot: i32| self.table[(u[7 + part] + slot / PAGE as i32) as usize] as i32 + slot % PAGE as i32;
                    for head in u[2]..u[2] + u[3] {
                        seen.entry((row[0], head)).or_default().extend(range.clone().map(place));
                    }
                    if u[17] == 1 && !range.is_empty() && u[2] == 0 {
                        written.entry(row[5] + span).or_insert((row[0], Vec::new())).1.push(span);
                    }
                }
            }
        }
        for s in &self.sequences {
            for row in s.rows.clone() {
                let position = s.prefix_len + s.first + row - s.rows.start;
                let end = if self.attention.causal { position + 1 } else { s.prefix_len + s.first + s.rows.len() };
                let start = self.attention.window.map_or(0, |w| (position + 1).saturating_sub(w));
                let place = |j: usize| {
                    let (pages, j) =
                        if j < s.prefix_len { (&s.prefix_pages, j) } else { (&s.own_pages, j - s.prefix_len) };
                    self.table[pages.start + j / PAGE] as i32 + (j % PAGE) as i32
                };
                let mut want: Vec<i32> = (start..end).map(place).collect();
                want.sort_unstable();
                for head in 0..per_group as i32 {
                    let mut got = seen.remove(&(row as i32, head)).unwrap();
                    got.sort_unstable();
                    assert_eq!(got, want, "row {row} head {head} {split:?} {group:?}");
                }
            }
        }
        assert!(seen.is_empty());
        let combined = there(COMBINE, list.combine_at(), 2, list.m);
        assert_eq!(combined > 0, list.combines);
        for i in 0..combined {
            let [row, first, count] = at(i, COMBINE, list.combine_at()).try_into().unwrap();
            assert!(count > 0 && !whole.contains_key(&row));
            let mut spans = (first..first + count).map(|p| {
                let (of, spans) = written.remove(&p).unwrap();
                assert_eq!((of, spans.len()), (row, 1));
                spans[0]
            });
            let start = spans.next().unwrap();
            assert!(spans.zip(start + 1..).all(|(span, want)| span == want), "spans are not in order");
        }
        assert!(written.is_empty() && combined + whole.len() == list.m);
        assert!(whole.values().all(|heads| *heads == per_group), "a row is written as often as it has heads");
        units
    }
}

fn attentions() -> [Attention; 4] {
    let plain = Attention { scale: 1.0, soft_cap: None, window: None, causal: true };
    [
        plain,
        Attention { causal: false, ..plain },
        Attention { window: Some(1), ..plain },
        Attention { window: Some(290), ..plain },
    ]
}

const CUTS: [Split; 4] = [Split::Auto { sms: 4 }, Split::Auto { sms: 132 }, Split::Always, Split::Never];

#[test]
fn every_row_head_and_slot_once() {
    let shapes = [(2, 64, 2), (1, 256, 8), (1, 256, 40), (1, 64, 71), (2, 128, 8)];
    for (kv_heads, head_dim, heads) in shapes {
        for attention in attentions() {
            let layout = KvLayout { kv_heads, head_dim };
            let first = |n| if attention.causal { n } else { 0 };
            // Many rows where that is cheap to check.
            let rows = if heads == 2 { 70 } else { 9 };
            let list =
                [(0, 0, 1), (300, 0, 3), (16, first(255), 2), (300, first(270), rows), (16, 0, 1), (300, first(3), 1)];
            let case = Case::new(&list, layout, heads, attention);
            for split in CUTS {
                for group in [Group::Always, Group::Never] {
                    case.check(split, group);
                }
            }
        }
    }
}

#[test]
fn a_prefix_is_read_once_for_a_group() {
    let case = Case::new(&[(512, 0, 1); 40], LAYOUT, 8, attentions()[0]);
    // 16 rows of 4 heads fill a unit; 2 spans of the prefix, 1 of each sequence.
    assert_eq!(case.check(Split::Always, Group::Always), 3 * 2 + 40);
    assert_eq!(case.check(Split::Always, Group::Never), 40 * 3);
    assert_eq!(case.check(Split::Never, Group::Always), 40);
}

#[test]
fn one_long_sequence_is_split_and_many_are_not() {
    let long = (0, 8000, 1);
    let one = Case::new(&[long], LAYOUT, 2, attentions()[0]);
    assert_eq!(one.check(Split::Auto { sms: 132 }, Group::Auto), 32);
    let many = Case::new(&[long; 200], LAYOUT, 2, attentions()[0]);
    assert_eq!(many.check(Split::Auto { sms: 132 }, Group::Auto), 200);
    let mut mixed = vec![(0, 40, 1); 300];
    mixed.push(long);
    let mixed = Case::new(&mixed, LAYOUT, 2, attentions()[0]);
    assert_eq!(mixed.check(Split::Auto { sms: 132 }, Group::Auto), 332);
}

#[test]
fn sharing_must_pay() {
    let group = |prefix, n| Case::new(&vec![(prefix, 3, 1); n], LAYOUT, 2, attentions()[0]);
    let cut = |case: &Case| case.list(Split::Auto { sms: 1 }, Group::Auto).combines;
    assert_eq!((cut(&group(64, 2)), cut(&group(2048, 64))), (false, true));
}

#[test]
fn scratch_is_bounded() {
    let case = Case::new(&[(512, 700, 1); 9], LAYOUT, 8, attentions()[0]);
    for scratch in [0, 5000, 30_000, 60_000, 200_000] {
        let list = WorkList::new(&case.step(), Cut { split: Split::Always, group: Group::Always, scratch }).unwrap();
        assert!(list.room * 8 * 66 * 4 <= scratch && (scratch > 5000) == list.combines, "{scratch}");
        let rows = list.data[list.combine_at()..].chunks_exact(COMBINE);
        assert!(rows.map(|r| r[1] + r[2]).all(|end| end as usize <= list.room), "{scratch}");
    }
}

#[test]
fn what_lies_outside_is_refused() {
    let case = || Case::new(&[(17, 2, 3), (40, 0, 2)], LAYOUT, 4, attentions()[0]);
    let cut = Cut { split: Split::Always, group: Group::Always, scratch: 1 << 20 };
    let error = |change: &dyn Fn(&mut Case)| {
        let mut case = case();
        change(&mut case);
        WorkList::new(&case.step(), cut).err().map(|e| e.to_string())
    };
    assert_eq!(error(&|_| {}), None);
    type Change = dyn Fn(&mut Case);
    let wrong: [(&Change, &str); 10] = [
        (&|c| c.heads = 3, "3 heads"),
        (&|c| c.layout.head_dim = 257, "257"),
        (&|c| c.layout.kv_heads = 0, "over 0"),
        (&|c| c.attention.window = Some(0), "window"),
        (&|c| c.sequences[1].rows = 4..6, "follow"),
        (&|c| c.sequences[0].prefix_len = 33, "lacks"),
        (&|c| c.sequences[1].first = 15, "lacks"),
        (&|c| c.sequences[1].own_pages = 900..901, "lacks"),
        (&|c| c.table[0] = u32::MAX, "outside"),
        (&|c| *c.table.last_mut().unwrap() = c.step().slots as u32 - 1, "outside"),
    ];
    for (change, word) in wrong {
        let message = error(change).unwrap();
        assert!(message.contains(word), "{message}");
    }
    // The last run may end with the last slot.
    assert_eq!(error(&|c| *c.table.last_mut().unwrap() = c.step().slots as u32 - 2), None);
}
