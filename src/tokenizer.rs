//! The base model's tokenizer, and text that grows token by token.
pub mod chat;

use crate::error::{Context, Error, Kind, Result};
use std::sync::Arc;

/// Text to ids and back. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// `InvalidArgument` with what the `tokenizers` library says.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        // The library panics on some broken files (a decoder without its keys); a file must not end a server.
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json));
        let parsed = parsed.map_err(|_| Error::new(Kind::InvalidArgument, "tokenizer.json: cannot be read"))?;
        let mut inner = parsed.or_kind(Kind::InvalidArgument, "tokenizer.json")?;
        // A saved training set-up must not cut or pad requests.
        inner.with_padding(None);
        inner.with_truncation(None).or_kind(Kind::InvalidArgument, "tokenizer.json")?;
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// Ids of `text`; with `add_special_tokens` the tokenizer's own (BOS) are put around it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.or_kind(Kind::InvalidArgument, "prompt cannot be tokenised")?.get_ids().to_vec())
    }

    /// Ids of texts between which something else stands. With `add_special_tokens` the tokenizer's own that belong in
    /// front (BOS) go to the first, those that belong behind (\[SEP\]) to the last.
    pub fn encode_pieces(&self, pieces: &[&str], add_special_tokens: bool) -> Result<Vec<Vec<u32>>> {
        let special = |i| add_special_tokens && i == 0;
        let encode = |(i, piece): (usize, &&str)| self.encode(piece, special(i));
        let mut all: Vec<_> = pieces.iter().enumerate().map(encode).collect::<Result<_>>()?;
        if add_special_tokens && let [first, .., last] = all.as_mut_slice() {
            last.extend(first.split_off(first.len() - self.specials_behind()?.min(first.len())));
        }
        Ok(all)
    }

    /// How many special tokens the tokenizer puts behind a text.
    fn specials_behind(&self) -> Result<usize> {
        let encoding = self.inner.encode_fast("a", true).or_kind(Kind::Internal, "tokenizer")?;
        Ok(encoding.get_special_tokens_mask().iter().rev().take_while(|&&mask| mask == 1).count())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).or_kind(Kind::Internal, "tokens cannot be decoded")
    }

    /// Text of one token by itself; U+FFFD stands for a part of a character, special tokens show.
    pub fn token_text(&self, id: u32) -> String {
        self.inner.decode(&[id], false).unwrap_or_default()
    }

    /// Id of a token of the vocabulary, added tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Text of a growing sequence, handed out in whole characters.
///
/// Decoders look at neighbours (SentencePiece drops a leading space, bytes join into characters), so a token
/// is decoded together with the ones before it, and its text is what was added. The window starts where the
/// last piece started: the scheme of text-generation-inference.
#[derive(Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Start of the decoding window.
    window: usize,
    /// Tokens before this one have been handed out.
    read: usize,
}

impl Detokenizer {
    /// Adds a token; returns the text that is certain now, empty while a character is unfinished.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.pending(tokenizer)?;
        // An unfinished character decodes to U+FFFD at the end: wait for its other bytes.
        if piece.is_empty() || piece.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.window = self.read;
        self.read = self.ids.len();
        Ok(piece)
    }

    /// What is left at the end: an unfinished character shows as U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let piece = self.pending(tokenizer)?;
        (self.window, self.read) = (self.ids.len(), self.ids.len());
        Ok(piece)
    }

    fn pending(&self, tokenizer: &Tokenizer) -> Result<String> {
        let before = tokenizer.decode(&self.ids[self.window..self.read])?;
        let now = tokenizer.decode(&self.ids[self.window..])?;
        Ok(now.get(before.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Words by white space, `[CLS]` (1) in front and `[SEP]` (2) behind.
    fn bert() -> Tokenizer {
        let special = |id: &str| serde_json::json!({ "SpecialToken": { "id": id, "type_id": 0 } });
        let words = ["[UNK]", "[CLS]", "[SEP]", "a", "b"];
        let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| ((*w).into(), i.into())).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "pre_tokenizer": { "type": "WhitespaceSplit" },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [special("[CLS]"), { "Sequence": { "id": "A", "type_id": 0 } }, special("[SEP]")],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
                "special_tokens": {
                    "[CLS]": { "id": "[CLS]", "ids": [1], "tokens": ["[CLS]"] },
                    "[SEP]": { "id": "[SEP]", "ids": [2], "tokens": ["[SEP]"] },
                }
            },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" }
        });
        Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn special_tokens_stand_around_all_pieces() {
        let encode = |pieces: &[&str], special| bert().encode_pieces(pieces, special).unwrap();
        assert_eq!(encode(&["a", "b b", "a"], true), [vec![1, 3], vec![4, 4], vec![3, 2]]);
        assert_eq!(encode(&["", "a"], true), [vec![1], vec![3, 2]]);
        assert_eq!(encode(&["a"], true), [[1, 3, 2]]);
        assert_eq!(encode(&["a", "b"], false), [[3], [4]]);
        assert!(encode(&[], true).is_empty());
    }
}
