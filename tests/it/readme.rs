//! The README's tables of families and adapter kinds say what the code has.
use prefixd::adapter::{Method, TaskCard};
use prefixd::model::config::{FAMILIES, Family, Positions, Residual};

/// The lines between `<!-- name -->` and `<!-- end name -->` of the README.
fn block(name: &str) -> String {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, rest) = readme.split_once(&format!("<!-- {name} -->\n")).unwrap_or_else(|| panic!("README has no {name}"));
    rest.split_once(&format!("<!-- end {name} -->")).unwrap().0.to_owned()
}

fn facts(f: &Family) -> String {
    let positions = match f.positions {
        Positions::Rotary(1.0) => "RoPE".to_owned(),
        Positions::Rotary(share) => format!("RoPE on {:.0} % of a head", share * 100.0),
        Positions::RotaryByLayer => "RoPE by kind of layer".to_owned(),
        Positions::Learned(_) => "learned positions".to_owned(),
    };
    let mut all = vec![positions];
    let mut add = |yes: bool, what: &str| all.extend(yes.then(|| what.to_owned()));
    add(f.windows != prefixd::model::config::Windows::Never, "sliding windows");
    add(f.head_norm, "q/k norm");
    add(f.residual == Residual::Parallel, "parallel residual");
    add(f.scaled_embedding, "scaled token embeddings");
    add(f.encoder, "encoder: Classify only");
    all.join(", ")
}

#[test]
fn families_are_those_of_the_code() {
    let mut want = String::from("| family | `architectures` | |\n|---|---|---|\n");
    for f in FAMILIES {
        want += &format!("| {} | {} | {} |\n", f.name, f.architectures.join(", "), facts(f));
    }
    assert!(block("families") == want, "the README's table should be:\n{want}");
}

#[test]
fn kinds_are_those_of_the_code() {
    let mut want = String::from("| `peft_type` | is served as |\n|---|---|\n");
    for method in Method::PEFT {
        let served = match (method.is_kv(), method) {
            (true, _) => "K and V of every layer, used as stored",
            (_, Method::MultitaskPromptTuning) => "virtual tokens of the card's task or the request's `task_id`",
            _ => "virtual tokens",
        };
        want += &format!("| {} | {served} |\n", method.as_str());
    }
    assert!(block("kinds") == want, "the README's table should be:\n{want}");
}

/// The card in the README names every key there is, and is a sound card.
#[test]
fn the_task_card_is_one() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let card = TaskCard::parse(rest.split_once("```").unwrap().0).unwrap();
    assert_eq!(card.labels, ["good", "bad"]);
    let source = std::fs::read_to_string("src/adapter/task.rs").unwrap();
    let (_, fields) = source.split_once("pub struct TaskCard {").unwrap();
    for line in fields.split_once("\n}").unwrap().0.lines().map(str::trim) {
        let Some((field, _)) =
            line.trim_start_matches("pub ").split_once(": ").filter(|_| !line.starts_with(['/', '#']))
        else {
            continue;
        };
        assert!(field == "num_virtual_tokens" || readme.contains(field), "the README lacks `{field}`");
    }
}
