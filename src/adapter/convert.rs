//! Adapters of other layouts, made into folders as PEFT writes them. Offline: the server reads none of these.
//!
//! | source | becomes |
//! |---|---|
//! | a PEFT folder, weights in safetensors or `adapter_model.bin` | the same folder, weights in safetensors |
//! | `*prefix_encoder.embedding.weight [n, 2*L*H*D]` (ChatGLM, P-tuning v2) | PREFIX_TUNING |
//! | the same `[n, e]` with `*prefix_encoder.trans.0`, `.trans.2` | PREFIX_TUNING, the projection applied |
//! | `decoder.pt`, a bare tensor `[n, d]` (TGIS, caikit) | PROMPT_TUNING |
//!
//! Both rows of a prefix encoder and PEFT's are viewed as `[2*L, H, D]`: K of layer 0, V of layer 0, K of layer 1...
//! What cannot be placed is refused by name, never dropped.
mod layouts;
mod pickle;

use super::peft::{self, SavedAdapter, SavedBase, SavedTensor};
use crate::error::{Context, Error, Kind, Result};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The base that stored K and V are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvShape {
    /// Name for the config.
    pub name: Option<String>,
    /// Layers L.
    pub num_layers: usize,
    /// KV heads H.
    pub num_kv_heads: usize,
    /// Width D of a head.
    pub head_dim: usize,
}

/// Tensors by name; a bare tensor has the empty name.
type Tensors = BTreeMap<String, SavedTensor>;

/// Files that go along with an adapter as they are.
const ALONG: [&str; 3] = [peft::CARD_FILE, "README.md", "examples.jsonl"];
/// PEFT's weights before safetensors.
const PICKLED_WEIGHTS: &str = "adapter_model.bin";
/// Largest file read: all of it is held in memory.
const MAX_FILE_BYTES: u64 = 16 << 30;

/// Converts `src`, a folder or a file of weights, into the folder `dst`, which appears whole or not at all.
///
/// # Errors
/// `AlreadyExists` for a `dst` that is there; otherwise what of `src` cannot be read or placed, by name.
pub fn convert(src: &Path, dst: &Path, shape: Option<&KvShape>) -> Result<SavedAdapter> {
    if dst.exists() {
        return Err(Error::new(Kind::AlreadyExists, format!("{}: is there already", dst.display())));
    }
    let adapter = read(src, shape)?;
    let disk = |e: std::io::Error| Error::internal(format!("{}: {e}", dst.display()));
    let parent = dst.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(disk)?;
    let staging = tempfile::Builder::new().prefix(".prefixd-convert-").tempdir_in(parent).map_err(disk)?;
    let folder = staging.path().join("adapter");
    peft::save(&folder, &adapter)?;
    for name in ALONG {
        let file = src.join(name);
        if file.is_file() {
            fs::copy(&file, folder.join(name)).map_err(disk)?;
        }
    }
    fs::rename(&folder, dst).map_err(disk)?;
    Ok(adapter)
}

/// Reads `src` and says what it is.
fn read(src: &Path, shape: Option<&KvShape>) -> Result<SavedAdapter> {
    if src.is_file() {
        return layouts::place(&file_name(src), tensors(src)?, shape);
    }
    if !src.is_dir() {
        return Err(Error::new(Kind::InvalidArgument, format!("{}: no such file or folder", src.display())));
    }
    let config = src.join(peft::CONFIG_FILE);
    if config.is_file() {
        let json = fs::read(&config).or_kind(Kind::InvalidArgument, config.display())?;
        let weights = [peft::WEIGHTS_FILE, PICKLED_WEIGHTS].map(|name| src.join(name));
        let weights = weights.iter().find(|path| path.is_file()).ok_or_else(|| {
            let names = format!("neither {} nor {PICKLED_WEIGHTS} lies beside it", peft::WEIGHTS_FILE);
            Error::new(Kind::InvalidArgument, format!("{}: {names}", config.display()))
        })?;
        return layouts::peft(&json, tensors(weights)?);
    }
    if src.join("encoder.pt").is_file() {
        return Err(Error::precondition(format!(
            "{}: encoder.pt holds virtual tokens of an encoder-decoder's encoder, and prefixd serves decoders and \
             encoders alone",
            src.display()
        )));
    }
    let weights = only_weights(src)?;
    layouts::place(&file_name(&weights), tensors(&weights)?, shape)
}

/// The one file of weights in a folder.
fn only_weights(dir: &Path) -> Result<PathBuf> {
    let known = ["safetensors", "bin", "pt", "pth"];
    let entries = fs::read_dir(dir).or_kind(Kind::InvalidArgument, dir.display())?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.extension().and_then(|x| x.to_str()).is_some_and(|x| known.contains(&x)));
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => {
            let text =
                format!("{}: no {} and no *.safetensors, *.bin, *.pt or *.pth", dir.display(), peft::CONFIG_FILE);
            Err(Error::new(Kind::InvalidArgument, text))
        }
        many => {
            let names: Vec<_> = many.iter().take(5).map(|path| file_name(path)).collect();
            let text = format!("{}: {} files of weights ({}); name one", dir.display(), many.len(), names.join(", "));
            Err(Error::new(Kind::InvalidArgument, text))
        }
    }
}

/// All tensors of a file.
fn tensors(path: &Path) -> Result<Tensors> {
    let name = file_name(path);
    let size = fs::metadata(path).or_kind(Kind::InvalidArgument, path.display())?.len();
    if size > MAX_FILE_BYTES {
        let text = format!("{name}: {size} bytes, at most {MAX_FILE_BYTES} are read");
        return Err(Error::new(Kind::InvalidArgument, text));
    }
    if !name.ends_with(".safetensors") {
        return pickle::tensors(path).map_err(|e| e.context(name));
    }
    let bytes = fs::read(path).or_kind(Kind::InvalidArgument, path.display())?;
    let all = SafeTensors::deserialize(&bytes).or_kind(Kind::InvalidArgument, &name)?;
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let tensor = SavedTensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
        (name, tensor)
    };
    Ok(all.tensors().into_iter().map(tensor).collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
