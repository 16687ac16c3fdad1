//! Where answers go. Colour and moving bars on a terminal only; a closed pipe ends output, not the process.
use super::Output;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Width where nobody says: most terminals and pages have it.
const WIDTH: usize = 100;

/// stdout and stderr, and what they can show.
#[derive(Debug)]
pub struct Terminal {
    output: Output,
    colour: bool,
    width: usize,
}

impl Terminal {
    /// Looks at the process's own streams. `NO_COLOR` and `COLUMNS` are honoured.
    pub fn new(output: Output) -> Self {
        let colour = output == Output::Text
            && io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let columns = std::env::var("COLUMNS").ok().and_then(|v| v.parse().ok());
        Terminal { output, colour, width: columns.filter(|c| *c >= 60).unwrap_or(WIDTH) }
    }

    /// Whether the answer is one JSON object.
    pub fn is_json(&self) -> bool {
        self.output == Output::Json
    }

    /// Columns to write in.
    pub fn width(&self) -> usize {
        self.width
    }

    /// A line of the answer for people; nothing where the answer is JSON.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.is_json() {
            put(&mut io::stdout(), text.as_ref(), "\n");
        }
    }

    /// A part of a line, shown at once.
    pub fn piece(&self, text: &str) {
        if !self.is_json() {
            put(&mut io::stdout(), text, "");
        }
    }

    /// The answer as JSON; nothing where it is for people.
    pub fn json(&self, value: &Value) {
        if self.is_json() {
            put(&mut io::stdout(), &value.to_string(), "\n");
        }
    }

    /// A remark beside the answer: on stderr, so that pipes carry the answer alone.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.is_json() {
            put(&mut io::stderr(), text.as_ref(), "\n");
        }
    }

    /// Bold, on a terminal.
    pub fn bold(&self, text: &str) -> String {
        self.painted("1", text)
    }

    /// Grey, on a terminal.
    pub fn dim(&self, text: &str) -> String {
        self.painted("2", text)
    }

    /// Green, on a terminal.
    pub fn good(&self, text: &str) -> String {
        self.painted("32", text)
    }

    /// Red, on a terminal.
    pub fn bad(&self, text: &str) -> String {
        self.painted("31", text)
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A bar on stderr where that is a terminal; hidden elsewhere, where [`Terminal::note`] tells.
    pub fn bar(&self) -> ProgressBar {
        if !self.shows_bars() {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}/{len}");
        let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    /// Whether [`Terminal::bar`] can be seen.
    pub fn shows_bars(&self) -> bool {
        !self.is_json() && io::stderr().is_terminal()
    }
}

/// A reader that went away is no failure: `prefixd generate ... | head -1`.
fn put(stream: &mut impl Write, text: &str, end: &str) {
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.write_all(end.as_bytes()));
    let _ = stream.flush();
}
