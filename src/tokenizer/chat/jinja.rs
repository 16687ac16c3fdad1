//! The environment that chat templates expect: what transformers sets up in Python's Jinja, in minijinja.
use super::date;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Template, Value};
use minijinja_contrib::pycompat;
use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::LazyLock;

/// minijinja instructions of one rendering. Templates take a few hundred for a message.
pub const FUEL: u64 = 5_000_000;

/// What `raise_exception` was given.
#[derive(Debug)]
pub struct Raised(pub String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", to_json);
    env.add_filter("trim", trim);
    // Python's: all that has a length is a sequence, a slice (here an iterable) too; none is not iterable.
    env.add_test("sequence", |v: &Value| {
        matches!(v.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |v: &Value| !v.is_none() && v.try_iter().is_ok());
    env.add_function("raise_exception", |text: &Value| -> Result<Value, Error> {
        Err(invalid("raise_exception").with_source(Raised(text.to_string())))
    });
    env.add_function("strftime_now", |format: &str| date::now(format).map_err(invalid));
    env
});

/// Parses what [`prepare`] returned.
pub fn parse(source: &str) -> Result<Template<'_, '_>, Error> {
    ENVIRONMENT.template_from_str(source)
}

/// `source` as Jinja's lexer and transformers' extension take it: lines end with `\n`, and `{% generation %}`, which
/// marks the assistant's tokens for training, is a block. (It is taken for a tag in texts and raw blocks too.)
pub fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out += before;
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        out += &tag[..tag.len() - word.len()];
        let name = word.len() - word.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_').len();
        out += match &word[..name] {
            "generation" => "with",
            "endgeneration" => "endwith",
            other => other,
        };
        rest = &word[name..];
    }
    out + rest
}

fn invalid(text: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text)
}

/// Python's methods of texts, lists and dicts.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    let affix = args.first().and_then(Value::as_str);
    Ok(match (name, affix, args.len()) {
        ("strip", None, 0) => text.trim_matches(is_space).into(),
        ("lstrip", None, 0) => text.trim_start_matches(is_space).into(),
        ("rstrip", None, 0) => text.trim_end_matches(is_space).into(),
        ("split", None, 0) => text.split(is_space).filter(|word| !word.is_empty()).map(Value::from).collect(),
        // Of an empty text too, which pycompat's loop would count for ever.
        ("count", Some(part), 1) => text.matches(part).count().into(),
        ("removeprefix", Some(affix), 1) => text.strip_prefix(affix).unwrap_or(text).into(),
        ("removesuffix", Some(affix), 1) => text.strip_suffix(affix).unwrap_or(text).into(),
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    })
}

fn trim(value: &Value, chars: Option<String>) -> String {
    let text = value.as_str().map_or_else(|| Cow::Owned(value.to_string()), Cow::Borrowed);
    match chars {
        None => text.trim_matches(is_space).to_owned(),
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
    }
}

/// Python's white space: Unicode's and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's `json.dumps`, as transformers gives it to templates: no HTML escapes, and characters stay as they are.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = indent.filter(|v| !v.is_none()).map(|v| match v.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(v.as_usize().unwrap_or(0).min(MAX_INDENT)),
    });
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be two")),
    };
    let json = Json {
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    json.value(&mut out, value, 0)?;
    Ok(out)
}

/// Most blanks of one level of `indent`.
const MAX_INDENT: usize = 16;

struct Json {
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Json {
    fn value(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => *out += "null",
            ValueKind::Bool => *out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => *out += &value.to_string(),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, "[]", &items, depth, |out, item| self.value(out, item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.list(out, "{}", &keys, depth, |out, key| {
                    self.text(out, &key.to_string())?;
                    *out += &self.key;
                    self.value(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            other => return Err(invalid(format!("tojson: {other} is no JSON"))),
        }
        Ok(())
    }

    fn list(
        &self,
        out: &mut String,
        brackets: &str,
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (open, close) = brackets.split_at(1);
        *out += open;
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                *out += &self.item;
            }
            self.line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            self.line(out, depth);
        }
        *out += close;
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            *out += "\n";
            *out += &indent.repeat(depth);
        }
    }

    fn text(&self, out: &mut String, text: &str) -> Result<(), Error> {
        let json = serde_json::to_string(text).map_err(|e| invalid(e.to_string()))?;
        if !self.ascii {
            *out += &json;
            return Ok(());
        }
        for c in json.chars() {
            if matches!(c, ' '..='~') {
                out.push(c);
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
        Ok(())
    }
}
