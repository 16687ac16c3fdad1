#![allow(clippy::unwrap_used)]
use super::*;

const FULL: &str = r#"
description = "sentiment of a review"
prefix = "Reviews and their sentiment.\n"
template = "{{ input }}\n=>"
add_special_tokens = false
labels = ["positive", "negative"]
verbalizers = [" positive", " negative"]
task_id = 2
control_tokens = ["<json>"]
[stopping]
stop_sequences = ["\n"]
max_new_tokens = 48
[sampling]
temperature = 0.5
top_k = 40
top_p = 0.9
min_p = 0.05
repetition_penalty = 1.1
"#;

#[test]
fn every_key_is_read() {
    let card = TaskCard::parse(FULL).unwrap();
    assert_eq!(card.description, "sentiment of a review");
    assert_eq!(card.render("good").unwrap(), [Piece::Text("good\n=>".into())]);
    assert_eq!(card.labels, ["positive", "negative"]);
    assert_eq!(card.verbalizers(), [" positive", " negative"]);
    assert_eq!((card.task_id, &card.control_tokens[..]), (2, &["<json>".to_owned()][..]));
    assert_eq!(card.stopping().stop_sequences, ["\n"]);
    assert_eq!(card.stopping().max_new_tokens, Some(48));
    let s = card.sampling();
    assert_eq!((s.temperature, s.top_k, s.top_p), (Some(0.5), Some(40), Some(0.9)));
    assert_eq!((s.min_p, s.repetition_penalty), (Some(0.05), Some(1.1)));
}

#[test]
fn nothing_is_required() {
    let card = TaskCard::parse("").unwrap();
    let text = |text: &str| vec![Piece::Text(text.into())];
    assert_eq!(card.render("as {{ it }} is").unwrap(), text("as {{ it }} is"));
    assert!(card.verbalizers().is_empty() && !card.has_prefix_text());
    assert_eq!(TaskCard::parse("labels = ['a']").unwrap().verbalizers(), ["a"]);
    assert_eq!(TaskCard::default().render("x").unwrap(), text("x"));
}

#[test]
fn special_tokens_follow_prefix_text_and_method() {
    let adds = |text: &str, method| TaskCard::parse(text).unwrap().adds_special_tokens(method);
    assert!(adds("", Method::Text));
    assert!(!adds("prefix = 'a'", Method::Text));
    assert!(!adds("control_tokens = ['a']", Method::Text));
    assert!(adds("prefix = 'a'", Method::PromptTuning));
    assert!(!adds("add_special_tokens = false", Method::PrefixTuning));
    assert!(adds("prefix = 'a'\nadd_special_tokens = true", Method::Text));
    assert!(!adds("prefix_before = 'a'", Method::PromptTuning));
    assert!(adds("prefix_before = ''", Method::PromptTuning));
    assert!(!adds("prefix = 'a'\ntemplate = 'x{{ virtual }}'", Method::PTuning));
    assert!(adds("template = 'x{{ virtual }}'", Method::PTuning));
}

#[test]
fn virtual_tokens_stand_where_the_template_says() {
    let mut card = TaskCard::parse("template = '{{ input }} {{ virtual }}.'").unwrap();
    card.bind(7).unwrap();
    let text = |text: &str| Piece::Text(text.into());
    assert_eq!(card.render("x").unwrap(), [text("x "), Piece::Virtual(0..7), text(".")]);
    let card = "virtual_token_splits = [3, 1, 2]\n\
                template = '{{ virtual_1 }}{{ virtual_0 }}{{ input }}{{ virtual_2 }}'";
    let mut card = TaskCard::parse(card).unwrap();
    let e = card.bind(7).unwrap_err().to_string();
    assert!(e.contains("`virtual_token_splits` [3, 1, 2] sums to 6, `num_virtual_tokens` is 7"), "{e}");
    card.bind(6).unwrap();
    let [a, b, c] = [3..4, 0..3, 4..6].map(Piece::Virtual);
    assert_eq!(card.render("x").unwrap(), [a, b, text("x"), c]);
}

#[test]
fn refusals_name_the_key_and_the_rule() {
    let cases = [
        ("descripton = 'x'", "line 1 (`descripton = 'x'`): unknown field `descripton`"),
        ("\n[stopping]\nmax_new_tokens = 'x'", "line 3 (`max_new_tokens = 'x'`)"),
        ("[stopping]\nmax_new_tokens = -1", "line 2"),
        ("[stopping]\nmax_new_tokens = 0", "`stopping.max_new_tokens` is 0"),
        ("[stopping]\nstop_sequences = ['']", "`stopping.stop_sequences[0]` has 0 bytes"),
        ("[sampling]\ntemperature = nan", "`sampling.temperature` is NaN, must be 0 to 100"),
        ("[sampling]\ntop_p = 0.0", "`sampling.top_p` is 0,"),
        ("[sampling]\nmin_p = 1.5", "`sampling.min_p` is 1.5,"),
        ("[sampling]\nrepetition_penalty = inf", "`sampling.repetition_penalty` is inf"),
        ("labels = ['a', 'a']", "`labels[1]` is \"a\" once more"),
        ("labels = ['a']\nverbalizers = ['b', 'c']", "`verbalizers` has 2 entries, `labels` has 1"),
        ("control_tokens = ['']", "`control_tokens[0]` is empty"),
        ("template = '{{ input '", "`template`"),
        ("template = '{{ virtual }}{{ virtual }}'", "`{{ virtual }}` 2 times, must have it once"),
        ("template = '{{ virtual_0 }}'", "`{{ virtual_0 }}`, `virtual_token_splits` has 0 entries"),
        ("virtual_token_splits = [1]", "has 1 entries, `template` has no `{{ virtual_0 }}`"),
        ("virtual_token_splits = [1, 2]\ntemplate = '{{ virtual }}'", "`{{ virtual_0 }}` to `{{ virtual_1 }}`"),
        ("virtual_token_splits = [0]\ntemplate = '{{ virtual_0 }}'", "`virtual_token_splits[0]` is 0"),
        ("virtual_token_splits = [1]\ntemplate = '{{ virtual_0 }}{{ virtual_0 }}'", "`{{ virtual_0 }}` 2 times"),
        ("virtual_token_splits = [-1]", "line 1"),
    ];
    for (text, expected) in cases {
        let e = TaskCard::parse(text).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
        let message = e.to_string();
        assert!(message.starts_with("task.toml: ") && message.contains(expected), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let e = TaskCard::parse(&"#".repeat(TaskCard::MAX_BYTES + 1)).unwrap_err();
    assert!(e.to_string().contains("1048577 bytes, at most 1048576"), "{e}");
}
