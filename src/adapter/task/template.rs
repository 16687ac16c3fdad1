//! The wording of a request: minijinja, cut down until rendering is linear in source and input.
//!
//! Templates are uploaded, so one of them may be hostile. minijinja's fuel counts instructions, and a
//! few dozen `{% set a = a ~ a %}` fill any memory; nested loops and macros do the same to time. What
//! remains here binds no name and builds no text: `{{ }}` with subscripts, comparisons and [`filters`],
//! `{% if %}`, comments. Then each operation costs at most the length of the input once, their number is
//! [`MAX_TOKENS`], and the output is cut at [`MAX_OUTPUT`]. Text is joined by writing it side by side.
use crate::error::{Context as _, Error, Kind, Result};
use minijinja::{Environment, UndefinedBehavior, context};
use serde::Deserialize;
use std::io::{self, Write};
use std::sync::{Arc, LazyLock};

/// Longest template, bytes.
const MAX_SOURCE: usize = 64 << 10;
/// Longest rendered text, bytes.
pub(super) const MAX_OUTPUT: usize = 16 << 20;
/// Words, literals and signs inside the tags of one template.
const MAX_TOKENS: usize = 1024;
/// minijinja instructions of one rendering: no loops, so never near it.
const FUEL: u64 = 100_000;

/// A template that passed every check.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Template {
    source: Arc<str>,
}

impl TryFrom<String> for Template {
    type Error = Error;

    fn try_from(source: String) -> Result<Self> {
        let refuse = |e: String| Error::new(Kind::InvalidArgument, format!("`template`: {e}"));
        if source.len() > MAX_SOURCE {
            return Err(refuse(format!("{} bytes, at most {MAX_SOURCE}", source.len())));
        }
        check_subset(&source).map_err(refuse)?;
        let parsed = ENVIRONMENT.template_from_str(&source).map_err(|e| refuse(e.to_string()))?;
        let mut names: Vec<_> = parsed.undeclared_variables(false).into_iter().collect();
        names.retain(|name| name != "input");
        names.sort();
        if let Some(name) = names.first() {
            return Err(refuse(format!("`{name}` is unknown; the one variable is `input`")));
        }
        let template = Template { source: source.into() };
        template.render("one input").map_err(|e| refuse(e.to_string()))?;
        Ok(template)
    }
}

impl Template {
    /// The text for one request.
    pub(super) fn render(&self, input: &str) -> Result<String> {
        // Parsing takes microseconds at these sizes and saves a self-referencing struct.
        let parsed = ENVIRONMENT.template_from_str(&self.source);
        let parsed = parsed.or_kind(Kind::InvalidArgument, "template")?;
        let mut out = Capped { bytes: Vec::with_capacity(self.source.len() + input.len()), full: false };
        let done = parsed.render_captured_to(context! { input }, &mut out).map(drop);
        if out.full {
            return Err(Error::invalid("prompt", format!("{} bytes", input.len()), too_long()));
        }
        done.or_kind(Kind::InvalidArgument, "template")?;
        String::from_utf8(out.bytes).or_kind(Kind::Internal, "template output")
    }
}

fn too_long() -> String {
    format!("its rendered template passes {MAX_OUTPUT} bytes")
}

/// Takes at most [`MAX_OUTPUT`] bytes, then ends the rendering.
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.full = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts from the empty environment: no loader, no functions, and only filters of bounded growth.
static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut env = Environment::empty();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_keep_trailing_newline(true);
    env.set_fuel(Some(FUEL));
    env.add_filter("trim", |s: &str| s.trim().to_owned());
    env.add_filter("upper", |s: &str| s.to_uppercase());
    env.add_filter("lower", |s: &str| s.to_lowercase());
    env.add_filter("length", |s: &str| s.chars().count());
    env.add_filter("replace", replace);
    env.add_test("startingwith", |s: &str, start: &str| s.starts_with(start));
    env.add_test("endingwith", |s: &str, end: &str| s.ends_with(end));
    env
});

/// `replace(from, to)`, refused before it grows past the limit of the output.
fn replace(text: &str, from: &str, to: &str) -> Result<String, minijinja::Error> {
    let grown = text.matches(from).count().saturating_mul(to.len());
    if grown.saturating_add(text.len()) > MAX_OUTPUT {
        let kind = minijinja::ErrorKind::InvalidOperation;
        return Err(minijinja::Error::new(kind, format!("replace passes {MAX_OUTPUT} bytes")));
    }
    Ok(text.replace(from, to))
}

/// Reads the tags of `source` as minijinja's lexer does and refuses what lies outside the subset.
fn check_subset(source: &str) -> Result<(), String> {
    let mut rest = source;
    let mut tokens = 0;
    while let Some(at) = find_tag(rest) {
        let (opening, body) = rest[at..].split_at(2);
        rest = match opening {
            "{#" => body.split_once("#}").ok_or("a comment `{#` has no end `#}`")?.1,
            "{%" => check_tag(body, "%}", &mut tokens)?,
            _ => check_tag(body, "}}", &mut tokens)?,
        };
    }
    Ok(())
}

fn find_tag(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|w| matches!(w, b"{{" | b"{%" | b"{#"))
}

/// Checks one tag from after its opening; returns what follows `end`.
fn check_tag<'a>(body: &'a str, end: &str, tokens: &mut usize) -> Result<&'a str, String> {
    let open = if end == "%}" { "{%" } else { "{{" };
    // `{{-` and `-}}` (or with `+`) only set how white space around the tag is kept.
    let mut rest = body.strip_prefix(['-', '+']).unwrap_or(body);
    let mut first_word = end == "%}";
    let mut depth = 0usize;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        if depth == 0 {
            let closing = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if let Some(after) = closing.strip_prefix(end) {
                return Ok(after);
            }
        }
        *tokens += 1;
        if *tokens > MAX_TOKENS {
            return Err(format!("more than {MAX_TOKENS} words and signs inside its tags"));
        }
        let c = rest.chars().next().ok_or_else(|| format!("a tag `{open}` has no end `{end}`"))?;
        let word = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_').len();
        let taken = match c {
            _ if first_word && word == 0 => return Err(format!("`{open}` starts with `{c}`, not a word")),
            '"' | '\'' => string_len(rest).ok_or("a string has no end")?,
            _ if word > 0 => {
                let name = &rest[..word];
                if first_word && !matches!(name, "if" | "elif" | "else" | "endif") {
                    return Err(format!("`{{% {name} %}}` is not allowed; only if, elif, else, endif are"));
                }
                word
            }
            '(' | '[' => {
                depth += 1;
                1
            }
            ')' | ']' => {
                depth = depth.checked_sub(1).ok_or_else(|| format!("`{c}` without its opening"))?;
                1
            }
            '.' | ',' | ':' | '|' | '=' | '<' | '>' | '!' | '-' => 1,
            _ => {
                return Err(format!("`{c}` is not allowed in a tag; text is joined by writing it side by side"));
            }
        };
        first_word = false;
        rest = &rest[taken..];
    }
}

/// Bytes of the quoted string that `text` starts with, quotes included.
fn string_len(text: &str) -> Option<usize> {
    let quote = text.as_bytes().first()?;
    let mut escaped = false;
    for (i, b) in text.bytes().enumerate().skip(1) {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if b == *quote => return Some(i + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn render(source: &str, input: &str) -> Result<String> {
        Template::try_from(source.to_owned())?.render(input)
    }

    #[test]
    fn renders_what_a_task_needs() {
        for (source, expected) in [
            ("{{ input }}\n=>\n", " Ab \n=>\n"),
            ("Q: {{- input | trim -}} ?", "Q:Ab?"),
            ("{{ input|upper }}{# note }} #}{{ input[:2]|lower }}", " AB  a"),
            ("{% if input|length > 3 %}long{% else %}short{% endif %}", "long"),
            ("{% if input|trim == 'Ab' and input is not startingwith(\"%}\") %}y{% endif %}", "y"),
            ("{{ '{{' }} }} {", "{{ }} {"),
            ("{{ input|replace('A', '\"}}') }}", " \"}}b "),
            ("<&> {{ 'a' if input else 'b' }}", "<&> a"),
        ] {
            assert_eq!(render(source, " Ab ").unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn input_is_text_never_a_template() {
        assert_eq!(render("{{ input }}", "{{ 1 }}{% x %}<b>&").unwrap(), "{{ 1 }}{% x %}<b>&");
    }

    #[test]
    fn hostile_and_broken_templates_are_refused_at_once() {
        let doubling = format!("{{% set a = input %}}{}", "{% set a = a ~ a %}".repeat(60));
        for (source, expected) in [
            (doubling.as_str(), "`{% set %}`"),
            ("{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}", "`{% for %}`"),
            ("{% include '/etc/passwd' %}", "`{% include %}`"),
            ("{%- extends 'x' %}", "`{% extends %}`"),
            ("{% raw %}{{{% endraw %}", "`{% raw %}`"),
            ("{% macro f(x) %}{{ f(x) }}{% endmacro %}", "`{% macro %}`"),
            ("{# #}{{ 'x' * 1000000000 }}", "`*` is not allowed"),
            ("{{ input ~ input }}", "`~` is not allowed"),
            ("{{ input + input }}", "`+` is not allowed"),
            ("{{ '\\'' }}{{ {'a': 1} }}", "`{` is not allowed"),
            ("{{ inputs }}", "`inputs` is unknown"),
            ("{{ range(9) }}", "`range` is unknown"),
            ("{{ input|indent(9999999) }}", "unknown filter"),
            ("{{ input.x }}", "undefined"),
            ("{{ input", "has no end `}}`"),
            ("{{ 'a }}", "a string has no end"),
            ("{# a", "a comment"),
            ("{% if input %}", "syntax error"),
        ] {
            let e = render(source, "x").unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidArgument, "{source}");
            assert!(e.to_string().contains(expected), "{source}: {e}");
        }
        let e = render(&"x".repeat(MAX_SOURCE + 1), "").unwrap_err();
        assert!(e.to_string().contains("65537 bytes, at most 65536"), "{e}");
        let e = render(&"{{ 1 }}".repeat(MAX_TOKENS + 1), "").unwrap_err();
        assert!(e.to_string().contains("more than 1024"), "{e}");
    }

    #[test]
    fn output_is_cut_at_the_limit() {
        let e = render(&"{{ input }}".repeat(20), &"x".repeat(1 << 20)).unwrap_err();
        assert!(e.to_string().contains("passes 16777216 bytes"), "{e}");
        let e = render("{{ input|replace('', 'xxxxxxxxxxxxxxxxxx') }}", &"x".repeat(1 << 20)).unwrap_err();
        assert!(e.to_string().contains("replace passes"), "{e}");
    }
}
