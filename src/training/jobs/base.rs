//! What jobs know of the model that they train on.
use crate::adapter::BaseShape;
use crate::error::Result;
use crate::model::{Model, ModelInfo};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::ChatTemplate;

/// The base that jobs train on.
pub struct Base {
    /// What adapters must agree with.
    pub shape: BaseShape,
    /// Its facts.
    pub info: ModelInfo,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it words conversations; else why it cannot.
    pub chat_template: Result<ChatTemplate>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// Bytes of activations that a row takes in a layer.
    pub row_bytes: usize,
}

impl Base {
    /// What jobs must know of a model.
    pub fn of(model: &Model) -> Self {
        Base {
            shape: model.shape(),
            info: model.info().clone(),
            tokenizer: model.tokenizer().clone(),
            chat_template: model.chat_template().clone(),
            eos: model.eos_token_ids().first().copied(),
            row_bytes: model.activation_bytes_per_row(),
        }
    }

    /// What a job is tied to: a resumed one must find the same base.
    pub(super) fn name(&self) -> String {
        let i = &self.info;
        format!("{} ({}, {} parameters, {})", i.name, i.family, i.num_parameters, i.dtype)
    }
}
