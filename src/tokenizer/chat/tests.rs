#![allow(clippy::unwrap_used)]
use super::*;

fn user(content: &str) -> Vec<ChatMessage> {
    vec![ChatMessage { role: "user".into(), content: content.into() }]
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String> {
    ChatTemplate::new(source, SpecialTokens::new())?.render(messages, true)
}

#[test]
fn the_template_and_the_tokens_come_from_either_file() {
    let text = |template: Option<&str>, config: Option<&str>| {
        let template = ChatTemplate::from_files(template.map(str::as_bytes), config.map(str::as_bytes))?;
        template.render(&user("x"), true)
    };
    let show = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token is defined }}";
    let tokens = r#""bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "unk_token": null"#;
    let single = format!(r#"{{"chat_template": "{show}", {tokens}}}"#);
    assert_eq!(text(None, Some(&single)).unwrap(), "<s>x</s>False");
    assert_eq!(text(Some("{{ eos_token }}"), Some(&single)).unwrap(), "</s>");
    assert_eq!(text(Some("{{ bos_token }}!"), None).unwrap(), "!");
    let named = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(text(None, Some(named)).unwrap(), "d");
    for (template, config, expected) in [
        (None, None, "no chat template"),
        (None, Some("{}"), "no chat template"),
        (None, Some(r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#), "named `default`"),
        (None, Some("{"), "tokenizer_config.json: EOF"),
        (Some("{% if %}"), None, "chat template: syntax error"),
    ] {
        let e = text(template, config).unwrap_err();
        assert_eq!(e.kind(), Kind::FailedPrecondition);
        assert!(e.to_string().contains(expected), "{e}");
    }
}

#[test]
fn a_refusal_is_the_clients_and_a_failure_the_templates() {
    let cases = [
        ("{{ raise_exception('Only ' ~ messages|length) }}", Kind::InvalidArgument, "chat template says: Only 1"),
        (
            "{% macro f() %}{{ raise_exception('in a macro') }}{% endmacro %}{{ f() | upper }}",
            Kind::InvalidArgument,
            "says: in a macro",
        ),
        ("{{ messages[0].name.first }}", Kind::FailedPrecondition, "undefined"),
        ("{{ ''.rot13() }}", Kind::FailedPrecondition, "rot13"),
        ("{{ strftime_now('%Q') }}", Kind::FailedPrecondition, "%Q"),
        ("{% include 'x' %}", Kind::FailedPrecondition, "template not found"),
        ("{{ messages[0].content[1:][::-1] }}", Kind::FailedPrecondition, "panicked"),
        ("{{ nowhere | tojson }}", Kind::FailedPrecondition, "no JSON"),
    ];
    for (source, kind, expected) in cases {
        let e = render(source, &user("x")).unwrap_err();
        assert_eq!(e.kind(), kind, "{source}: {e}");
        assert!(e.to_string().contains(expected), "{source}: {e}");
    }
    let e = render("{{ raise_exception(messages[0].content) }}", &user(&"ü".repeat(100_000))).unwrap_err();
    assert!(e.to_string().len() < 1000, "{e}");
}

#[test]
fn work_output_and_depth_are_bounded() {
    let text = "x".repeat(1 << 20);
    let e = render("{% for i in range(100) %}{{ messages[0].content }}{% endfor %}", &user(&text)).unwrap_err();
    assert!(e.to_string().contains("passes 16777216 bytes"), "{e}");
    let spin = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}";
    let e = render(spin, &user("x")).unwrap_err();
    assert_eq!(e.kind(), Kind::InvalidArgument);
    assert!(e.to_string().contains("more than 5000000 instructions"), "{e}");
    // On a thread with tokio's stack.
    let deep = || render("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", &user("x"));
    let deep = std::thread::Builder::new().stack_size(2 << 20).spawn(deep).unwrap().join().unwrap();
    assert_eq!(deep.unwrap_err().kind(), Kind::FailedPrecondition);
}

/// As Python counts; minijinja's own loop would never end on an empty text.
#[test]
fn count_ends() {
    let counts = "{{ messages[0].content.count('') }} {{ messages[0].content.count('a') }} {{ ''.count('') }}";
    assert_eq!(render(counts, &user("aéa")).unwrap(), "4 2 1");
}

#[test]
fn line_ends_and_generation_blocks_are_jinjas() {
    assert_eq!(jinja::prepare("a\r\nb\rc"), "a\nb\nc");
    assert_eq!(jinja::prepare("{%- generation -%}x{% endgeneration%}"), "{%- with -%}x{% endwith%}");
    assert_eq!(jinja::prepare("{% if generation %}{% generations %}"), "{% if generation %}{% generations %}");
    assert_eq!(render("{% if true %}\r\nx{% endif %}", &user("")).unwrap(), "x");
    assert!(!render("{{ strftime_now('%d %B %Y') }}", &user("")).unwrap().contains('%'));
}
