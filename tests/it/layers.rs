//! The layers of ARCHITECTURE.md: a file imports from its own layer or a lower one, and only `ops` has `unsafe`.
use std::path::{Path, PathBuf};

const LAYERS: &[(&str, usize)] = &[
    ("error", 0),
    ("blocking", 0),
    ("config", 0),
    ("telemetry", 0),
    ("ops", 1),
    ("kv", 2),
    ("adapter", 2),
    ("tokenizer", 2),
    ("model", 3),
    ("engine", 4),
    ("training", 5),
    ("rpc", 6),
    ("server", 7),
    ("cli", 7),
    ("bench", 7),
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    files.sort();
    let read = |p: PathBuf| (p.strip_prefix("src").unwrap().display().to_string(), std::fs::read_to_string(p).unwrap());
    files.into_iter().map(read).collect()
}

/// Names after each `crate::` in code (not in comments).
fn imports(text: &str) -> Vec<String> {
    let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for line in code {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            if let Some(group) = rest.strip_prefix('{') {
                found.extend(group.split(',').map(|s| word(s.trim())));
            } else {
                found.push(word(rest));
            }
        }
    }
    found
}

#[test]
fn no_import_runs_up_a_layer() {
    let mut checked = 0;
    for (file, text) in all_sources() {
        let module = file.split(['/', '.']).next().unwrap();
        let Some(own) = layer(module) else {
            assert!(matches!(module, "lib" | "main"), "{file}: give {module} a layer in tests/it/layers.rs");
            continue;
        };
        for import in imports(&text) {
            let Some(other) = layer(&import) else { continue };
            checked += 1;
            assert!(other <= own, "{file} (layer {own}) imports crate::{import} (layer {other})");
            let pair = [module, import.as_str()];
            assert!(pair != ["engine", "training"] && pair != ["training", "engine"], "{file} imports {import}");
        }
    }
    assert!(checked > 50, "{checked} imports seen");
}

#[test]
fn unsafe_lives_in_ops_alone() {
    for (file, text) in all_sources() {
        let code = text.lines().filter(|l| !l.trim_start().starts_with("//")).any(|l| l.contains("unsafe "));
        assert!(!code || file.starts_with("ops"), "{file} has unsafe code");
    }
}
