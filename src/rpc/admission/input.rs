//! From a prompt to rows: template, tokenizer, virtual tokens.
use super::{Admission, Input, Who};
use crate::adapter::{InputRow, Piece};
use crate::blocking;
use crate::error::{Error, Result};
use crate::rpc::convert::{self, Chat, Prompt};

/// Longer texts are tokenised on a thread of their own: about a millisecond of work.
const SMALL_TEXT: usize = 8 << 10;

/// Likewise conversations of more messages.
const SMALL_CHAT: usize = 64;

impl Admission {
    pub(super) async fn input(&self, who: Who, skip_template: bool, prompt: Prompt) -> Result<Input> {
        let nowhere = |field, value: &str| {
            let rule = "but this adapter's virtual tokens stand in its template, and without it nowhere";
            Err(Error::invalid(field, value, rule))
        };
        let mut rows = who.leading_rows();
        let text = match prompt {
            Prompt::Tokens(_) if who.places_virtual_tokens() => return nowhere("token_ids", "given"),
            Prompt::Text(_) if skip_template && who.places_virtual_tokens() => return nowhere("skip_template", "true"),
            Prompt::Tokens(ids) => {
                let ids = convert::token_ids("token_ids", ids, self.parts.vocab_size)?;
                if ids.is_empty() {
                    return Err(Error::invalid("input", "no token", "must be at least one"));
                }
                rows.extend(ids.into_iter().map(InputRow::Token));
                String::new()
            }
            Prompt::Text(text) => {
                self.check_bytes("prompt", text.len())?;
                if text.is_empty() {
                    return Err(Error::invalid("prompt", "empty", "must hold some text"));
                }
                let pieces = match &who.adapter {
                    Some(adapter) if !skip_template => adapter.card.render(&text)?,
                    _ => vec![Piece::Text(text)],
                };
                self.rows(pieces, who.adds_special_tokens(), &mut rows).await?
            }
            Prompt::Chat(_) if who.places_virtual_tokens() => return nowhere("messages", "given"),
            Prompt::Chat(chat) => {
                let pieces = vec![Piece::Text(self.worded(chat).await?)];
                self.rows(pieces, false, &mut rows).await?
            }
        };
        if rows.is_empty() {
            return Err(Error::invalid("input", "no token", "must be at least one"));
        }
        Ok(Input { who, rows, text })
    }

    /// Adds the rows of `pieces` to `rows`; returns their text.
    async fn rows(&self, pieces: Vec<Piece>, special: bool, rows: &mut Vec<InputRow>) -> Result<String> {
        let text = |piece: &Piece| if let Piece::Text(text) = piece { Some(text.clone()) } else { None };
        let texts: Vec<String> = pieces.iter().filter_map(text).collect();
        let all = texts.concat();
        let mut tokens = self.encode(texts, special).await?.into_iter();
        for piece in pieces {
            match piece {
                Piece::Virtual(range) => rows.extend(range.map(InputRow::Soft)),
                Piece::Text(_) => rows.extend(tokens.next().into_iter().flatten().map(InputRow::Token)),
            }
        }
        Ok(all)
    }

    pub(super) async fn continuations(&self, field: &'static str, contents: Vec<Prompt>) -> Result<Vec<Vec<u32>>> {
        let mut all = Vec::with_capacity(contents.len());
        for (i, content) in contents.into_iter().enumerate() {
            let tokens = match content {
                Prompt::Text(text) => self.encode(vec![text], false).await?.concat(),
                Prompt::Chat(chat) => self.encode(vec![self.worded(chat).await?], false).await?.concat(),
                Prompt::Tokens(ids) => convert::token_ids(field, ids, self.parts.vocab_size)?,
            };
            if tokens.is_empty() {
                return Err(Error::invalid(field, format!("empty at index {i}"), "each must hold a token"));
            }
            all.push(tokens);
        }
        Ok(all)
    }

    /// The text of a conversation. It holds its special tokens, and the adapter's template has no part in it.
    async fn worded(&self, chat: Chat) -> Result<String> {
        let (bytes, messages) = (chat.bytes(), chat.messages.len());
        self.check_bytes("messages", bytes)?;
        let template = self.parts.chat_template.clone()?;
        let render = move || template.render(&chat.messages, chat.add_generation_prompt);
        if bytes <= SMALL_TEXT && messages <= SMALL_CHAT {
            return render();
        }
        self.aside(render).await
    }

    async fn encode(&self, texts: Vec<String>, special: bool) -> Result<Vec<Vec<u32>>> {
        let bytes: usize = texts.iter().map(String::len).sum();
        let tokenizer = self.tokenizer().clone();
        let encode = move || {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            tokenizer.encode_pieces(&texts, special)
        };
        if bytes <= SMALL_TEXT { encode() } else { self.aside(encode).await }
    }

    /// The result of long work, done on a thread of its own.
    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        // Never closed while `self` lives.
        let _permit = self.large_texts.acquire().await.map_err(|e| Error::internal(format!("tokenizer: {e}")))?;
        blocking::run("tokenizer", work).await
    }
}
