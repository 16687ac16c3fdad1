//! Prefix text and the places of virtual tokens, for one kind of adapter on one kind of base.
use crate::adapter::placed::Placement;
use crate::adapter::{BaseShape, InputRow, Method, TaskCard};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Tokenizer;

/// Where `n` virtual tokens of `method` and the card's texts stand.
///
/// # Errors
/// `FailedPrecondition` for a card that asks for what this method or base cannot have, and where prefix and virtual
/// tokens leave no position to a request; `InvalidArgument` for places of virtual tokens that are not there.
pub fn placement(
    card: &mut TaskCard,
    method: Method,
    n: usize,
    shape: &BaseShape,
    tokenizer: &Tokenizer,
) -> Result<Placement> {
    let placed = card.places_virtual_tokens();
    if method == Method::Text {
        check_text_only(card, placed)?;
    }
    if method.is_kv() {
        check_kv(card, placed, method)?;
    }
    if shape.encoder {
        check_encoder(card, shape)?;
    }
    card.bind(n)?;
    let among_rows = placed || shape.encoder && n > 0 && !method.is_kv();
    let mut placement = Placement { among_rows, ..Placement::default() };
    let rows = |text: Option<&str>, special| -> Result<Vec<InputRow>> {
        Ok(tokenizer.encode(text.unwrap_or(""), special)?.into_iter().map(InputRow::Token).collect())
    };
    if card.has_text_before() {
        placement.before = rows(card.prefix_before.as_deref(), true)?;
    }
    if card.has_prefix_text() {
        // The special tokens (BOS) go to the text that stands first, unless virtual tokens do.
        let first = card.begins_with_text(method) && !card.has_text_before();
        placement.after = rows(card.prefix.as_deref(), first)?;
        control_rows(card, tokenizer, &mut placement.after)?;
    }
    check_length(n, placement.text_len(), shape)?;
    Ok(placement)
}

fn check_text_only(card: &TaskCard, placed: bool) -> Result<()> {
    let what = match (placed, card.has_text_before()) {
        (true, _) => "`template` has a place for virtual tokens (`{{ virtual }}`)",
        (_, true) => "`prefix_before` is text before the virtual tokens",
        _ => return Ok(()),
    };
    Err(Error::new(
        Kind::InvalidArgument,
        format!("task.toml: {what}, but there are none: no {} beside it; use `prefix` for text", super::WEIGHTS_FILE),
    ))
}

fn check_kv(card: &TaskCard, placed: bool, method: Method) -> Result<()> {
    let method = method.as_str();
    if placed {
        return Err(Error::precondition(format!(
            "task.toml: `template` has a place for virtual tokens (`{{{{ virtual }}}}`), but {method} stores K and V of \
             its virtual tokens: they stand before everything else, never among a request's rows"
        )));
    }
    if card.has_text_before() {
        return Err(Error::precondition(format!(
            "task.toml: `prefix_before` is text before the virtual tokens, but {method} stores K and V of the first \
             positions, and nothing can be computed before what is stored; use `prefix`, which follows them"
        )));
    }
    Ok(())
}

fn check_encoder(card: &TaskCard, shape: &BaseShape) -> Result<()> {
    let key = match card {
        _ if card.has_text_before() => "prefix_before",
        _ if !card.has_prefix_text() => return Ok(()),
        _ if card.control_tokens.is_empty() => "prefix",
        _ => "control_tokens",
    };
    Err(Error::precondition(format!(
        "task.toml: `{key}` is computed once for all requests, but base `{}` is an encoder: its text sees all of the \
         request, so nothing of it can be shared; put it in the `template`",
        shape.name
    )))
}

fn control_rows(card: &TaskCard, tokenizer: &Tokenizer, rows: &mut Vec<InputRow>) -> Result<()> {
    for (i, token) in card.control_tokens.iter().enumerate() {
        let id = tokenizer.token_to_id(token).ok_or_else(|| {
            let n = tokenizer.encode(token, false).map_or(0, |ids| ids.len());
            Error::precondition(format!(
                "task.toml: `control_tokens[{i}]` is {token:?}, which is no token of the base's vocabulary \
                 (as text it takes {n})"
            ))
        })?;
        rows.push(InputRow::Token(id));
    }
    Ok(())
}

fn check_length(virtual_tokens: usize, text: usize, shape: &BaseShape) -> Result<()> {
    let (len, max) = (virtual_tokens + text, shape.max_model_len);
    if len < max {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "the prefix has {len} positions ({virtual_tokens} virtual tokens, {text} of text), base `{}` has \
         {max} in all and a request needs at least one",
        shape.name
    )))
}
