use super::*;
use crate::adapter::{Generation, Piece};

fn soft(n: i64) -> Folder {
    Folder::new().config("PROMPT_TUNING", n).prompt(n as usize, 8)
}

fn kv(name: &str) -> Folder {
    Folder::new().config(name, 2).prompt(2, 32)
}

#[test]
fn text_before_the_virtual_tokens_takes_the_special_tokens() {
    let card = "prefix_before = 'good'\nprefix = 'review'\ncontrol_tokens = ['<json>']";
    let loaded = soft(2).file(CARD_FILE, card).load().unwrap();
    let prefix = loaded.prefix.unwrap();
    // <s> good, two virtual tokens, review <json>.
    let expected = [tokens(&[1, 2]), [0, 1].map(InputRow::Soft).to_vec(), tokens(&[5, 4])].concat();
    assert_eq!(prefix.rows, expected);
    assert!(!loaded.card.adds_special_tokens(loaded.method));
    let loaded = soft(2).file(CARD_FILE, "prefix_before = 'good'\nadd_special_tokens = true").load().unwrap();
    assert!(loaded.card.adds_special_tokens(loaded.method));
    soft(9)
        .file(CARD_FILE, format!("prefix_before = '{}'", "good ".repeat(6)))
        .refused(Kind::FailedPrecondition, &["16 positions (9 virtual tokens, 7 of text)"]);
}

#[test]
fn what_stored_rows_cannot_have_is_refused() {
    for name in ["PREFIX_TUNING", "CARTRIDGE"] {
        kv(name)
            .file(CARD_FILE, "prefix_before = 'good'")
            .refused(Kind::FailedPrecondition, &["`prefix_before`", name, "nothing can be computed before"]);
        kv(name)
            .file(CARD_FILE, "template = '{{ input }}{{ virtual }}'")
            .refused(Kind::FailedPrecondition, &["`template`", "{{ virtual }}", name, "never among a request's rows"]);
    }
    for card in ["prefix_before = 'good'", "template = '{{ virtual }}{{ input }}'"] {
        Folder::new().file(CARD_FILE, card).refused(Kind::InvalidArgument, &["task.toml: ", "there are none"]);
    }
}

#[test]
fn a_template_that_places_virtual_tokens_takes_them_out_of_the_prefix() {
    let loaded = soft(3).file(CARD_FILE, "template = '{{ input }} {{ virtual }}'").load().unwrap();
    assert!(loaded.prefix.is_none());
    let own = loaded.soft.unwrap();
    assert_eq!((own.len, &own.rows[..]), (3, counting(24).as_slice()));
    assert_eq!(loaded.card.render("x").unwrap()[1], Piece::Virtual(0..3));

    // Prefix text stands first then, and begins as a text-only prefix does.
    let card = "prefix = 'good'\nvirtual_token_splits = [1, 2]\n\
                template = '{{ virtual_0 }}{{ input }}{{ virtual_1 }}'";
    let loaded = soft(3).file(CARD_FILE, card).load().unwrap();
    assert_eq!(loaded.prefix.unwrap().rows, tokens(&[1, 2]));
    assert_eq!(loaded.soft.unwrap().digest, own.digest);
    assert!(!loaded.card.adds_special_tokens(loaded.method));
    soft(4).file(CARD_FILE, card).refused(Kind::InvalidArgument, &["[1, 2] sums to 3, `num_virtual_tokens` is 4"]);
}

#[test]
fn on_an_encoder_virtual_tokens_stand_before_the_text() {
    let loaded = soft(3).load_encoder().unwrap();
    assert!(loaded.prefix.is_none());
    assert_eq!(loaded.soft.unwrap().len, 3);
    let loaded = kv("PREFIX_TUNING").load_encoder().unwrap();
    assert!(loaded.soft.is_none());
    assert_eq!(loaded.prefix.unwrap().kv_len(), 2);
    let card = |text: &str| Folder::new().file(CARD_FILE, text);
    assert!(card("template = 'is it {{ input }}?'").load_encoder().unwrap().prefix.is_none());
    for (folder, key) in [
        (card("prefix = 'good'"), "`prefix`"),
        (card("control_tokens = ['<json>']"), "`control_tokens`"),
        (soft(1).file(CARD_FILE, "prefix_before = 'good'"), "`prefix_before`"),
        (kv("CARTRIDGE").file(CARD_FILE, "prefix = 'good'"), "`prefix`"),
    ] {
        folder.refused_by_encoder(Kind::FailedPrecondition, &[key, "is an encoder", "put it in the `template`"]);
    }
}

fn multitask() -> Folder {
    Folder::new().config("MULTITASK_PROMPT_TUNING", 1).weights(&[
        ("prompt_embeddings", &[1, 8], vec![1.0; 8]),
        ("prefix_task_cols", &[3, 1, 1], vec![2.0, 3.0, 4.0]),
        ("prefix_task_rows", &[3, 1, 8], vec![1.0; 24]),
    ])
}

#[test]
fn a_request_chooses_the_task() {
    let id = AdapterId::parse("m").unwrap();
    let adapter = multitask().file(CARD_FILE, "task_id = 1").load().unwrap().into_adapter(id.clone(), Generation(1));
    let first = |task| adapter.prefix_of(task).unwrap().unwrap().soft[0];
    assert_eq!([None, Some(0), Some(1), Some(2)].map(first), [3.0, 2.0, 3.0, 4.0]);
    let own = adapter.prefix.clone().unwrap();
    assert!(Arc::ptr_eq(&own, &adapter.prefix_of(Some(1)).unwrap().unwrap()), "composed when it was loaded");
    let e = adapter.prefix_of(Some(3)).unwrap_err();
    says(e, Kind::InvalidArgument, &["`task_id` is 3, the adapter has 3 tasks, counted from 0"]);

    // Tasks also choose among virtual tokens in a template.
    let card = "template = '{{ input }}{{ virtual }}'\nprefix = 'good'";
    let adapter = multitask().file(CARD_FILE, card).load().unwrap().into_adapter(id.clone(), Generation(1));
    let placed = adapter.placed(Some(2)).unwrap();
    assert_eq!((placed.soft.unwrap().rows[0], placed.prefix.unwrap().rows.len()), (4.0, 2));

    let adapter = soft(1).load().unwrap().into_adapter(id, Generation(1));
    let e = adapter.prefix_of(Some(0)).unwrap_err();
    says(e, Kind::InvalidArgument, &["`task_id` is 0, but adapter `m` (PROMPT_TUNING) has no tasks"]);
}
