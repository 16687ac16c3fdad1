//! Adapters that exist for a run: random weights in the shapes of the server's base, as PEFT would save them.
//!
//! What they say is noise; what they cost (bytes, pages, rows to compile) is what adapters of their size cost.
use super::Progress;
use super::lengths::Lengths;
use super::stop::Stop;
use super::workload::Made;
use crate::adapter::peft::{SavedAdapter, SavedBase, SavedTensor};
use crate::error::{Error, Result};
use crate::rpc::convert;
use crate::rpc::proto::adapter_service_client::AdapterServiceClient;
use crate::rpc::proto::{self, UnloadAdapterRequest, UploadHeader};
use crate::rpc::upload::parts;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Uploads and removals at once: well below what a server takes.
const AT_ONCE: usize = 4;

/// What the adapters are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// K and V of every layer: copied into pages.
    #[default]
    PrefixTuning,
    /// Virtual tokens: run through the model once.
    PromptTuning,
}

impl Method {
    /// As it is given.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::PrefixTuning => "prefix-tuning",
            Method::PromptTuning => "prompt-tuning",
        }
    }
}

/// How adapters are made.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What they are.
    pub method: Method,
    /// Virtual tokens of each.
    pub prefix_len: Lengths,
}

/// The adapters of a run, on the server until [`Pool::remove`].
pub(super) struct Pool {
    client: AdapterServiceClient<Channel>,
    recipe: Recipe,
    model: proto::ModelInfo,
    /// Tokens in the longest sequence: two of them are for prompt and output.
    room: usize,
    seed: u64,
    /// Tells this run's adapters from those of another on the same server.
    run: u32,
    made: Vec<Made>,
}

impl Pool {
    /// None yet, for the server of `facts`.
    pub fn new(channel: Channel, recipe: Recipe, facts: &proto::GetServerInfoResponse, seed: u64) -> Result<Self> {
        let model = facts.model.clone().ok_or_else(|| Error::internal("the server tells nothing of its model"))?;
        Ok(Pool {
            client: AdapterServiceClient::new(channel),
            recipe,
            room: facts.limits.map_or(usize::MAX, |l| l.max_model_len as usize),
            model,
            seed,
            run: rand::random(),
            made: Vec::new(),
        })
    }

    /// Whether none was made.
    pub fn is_empty(&self) -> bool {
        self.made.is_empty()
    }

    /// The first `n`.
    pub fn tenants(&self, n: usize) -> Vec<Made> {
        self.made.iter().take(n).cloned().collect()
    }

    /// Makes and uploads until there are `n`, or until stopped.
    pub async fn grow(&mut self, n: usize, stop: &Stop, watch: &mut dyn FnMut(Progress)) -> Result<()> {
        let mut uploads: JoinSet<Result<()>> = JoinSet::new();
        let (first, mut failure) = (self.made.len(), None);
        let mut done = first;
        while done < n {
            while self.made.len() < n && uploads.len() < AT_ONCE && failure.is_none() && !stop.is_stopped() {
                let (made, adapter) = self.next()?;
                // Before it is there: an upload that fails half-way is removed like the rest.
                self.made.push(made.clone());
                uploads.spawn(upload(self.client.clone(), made.id, adapter));
            }
            match uploads.join_next().await {
                None => break,
                Some(ended) => {
                    let uploaded = ended.unwrap_or_else(|e| Err(Error::internal(format!("upload: {e}"))));
                    failure = failure.or(uploaded.err());
                    done += 1;
                    watch(Progress::Adapters { done, total: n });
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The next adapter: number i of a seed has the same weights in every run.
    fn next(&self) -> Result<(Made, SavedAdapter)> {
        let index = self.made.len();
        let mut rng = StdRng::seed_from_u64(self.seed.rotate_left(32) ^ 0x6164_6170 ^ (index as u64) << 1);
        let prefix_len = self.recipe.prefix_len.draw(&mut rng).clamp(1, self.room.saturating_sub(2).max(1));
        let made = Made { id: format!("bench-{:08x}-{index:05}", self.run), prefix_len };
        Ok((made, random_adapter(self.recipe.method, prefix_len, &self.model, &mut rng)?))
    }

    /// Takes all of them off the server again, from its store too.
    ///
    /// # Errors
    /// The first refusal, after all were tried. One that is not there is as good as removed.
    pub async fn remove(self) -> Result<()> {
        let (mut removals, mut failure) = (JoinSet::new(), None);
        let mut left = self.made.into_iter();
        loop {
            while removals.len() < AT_ONCE
                && let Some(made) = left.next()
            {
                let mut client = self.client.clone();
                removals.spawn(async move {
                    let message = UnloadAdapterRequest { adapter_id: made.id.clone(), generation: None, delete: true };
                    client.unload_adapter(message).await.map(drop).map_err(|status| (made.id, status))
                });
            }
            match removals.join_next().await {
                None => return failure.map_or(Ok(()), Err),
                Some(Ok(Err((id, status)))) if status.code() != Code::NotFound => {
                    failure.get_or_insert(refused(&format!("removal of adapter {id}"), &status));
                }
                Some(_) => {}
            }
        }
    }
}

async fn upload(mut client: AdapterServiceClient<Channel>, id: String, adapter: SavedAdapter) -> Result<()> {
    let files = adapter.files()?.map(|(name, bytes)| (name.to_owned(), bytes));
    let header = UploadHeader { adapter_id: id.clone(), replace: false, pinned: false };
    let messages: Vec<_> = parts(header, files.into()).collect();
    let uploaded = client.upload_adapter(tokio_stream::iter(messages)).await;
    uploaded.map(drop).map_err(|status| refused(&format!("upload of adapter {id}"), &status))
}

fn refused(what: &str, status: &Status) -> Error {
    convert::answered(what, status)
}

/// A folder's content with `prefix_len` virtual tokens of noise.
fn random_adapter(
    method: Method,
    prefix_len: usize,
    model: &proto::ModelInfo,
    rng: &mut StdRng,
) -> Result<SavedAdapter> {
    let (layers, hidden) = (model.num_layers as usize, model.hidden_size as usize);
    let kv_width = model.num_key_value_heads as usize * model.head_dim as usize;
    let (method, heads, token_dim, columns) = match method {
        // Row t viewed as [2 * layers, kv_heads, head_dim].
        Method::PrefixTuning => {
            (crate::adapter::Method::PrefixTuning, model.num_key_value_heads, kv_width, 2 * layers * kv_width)
        }
        Method::PromptTuning => (crate::adapter::Method::PromptTuning, model.num_attention_heads, hidden, hidden),
    };
    if columns == 0 {
        let rule = "the server must tell num_layers, num_key_value_heads, head_dim and hidden_size";
        return Err(Error::invalid("model", "of unknown shape", rule));
    }
    let base = SavedBase {
        name: Some(model.name.clone()),
        num_layers: Some(layers),
        num_heads: Some(heads as usize),
        token_dim: Some(token_dim),
    };
    let mut adapter = SavedAdapter::new(method, prefix_len, "CAUSAL_LM", &base)?;
    let values: Vec<f32> = (0..prefix_len * columns).map(|_| rng.random_range(-0.5..0.5)).collect();
    adapter.tensors.insert("prompt_embeddings".into(), SavedTensor::f32(vec![prefix_len, columns], &values));
    Ok(adapter)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn weights_have_the_shape_of_the_base_and_come_from_the_seed() {
        let model = proto::ModelInfo {
            num_layers: 3,
            num_key_value_heads: 2,
            num_attention_heads: 4,
            head_dim: 8,
            hidden_size: 40,
            ..Default::default()
        };
        let make = |method, seed| random_adapter(method, 5, &model, &mut StdRng::seed_from_u64(seed)).unwrap();
        let shape = |method| make(method, 1).tensors["prompt_embeddings"].shape.clone();
        assert_eq!(shape(Method::PrefixTuning), [5, 2 * 3 * 2 * 8]);
        assert_eq!(shape(Method::PromptTuning), [5, 40]);
        let weights = |seed| make(Method::PrefixTuning, seed).tensors["prompt_embeddings"].bytes.clone();
        assert_eq!(weights(1), weights(1));
        assert_ne!(weights(1), weights(2));
        // A server of an older API tells no head_dim.
        let old = proto::ModelInfo { head_dim: 0, ..model };
        let e = random_adapter(Method::PrefixTuning, 5, &old, &mut StdRng::seed_from_u64(1)).unwrap_err();
        assert!(e.to_string().contains("head_dim"), "{e}");
    }
}
