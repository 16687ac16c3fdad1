//! Stop sequences in growing text: what may be shown, what must wait, where it ends.

/// Looks for stop sequences across pieces of text.
pub struct StopMatcher {
    sequences: Vec<String>,
    include: bool,
    /// Text that may be the start of a stop sequence.
    held: String,
}

/// What a piece of text came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Matched {
    /// Text that may be shown now.
    pub text: String,
    /// The stop sequence that was found: the text ends here.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// `include`: a stop sequence that was found is shown too.
    pub fn new(sequences: Vec<String>, include: bool) -> Self {
        StopMatcher { sequences, include, held: String::new() }
    }

    /// Adds a piece. While not `armed`, nothing stops and nothing is held: so an empty piece at the end gives what was held.
    pub fn push(&mut self, piece: &str, armed: bool) -> Matched {
        self.held.push_str(piece);
        if !armed || self.sequences.is_empty() {
            return Matched { text: std::mem::take(&mut self.held), stop: None };
        }
        // The earliest one; of those at one place the first of the list.
        let found = self.sequences.iter().filter_map(|s| self.held.find(s.as_str()).map(|at| (at, s)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let stop = stop.clone();
            let end = if self.include { at + stop.len() } else { at };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            return Matched { text, stop: Some(stop) };
        }
        let keep = self.sequences.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Matched { text: std::mem::replace(&mut self.held, rest), stop: None }
    }
}

/// Bytes of the longest end of `text` that is a proper start of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(i, _)| i).skip(1);
    starts.filter(|i| text.ends_with(&stop[..*i])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut m = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut shown = Vec::new();
        for piece in pieces {
            let matched = m.push(piece, true);
            shown.push(matched.text);
            if matched.stop.is_some() {
                return (shown, matched.stop);
            }
        }
        shown.push(m.push("", false).text);
        (shown, None)
    }

    #[test]
    fn a_stop_across_pieces_is_never_shown() {
        let (shown, stop) = run(&["END"], false, &["a E", "N", "D b"]);
        assert_eq!((shown, stop.as_deref()), (vec!["a ".into(), String::new(), String::new()], Some("END")));
        let (shown, _) = run(&["END"], true, &["a E", "ND b"]);
        assert_eq!(shown.concat(), "a END");
    }

    #[test]
    fn what_turns_out_harmless_is_shown() {
        let (shown, stop) = run(&["END", "ü!"], false, &["E", "N ", "ü", "?"]);
        assert_eq!((shown.concat().as_str(), stop), ("EN ü?", None));
        assert_eq!(run(&["aab"], false, &["aa", "ab"]).0.concat(), "a");
    }

    #[test]
    fn the_earliest_stop_wins() {
        assert_eq!(run(&["b", "ab"], false, &["xab"]).1.as_deref(), Some("ab"));
    }

    #[test]
    fn nothing_stops_before_it_is_armed() {
        let mut m = StopMatcher::new(vec!["x".into()], false);
        assert_eq!(m.push("ax", false), Matched { text: "ax".into(), stop: None });
        assert_eq!(m.push("bx", true).stop.as_deref(), Some("x"));
    }
}
