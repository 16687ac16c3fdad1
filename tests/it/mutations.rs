//! The oracles can fail: each way to get a model or a prefix wrong moves some logit by five times the tolerance or more.
use crate::oracle::{Case, LOGIT_TOLERANCE, models};
use crate::support::{self, logits, logits_with};
use prefixd::adapter::{KvRows, Prefix};
use prefixd::config::DtypeChoice;
use prefixd::model::Model;
use prefixd::model::batch::Batch;
use prefixd::model::config::ModelConfig;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const CAUGHT: f32 = 5.0 * LOGIT_TOLERANCE;

/// A change of a `config.json`; false: this model has nothing to change there.
type Change = fn(&mut Value) -> bool;

/// The object that holds the rotary parameters of the full layers.
fn rope(v: &mut Value) -> &mut Value {
    let key = ["rope_parameters", "rope_scaling"].into_iter().find(|k| v[*k].is_object());
    match key {
        None => v,
        Some(key) if v[key]["full_attention"].is_object() => &mut v[key]["full_attention"],
        Some(key) => &mut v[key],
    }
}

fn scale(v: &mut Value, key: &str, by: f64) -> bool {
    let Some(x) = v[key].as_f64() else { return false };
    v[key] = if v[key].is_u64() { ((x * by) as u64).into() } else { (x * by).into() };
    true
}

fn shift(v: &mut Value, key: &str, by: i64) -> bool {
    let Some(x) = v[key].as_i64() else { return false };
    v[key] = (x + by).into();
    true
}

fn remove(v: &mut Value, key: &str) -> bool {
    !v[key].is_null() && v.as_object_mut().is_some_and(|o| o.remove(key).is_some())
}

fn flip(v: &mut Value, key: &str) -> bool {
    let Some(x) = v[key].as_bool() else { return false };
    v[key] = (!x).into();
    true
}

const CHANGES: &[(&str, Change)] = &[
    ("rope theta", |v| {
        scale(v, "rope_theta", 1.5) | (rope(v)["rope_type"].is_string() && scale(rope(v), "rope_theta", 1.5))
    }),
    ("rope type", |v| {
        let p = rope(v);
        let key = if p["type"].is_string() { "type" } else { "rope_type" };
        // Dynamic scaling is the identity within the model's own length.
        let scaled = p[key].as_str().is_some_and(|t| !matches!(t, "default" | "dynamic"));
        if scaled {
            p[key] = "default".into();
        }
        scaled
    }),
    ("rope factor", |v| {
        rope(v)["rope_type"] != "dynamic" && rope(v)["rope_type"] != "longrope" && scale(rope(v), "factor", 1.5)
    }),
    ("rope ramp", |v| {
        matches!(rope(v)["rope_type"].as_str(), Some("yarn" | "llama3"))
            && scale(rope(v), "original_max_position_embeddings", 4.0)
    }),
    ("rope attention factor", |v| scale(rope(v), "attention_factor", 1.1)),
    ("short and long factors", |v| {
        let p = rope(v);
        let (short, long) = (p["short_factor"].take(), p["long_factor"].take());
        let there = short.is_array();
        (p["short_factor"], p["long_factor"]) = (long, short);
        if !there {
            remove(p, "short_factor");
            p.as_object_mut().map(|o| (o.remove("short_factor"), o.remove("long_factor")));
        }
        there
    }),
    ("rotary share", |v| {
        let p = rope(v);
        let share = p["partial_rotary_factor"].as_f64().filter(|s| *s < 1.0);
        share.map(|s| p["partial_rotary_factor"] = json!(s * 2.0)).is_some()
    }),
    ("local theta", |v| {
        v["rope_parameters"]["sliding_attention"].is_object()
            && scale(&mut v["rope_parameters"]["sliding_attention"], "rope_theta", 1.5)
    }),
    ("wider window", |v| slides(v) && shift(v, "sliding_window", 1)),
    ("narrower window", |v| slides(v) && shift(v, "sliding_window", -1)),
    ("window in other layers", |v| {
        let types = v["layer_types"].as_array_mut().filter(|_| true);
        let Some(types) = types else { return false };
        if types.iter().all(|t| t == "full_attention") {
            return false;
        }
        for t in types {
            *t = if *t == "full_attention" { "sliding_attention" } else { "full_attention" }.into();
        }
        true
    }),
    ("attention cap", |v| remove(v, "attn_logit_softcapping")),
    ("logit cap", |v| remove(v, "final_logit_softcapping")),
    ("query scale", |v| scale(v, "query_pre_attn_scalar", 1.5)),
    ("parallel residual", |v| flip(v, "use_parallel_residual")),
    ("scale by layer", |v| v["scale_attn_by_inverse_layer_idx"] == true && flip(v, "scale_attn_by_inverse_layer_idx")),
    ("norm epsilon", |v| {
        ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"].iter().any(|k| {
            !v[*k].is_null() && {
                v[*k] = json!(0.05);
                true
            }
        })
    }),
    ("the other gelu", |v| {
        ["hidden_activation", "hidden_act", "activation_function"].iter().any(|k| {
            let other = match v[*k].as_str() {
                Some("gelu") => "gelu_pytorch_tanh",
                Some("gelu_new" | "gelu_pytorch_tanh") => "gelu",
                _ => return false,
            };
            v[*k] = other.into();
            true
        })
    }),
    ("activation", |v| {
        ["hidden_activation", "hidden_act", "activation_function"].iter().any(|k| {
            v[*k].is_string() && {
                v[*k] = if v[*k] == "silu" { "gelu" } else { "silu" }.into();
                true
            }
        })
    }),
];

fn slides(v: &Value) -> bool {
    !v["sliding_window"].is_null() && v["use_sliding_window"] != false
}

/// The largest difference over all causal cases of a model, each with its own prefix.
fn worst(model: &Model, cases: &[Case]) -> f32 {
    let of = |case: &Case| case.compare(|t| logits(model, case.loaded.as_ref().and_then(|l| l.prefix.as_deref()), t)).1;
    cases.iter().filter(|case| !case.writes_classes()).map(of).fold(0.0, |a, b| if b <= a { a } else { b })
}

/// A model folder with another `config.json`.
fn changed(dir: &Path, config: &Value) -> prefixd::error::Result<Model> {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        std::fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    support::try_load(copy.path().to_str().unwrap(), DtypeChoice::Auto)
}

#[test]
fn a_wrong_fact_of_a_model_is_caught() {
    let mut caught: BTreeMap<&str, usize> = BTreeMap::new();
    for dir in models() {
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let model = support::load(dir.to_str().unwrap(), DtypeChoice::Auto);
        if model.info().encoder {
            continue;
        }
        let cases = Case::all(&model, &dir);
        for (what, change) in CHANGES {
            let mut wrong = config.clone();
            if !change(&mut wrong) {
                continue;
            }
            // Refused is caught as well.
            let Ok(model) = changed(&dir, &wrong) else { continue };
            let worst = worst(&model, &cases);
            println!("{}: {what}: {worst:.1e}", dir.file_name().unwrap().display());
            assert!(worst.is_nan() || worst > CAUGHT, "{}: {what} went unseen: {worst}", dir.display());
            *caught.entry(what).or_default() += 1;
        }
    }
    println!("{caught:#?}");
}

/// What may go wrong with stored K and V: `[len, 2 * layers, kv_heads, head_dim]` in and out.
type Spoil = fn(&mut Vec<f32>, &Shape);

struct Shape {
    layers: usize,
    heads: usize,
    dim: usize,
    config: ModelConfig,
}

impl Shape {
    fn rows<'a>(&self, data: &'a mut [f32]) -> Vec<&'a mut [f32]> {
        data.chunks_exact_mut(2 * self.layers * self.heads * self.dim).collect()
    }

    /// Every head of K: row, layer, its elements.
    fn keys(&self, data: &mut [f32], mut f: impl FnMut(usize, usize, &mut [f32])) {
        let width = self.heads * self.dim;
        for (t, row) in self.rows(data).into_iter().enumerate() {
            for (part, heads) in row.chunks_exact_mut(width).enumerate().filter(|(part, _)| part % 2 == 0) {
                heads.chunks_exact_mut(self.dim).for_each(|head| f(t, part / 2, head));
            }
        }
    }
}

const SPOILS: &[(&str, Spoil)] = &[
    ("K rotated", |data, s| {
        let tables: Vec<_> = s.config.ropes.iter().map(|r| r.frequencies(s.config.default_positions)).collect();
        s.keys(data, |t, layer, head| {
            let Some(rope) = s.config.layers[layer].rope else { return };
            for (i, f) in tables[rope].0.iter().enumerate() {
                let (sin, cos) = (t as f32 * f).sin_cos();
                let half = tables[rope].0.len();
                let (a, b) = (head[i], head[i + half]);
                (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        });
    }),
    ("K normed", |data, s| {
        s.keys(data, |_, _, head| {
            let mean = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
            head.iter_mut().for_each(|x| *x /= mean.sqrt());
        });
    }),
    ("K and V swapped", |data, s| {
        let width = s.heads * s.dim;
        for row in s.rows(data) {
            row.chunks_exact_mut(2 * width).for_each(|pair| pair.rotate_left(width));
        }
    }),
    ("layers in reverse", |data, s| {
        let width = 2 * s.heads * s.dim;
        for row in s.rows(data) {
            let reversed: Vec<f32> = row.chunks_exact(width).rev().flatten().copied().collect();
            row.copy_from_slice(&reversed);
        }
    }),
    ("heads rolled", |data, s| {
        if s.heads > 1 {
            s.rows(data)
                .into_iter()
                .for_each(|row| row.chunks_exact_mut(s.heads * s.dim).for_each(|h| h.rotate_left(s.dim)));
        } else {
            data.iter_mut().for_each(|x| *x = -*x);
        }
    }),
    ("zeros", |data, _| data.fill(0.0)),
];

/// What may go wrong with a batch.
type Harm = fn(&mut Batch);

const HARMS: &[(&str, Harm)] = &[
    ("text positions from 0", |b| {
        let prefix = b.sequences[0].prefix_len as u32;
        b.positions.iter_mut().for_each(|p| *p -= prefix);
    }),
    ("text positions one on", |b| {
        let prefix = b.sequences[0].prefix_len as u32;
        b.positions.iter_mut().for_each(|p| *p += u32::from(prefix > 0));
    }),
    ("last prefix row unseen", |b| {
        let s = &mut b.sequences[0];
        s.prefix_len = s.prefix_len.saturating_sub(1);
    }),
];

#[test]
fn a_wrong_prefix_is_caught() {
    let mut seen = 0;
    for dir in models() {
        let config = ModelConfig::parse(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let model = support::load(dir.to_str().unwrap(), DtypeChoice::Auto);
        let info = model.info();
        if info.encoder {
            continue;
        }
        let shape = Shape { layers: info.num_layers, heads: info.num_kv_heads, dim: info.head_dim, config };
        for case in Case::all(&model, &dir).iter().filter(|case| !case.writes_classes()) {
            let Some(prefix) = case.loaded.as_ref().and_then(|l| l.prefix.as_deref()) else { continue };
            let caught = |what: &str, worst: f32| {
                println!("{}: {what}: {worst:.1e}", case.dir.display());
                assert!(worst.is_nan() || worst > CAUGHT, "{}: {what} went unseen: {worst}", case.dir.display());
            };
            for (what, harm) in HARMS {
                caught(what, case.compare(|t| logits_with(&model, Some(prefix), t, harm)).1);
            }
            if let Some(kv) = &prefix.kv {
                for (what, spoil) in SPOILS {
                    let rotates = shape.config.layers.iter().any(|l| l.rope.is_some());
                    if *what == "K rotated" && !rotates {
                        continue;
                    }
                    let mut data = kv.data.to_vec();
                    spoil(&mut data, &shape);
                    let wrong = Prefix::new(Some(KvRows { len: kv.len, data: data.into() }), vec![], Arc::new([]));
                    caught(what, case.compare(|t| logits(&model, wrong.as_ref(), t)).1);
                }
            } else {
                let width = info.hidden_size;
                // As Gemma scales its tokens.
                let scaled: Vec<f32> = prefix.soft.iter().map(|x| x * (width as f32).sqrt()).collect();
                let reversed: Vec<f32> = prefix.soft.chunks_exact(width).rev().flatten().copied().collect();
                for (what, soft) in [("virtual tokens scaled", scaled), ("virtual tokens in reverse", reversed)] {
                    let wrong = Prefix::new(None, prefix.rows.clone(), soft.into());
                    caught(what, case.compare(|t| logits(&model, wrong.as_ref(), t)).1);
                }
            }
            seen += 1;
        }
    }
    println!("{seen} adapters spoiled in every way");
}
