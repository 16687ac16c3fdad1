//! The `tokenizer.json` that the metadata's vocabulary stands for: SentencePiece's BPE or a byte-level BPE.
mod splits;

use super::tokens::{Special, TokenKind, Tokens};
use super::value::Value;
use super::{Gguf, bad, broken};
use crate::error::{Error, Result};
use serde_json::{Map, Value as Json, json};
use splits::Splits;
use std::collections::HashMap;

const MODEL: &str = "tokenizer.ggml.model";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
/// Letters of a token that SentencePiece builds from others. Each place to cut it may be a merge, so that the merges of a long
/// one take the square of its length.
const MAX_LETTERS: usize = 128;

/// The `tokenizer.json` of a file.
///
/// # Errors
/// `InvalidArgument` for a vocabulary that contradicts itself, `FailedPrecondition` for one that is not served.
pub fn tokenizer(gguf: &Gguf<'_>, special: &Special) -> Result<Json> {
    let model = gguf.get(MODEL).ok_or_else(|| bad(format!("has no key `{MODEL}`")))?;
    let kind = model.as_str().filter(|m| matches!(*m, "llama" | "gpt2"));
    let kind = kind.ok_or_else(|| {
        let served = "served are llama (SentencePiece BPE) and gpt2 (byte-level BPE)";
        Error::precondition(format!("`{MODEL}` is {model}, which is not served; {served}"))
    })?;
    let tokens = Tokens::of(gguf)?;
    fits(gguf, &tokens)?;
    let mut ids = HashMap::with_capacity(tokens.texts.len());
    for (id, text) in tokens.texts.iter().enumerate() {
        if let Some(first) = ids.insert(text.as_ref(), id as u32) {
            return Err(bad(format!("`tokenizer.ggml.tokens` has {text:?} twice, as {first} and as {id}")));
        }
    }
    let mut json = if kind == "llama" { sentencepiece(gguf, &tokens, &ids, special)? } else { byte_level(gguf, &ids)? };
    let vocab: Map<String, Json> = ids.iter().map(|(text, id)| ((*text).to_owned(), json!(id))).collect();
    json["model"]["type"] = "BPE".into();
    json["model"]["vocab"] = Json::Object(vocab);
    json["version"] = "1.0".into();
    json["added_tokens"] = added_tokens(&tokens, special);
    let usual = if kind == "llama" { [true, false] } else { [Splits::of(gguf)?.adds_bos, false] };
    json["post_processor"] = around(&tokens, special.added(gguf, usual)?);
    Ok(json)
}

/// Every token must have a row in the table.
fn fits(gguf: &Gguf<'_>, tokens: &Tokens<'_>) -> Result<()> {
    let rows = gguf.tensor("token_embd.weight").and_then(|t| t.shape.first().copied()).unwrap_or(0);
    let count = tokens.texts.len();
    if count <= rows {
        return Ok(());
    }
    Err(bad(format!("`tokenizer.ggml.tokens` has {count} tokens, the tensor token_embd.weight has rows for {rows}")))
}

fn added_tokens(tokens: &Tokens<'_>, special: &Special) -> Json {
    let named: Vec<u32> = special.all().collect();
    let entry = |(id, (text, kind)): (usize, (_, &TokenKind))| {
        let is_special = matches!(kind, TokenKind::Control | TokenKind::Unknown) || named.contains(&(id as u32));
        (is_special || *kind == TokenKind::UserDefined).then(|| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": is_special
            })
        })
    };
    tokens.texts.iter().zip(&tokens.kinds).enumerate().filter_map(entry).collect()
}

/// BOS in front and EOS behind.
fn around(tokens: &Tokens<'_>, added: [Option<u32>; 2]) -> Json {
    let [bos, eos] = added.map(|id| id.map(|id| (tokens.texts[id as usize].as_ref(), id)));
    let template = |sequences: &[&str]| -> Json {
        let token = |t: Option<(&str, u32)>| t.map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": 0 } }));
        let each = sequences.iter().flat_map(|s| {
            let text = json!({ "Sequence": { "id": s, "type_id": 0 } });
            token(bos).into_iter().chain([text]).chain(token(eos))
        });
        each.collect()
    };
    let named: Map<String, Json> = bos
        .into_iter()
        .chain(eos)
        .map(|(text, id)| (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] })))
        .collect();
    json!({
        "type": "TemplateProcessing", "single": template(&["A"]), "pair": template(&["A", "B"]), "special_tokens": named
    })
}

fn byte_level(gguf: &Gguf<'_>, ids: &HashMap<&str, u32>) -> Result<Json> {
    let splits = Splits::of(gguf)?;
    let value = gguf.get(MERGES).ok_or_else(|| bad(format!("has no key `{MERGES}`")))?;
    let array = value.as_array().ok_or_else(|| broken(MERGES, value, "must be an array of texts"))?;
    let merge = |(i, v): (usize, Value<'_>)| {
        let wrong = |rule: &str| bad(format!("`{MERGES}` has {v} as entry {i}, {rule}"));
        let text = v.as_str().ok_or_else(|| wrong("must be a text in UTF-8"))?;
        // The first part may be a space itself.
        let start = text.chars().next().map_or(0, char::len_utf8);
        let cut =
            text[start..].find(' ').map(|at| start + at).ok_or_else(|| wrong("must be two tokens and a space"))?;
        let (left, right) = (&text[..cut], &text[cut + 1..]);
        let known = |t: &str| ids.contains_key(t);
        if known(left) && known(right) && known(&format!("{left}{right}")) {
            return Ok(json!([left, right]));
        }
        Err(wrong("must be two tokens that make a third, all of `tokenizer.ggml.tokens`"))
    };
    let merges: Json = array.values().enumerate().map(merge).collect::<Result<_>>()?;
    Ok(json!({
        "normalizer": splits.normalizer(),
        "pre_tokenizer": splits.pre_tokenizer(),
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "ignore_merges": splits.ignores_merges, "merges": merges },
    }))
}

fn sentencepiece(gguf: &Gguf<'_>, tokens: &Tokens<'_>, ids: &HashMap<&str, u32>, special: &Special) -> Result<Json> {
    let key = "tokenizer.ggml.add_space_prefix";
    let prefix = match gguf.get(key) {
        None => true,
        Some(v) => v.as_bool().ok_or_else(|| broken(key, v, "must be true or false"))?,
    };
    let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut normalizers = vec![];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.push(json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(space);
    let unknown = special.unknown.map(|id| tokens.texts[id as usize].as_ref());
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "unk_token": unknown, "fuse_unk": true, "byte_fallback": true, "merges": merges(gguf, tokens, ids)?
        },
    }))
}

/// SentencePiece joins the two neighbours whose token has the highest score. The same as ranks: every way to cut a token in two
/// tokens, the highest scores first. Among the ways to cut one token the order is that of transformers' converter.
fn merges(gguf: &Gguf<'_>, tokens: &Tokens<'_>, ids: &HashMap<&str, u32>) -> Result<Json> {
    let value = gguf.get(SCORES).ok_or_else(|| bad(format!("has no key `{SCORES}`")))?;
    let rule = || format!("must be an array of {} numbers, one for each token", tokens.texts.len());
    let array = value.as_array().filter(|a| a.len() == tokens.texts.len());
    let array = array.ok_or_else(|| broken(SCORES, value, rule()))?;
    let text = |id: u32| tokens.texts.get(id as usize).map_or("", |t| t.as_ref());
    let normal = |part: &str| ids.get(part).copied().filter(|id| tokens.kinds[*id as usize] == TokenKind::Normal);
    let mut merges = Vec::new();
    for (id, score) in array.values().enumerate() {
        let score = score.as_f64().ok_or_else(|| broken(SCORES, value, rule()))?;
        if tokens.kinds[id] != TokenKind::Normal {
            continue;
        }
        let whole = text(id as u32);
        let letters = whole.chars().count();
        if letters > MAX_LETTERS {
            let start: String = whole.chars().take(40).collect();
            return Err(bad(format!(
                "the token {id} ({start:?}...) has {letters} letters, at most {MAX_LETTERS} are served"
            )));
        }
        let cut = |(i, (at, _)): (usize, (usize, char))| {
            let (left, right) = (normal(&whole[..at])?, normal(&whole[at..])?);
            Some((score, [i, letters - i], [left, right]))
        };
        let first = merges.len();
        merges.extend(whole.char_indices().enumerate().skip(1).filter_map(cut));
        merges[first..].sort_by_key(|(_, _, pair)| *pair);
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    Ok(merges.into_iter().map(|(_, _, [left, right])| json!([text(left), text(right)])).collect())
}
