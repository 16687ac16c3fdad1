//! The wording of a request: minijinja, cut down until rendering is linear in source and input.
//!
//! Templates are uploaded, so one of them may be hostile. minijinja's fuel counts instructions, and a
//! few dozen `{% set a = a ~ a %}` fill any memory; nested loops and macros do the same to time. What
//! remains here binds no name and builds no text: `{{ }}` with subscripts, comparisons and [`filters`],
//! `{% if %}`, comments. Then each operation costs at most the length of the input once, their number is
//! [`MAX_TOKENS`], and the output is cut at [`MAX_OUTPUT`]. Text is joined by writing it side by side.
//!
//! `{{ virtual }}` and `{{ virtual_0 }}`, `{{ virtual_1 }}`... mark where virtual tokens stand. They are cut out of
//! the source before anything is rendered, and what lies between is rendered by itself: no text ever stands for a
//! marker, so no input can forge one.
mod subset;

use crate::error::{Context as _, Error, Kind, Result};
use minijinja::{Environment, UndefinedBehavior, context};
use serde::Deserialize;
use std::io::{self, Write};
use std::sync::{Arc, LazyLock};
use subset::check_subset;

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
    segments: Arc<[Segment]>,
}

/// A part of a template's source.
#[derive(Clone, Debug, PartialEq)]
enum Segment {
    /// Rendered by itself.
    Source(String),
    Marker(Marker),
}

/// A place for virtual tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marker {
    /// `{{ virtual }}`: all of them.
    All,
    /// `{{ virtual_i }}`: those of split i.
    Split(u32),
}

/// A part of a rendered template.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    Text(String),
    Marker(Marker),
}

impl TryFrom<String> for Template {
    type Error = Error;

    fn try_from(source: String) -> Result<Self> {
        let refuse = |e: String| Error::new(Kind::InvalidArgument, format!("`template`: {e}"));
        if source.len() > MAX_SOURCE {
            return Err(refuse(format!("{} bytes, at most {MAX_SOURCE}", source.len())));
        }
        let segments = check_subset(&source).map_err(refuse)?;
        for segment in &segments {
            let Segment::Source(source) = segment else { continue };
            let parsed = ENVIRONMENT.template_from_str(source).map_err(|e| refuse(e.to_string()))?;
            let mut names: Vec<_> = parsed.undeclared_variables(false).into_iter().collect();
            names.retain(|name| name != "input");
            names.sort();
            if let Some(name) = names.first() {
                return Err(refuse(format!("`{name}` is unknown; the one variable is `input`")));
            }
        }
        let template = Template { segments: segments.into() };
        template.render("one input").map_err(|e| refuse(e.to_string()))?;
        Ok(template)
    }
}

impl Template {
    /// The parts for one request, in order.
    pub(super) fn render(&self, input: &str) -> Result<Vec<Part>> {
        let mut room = MAX_OUTPUT;
        let render = |segment: &Segment| match segment {
            Segment::Marker(marker) => Ok(Part::Marker(*marker)),
            Segment::Source(source) => {
                let text = render_source(source, input, room)?;
                room -= text.len();
                Ok(Part::Text(text))
            }
        };
        self.segments.iter().map(render).collect()
    }

    /// The places for virtual tokens, in order.
    pub(super) fn markers(&self) -> impl Iterator<Item = Marker> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Marker(marker) => Some(*marker),
            Segment::Source(_) => None,
        })
    }
}

/// The text of one segment, at most `room` bytes.
fn render_source(source: &str, input: &str, room: usize) -> Result<String> {
    // Parsing takes microseconds at these sizes and saves a self-referencing struct.
    let parsed = ENVIRONMENT.template_from_str(source);
    let parsed = parsed.or_kind(Kind::InvalidArgument, "template")?;
    let mut out = Capped { bytes: Vec::with_capacity(source.len() + input.len()), room, full: false };
    let done = parsed.render_captured_to(context! { input }, &mut out).map(drop);
    if out.full {
        return Err(Error::invalid("prompt", format!("{} bytes", input.len()), too_long()));
    }
    done.or_kind(Kind::InvalidArgument, "template")?;
    String::from_utf8(out.bytes).or_kind(Kind::Internal, "template output")
}

fn too_long() -> String {
    format!("its rendered template passes {MAX_OUTPUT} bytes")
}

/// Takes at most `room` bytes, then ends the rendering.
struct Capped {
    bytes: Vec<u8>,
    room: usize,
    full: bool,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.room {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn render(source: &str, input: &str) -> Result<String> {
        let parts = Template::try_from(source.to_owned())?.render(input)?;
        let text = |part| if let Part::Text(text) = part { text } else { panic!("a marker in {source}") };
        Ok(parts.into_iter().map(text).collect())
    }

    /// The rendered parts, markers in angle brackets.
    fn parts(source: &str, input: &str) -> Vec<String> {
        let parts = Template::try_from(source.to_owned()).unwrap().render(input).unwrap();
        let show = |part: Part| match part {
            Part::Text(text) => text,
            Part::Marker(marker) => format!("<{}>", marker.name()),
        };
        parts.into_iter().map(show).collect()
    }

    #[test]
    fn markers_cut_a_template_and_keep_its_white_space() {
        for (source, expected) in [
            ("{{ virtual }}", ["<virtual>"].as_slice()),
            ("{{virtual}} {{ input }}", &["<virtual>", " x"]),
            ("a {{- virtual -}} \n b", &["a", "<virtual>", "b"]),
            (
                "{{ input -}} {{ virtual_1 }} {{- input }}{{ virtual_0 }}\n",
                &["x", "<virtual_1>", "x", "<virtual_0>", "\n"],
            ),
            ("{# {{ virtual }} #}{{ '{{ virtual }}' }}{{ virtual }}", &["{{ virtual }}", "<virtual>"]),
            ("{% if input == 'x' %}y{% else %}n{% endif %}{{+ virtual +}} ", &["y", "<virtual>", " "]),
        ] {
            assert_eq!(parts(source, "x"), expected, "{source}");
        }
    }

    #[test]
    fn no_input_forges_a_marker() {
        for input in ["{{ virtual }}", "<virtual>", "\u{0}virtual\u{0}", "\u{fdd0}", "' }}{{ virtual }}{{ '"] {
            let expected = [input, "<virtual>", &input.to_uppercase()];
            assert_eq!(parts("{{ input }}{{ virtual }}{{ input|upper }}", input), expected);
        }
    }

    #[test]
    fn markers_that_are_not_there_alone_and_always_are_refused() {
        for (source, expected) in [
            ("{{ virtual|upper }}", "`virtual` is no text"),
            ("{{ input if virtual_0 }}", "`virtual_0` is no text"),
            ("{% if virtual %}{% endif %}", "`virtual` is no text"),
            ("{% if input %}{{ virtual }}{% endif %}", "`{{ virtual }}` stands inside `{% if %}`"),
            ("{%- if input -%}{% if 1 %}{% endif %}{{ virtual_2 }}{% endif %}", "`{{ virtual_2 }}` stands inside"),
            ("{{ virtual_x }}", "`virtual_x` is unknown"),
            ("{{ virtual_99999999999 }}", "`virtual_99999999999` is unknown"),
        ] {
            let e = Template::try_from(source.to_owned()).unwrap_err();
            assert!(e.to_string().contains(expected), "{source}: {e}");
        }
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
