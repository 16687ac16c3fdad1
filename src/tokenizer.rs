//! The base model's tokenizer, and text that grows token by token.
use crate::error::{Context, Kind, Result};
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
        let mut inner = tokenizers::Tokenizer::from_bytes(json).or_kind(Kind::InvalidArgument, "tokenizer.json")?;
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
