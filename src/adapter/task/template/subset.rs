//! The scanner of templates: the subset that is allowed, and the places of virtual tokens.
use super::{MAX_TOKENS, Marker, Segment};

/// Reads the tags of `source` as minijinja's lexer does, refuses what lies outside the subset and cuts it at the
/// markers. A marker inside `{% if %}` would be there for some inputs only.
pub(super) fn check_subset(source: &str) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    // What is not yet in a segment, and what of it is not yet read.
    let (mut open, mut rest) = (source, source);
    let (mut tokens, mut ifs) = (0, 0usize);
    while let Some(at) = find_tag(rest) {
        let (opening, body) = rest[at..].split_at(2);
        let found = if opening == "{{" { marker(body) } else { None };
        if let Some((marker, trims, after)) = found {
            if ifs > 0 {
                let name = marker.name();
                return Err(format!("`{{{{ {name} }}}}` stands inside `{{% if %}}`; it must be there for every input"));
            }
            // `{{-` and `-}}` take away white space beside the marker, as minijinja would.
            let before = &open[..open.len() - rest.len() + at];
            let before = if trims.0 { before.trim_end() } else { before };
            if !before.is_empty() {
                segments.push(Segment::Source(before.to_owned()));
            }
            segments.push(Segment::Marker(marker));
            open = if trims.1 { after.trim_start() } else { after };
            rest = open;
            continue;
        }
        rest = match opening {
            "{#" => body.split_once("#}").ok_or("a comment `{#` has no end `#}`")?.1,
            "{%" => {
                let first = body.trim_start_matches(['-', '+']).trim_start();
                let is = |name| first.strip_prefix(name).is_some_and(|more: &str| !more.starts_with(word_char));
                ifs = (ifs + usize::from(is("if"))).saturating_sub(usize::from(is("endif")));
                check_tag(body, "%}", &mut tokens)?
            }
            _ => check_tag(body, "}}", &mut tokens)?,
        };
    }
    if !open.is_empty() || segments.is_empty() {
        segments.push(Segment::Source(open.to_owned()));
    }
    Ok(segments)
}

/// The marker that a `{{` tag with this body is, whether it trims before and after, and what follows the tag.
fn marker(body: &str) -> Option<(Marker, (bool, bool), &str)> {
    let start = body.strip_prefix(['-', '+']).unwrap_or(body).trim_ascii_start();
    let word = start.len() - start.trim_start_matches(word_char).len();
    let marker = Marker::parse(&start[..word])?;
    let end = start[word..].trim_ascii_start();
    let after = end.strip_prefix(['-', '+']).unwrap_or(end).strip_prefix("}}")?;
    Some((marker, (body.starts_with('-'), end.starts_with('-')), after))
}

impl Marker {
    fn parse(name: &str) -> Option<Self> {
        match name.strip_prefix("virtual")? {
            "" => Some(Marker::All),
            index => index.strip_prefix('_')?.parse().ok().map(Marker::Split),
        }
    }

    /// As the template spells it.
    pub(in crate::adapter::task) fn name(self) -> String {
        match self {
            Marker::All => "virtual".into(),
            Marker::Split(i) => format!("virtual_{i}"),
        }
    }
}

fn word_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
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
        let word = rest.len() - rest.trim_start_matches(word_char).len();
        let taken = match c {
            _ if first_word && word == 0 => return Err(format!("`{open}` starts with `{c}`, not a word")),
            '"' | '\'' => string_len(rest).ok_or("a string has no end")?,
            _ if word > 0 => {
                let name = &rest[..word];
                if first_word && !matches!(name, "if" | "elif" | "else" | "endif") {
                    return Err(format!("`{{% {name} %}}` is not allowed; only if, elif, else, endif are"));
                }
                if Marker::parse(name).is_some() {
                    return Err(format!("`{name}` is no text: it stands alone in its tag, as `{{{{ {name} }}}}`"));
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
