//! `prefixd train`, `prefixd jobs` and `prefixd eval`, as they are typed.
use super::*;
use serde_json::Value;
use std::process::{Command, Output};

/// The server's address and the folder that commands run in.
struct Shell<'a> {
    served: &'a Served,
    dir: &'a Path,
}

impl Shell<'_> {
    fn run(&self, arguments: &str) -> Output {
        let address = self.served.address.trim_start_matches("http://");
        let mut command = Command::new(env!("CARGO_BIN_EXE_prefixd"));
        // `~` stands for a space within an argument.
        command
            .args(arguments.split_whitespace().map(|a| a.replace('~', " ")))
            .args(["--server", address])
            .current_dir(self.dir);
        // The server answers on the runtime's other threads.
        tokio::task::block_in_place(|| command.output()).unwrap()
    }

    /// What a command that succeeds prints for people.
    fn text(&self, arguments: &str) -> String {
        let out = self.run(arguments);
        let (told, said) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8_lossy(&out.stderr).into_owned());
        assert!(out.status.success(), "prefixd {arguments}: {told}{said}");
        told
    }

    /// The object that it prints for programs.
    fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{arguments} --output json"))).unwrap()
    }

    /// What one that fails says, with its exit code.
    fn failure(&self, arguments: &str) -> (i32, String) {
        let out = self.run(arguments);
        (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_trained_and_measured_by_commands() {
    let dir = tempfile::tempdir().unwrap();
    let served = server(None, TrainingConfig::default()).await;
    let shell = Shell { served: &served, dir: dir.path() };
    let lines = |n: usize| -> String {
        let line = |e: &proto::TrainingExample| {
            format!("{}\n", serde_json::json!({ "input": e.input, "target": e.targets[0] }))
        };
        examples(n).iter().map(line).collect()
    };
    for (file, text) in [("data.jsonl", lines(24)), ("eval.jsonl", lines(10)), ("task.toml", CARD.to_owned())] {
        std::fs::write(dir.path().join(file), text).unwrap();
    }
    let train = "train data.jsonl --card task.toml --virtual-tokens 5 --batch-size 4";
    let done = shell.json(&format!("{train} --adapter mood --steps 12 --eval eval.jsonl --eval-interval 6"));
    let job = &done["job"];
    assert!(job["state"] == "SUCCEEDED" && job["step"] == 12 && job["generation"].as_u64() > Some(0), "{job}");
    assert!(done["evaluation"]["scores"]["exact_match"].as_f64().unwrap() > 0.9, "{done}");
    let curve = std::fs::read_to_string(dir.path().join("mood-loss.svg")).unwrap();
    assert!(curve.starts_with("<svg") && curve.contains("polyline") && curve.contains("evaluation"), "{curve}");

    // For people: a line on what changed, and one on the curve; a name of the server's instead of a file.
    let told =
        shell.text(&format!("{train} --adapter again --steps 6 --curve c.svg").replace("data.jsonl", "mood.train"));
    for part in ["by prefix_tuning, 5 virtual tokens, 24 examples, 6 steps", "bare base", "-> again", "curve: c.svg"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(dir.path().join("c.svg").is_file());

    let id = job["job_id"].as_str().unwrap();
    let all = shell.json("jobs list");
    assert_eq!((all["jobs"].as_array().unwrap().len(), &all["jobs"][0]["job_id"]), (2, &job["job_id"]));
    assert!(shell.text("jobs list").lines().next().unwrap().contains("SUCCEEDED"));
    assert_eq!(&shell.json(&format!("jobs watch {id}"))["job"]["state"], "SUCCEEDED");

    let measured = shell.json("eval eval.jsonl --adapter mood --limit 8");
    assert_eq!(measured["examples"], 8);
    assert!(measured["scores"]["macro_f1"].as_f64().unwrap() > measured["base_scores"]["macro_f1"].as_f64().unwrap());
    let table = shell.text("eval eval.jsonl --adapter mood --generate");
    for part in ["10 examples", "bare base", "exact match", "BLEU", "ROUGE-L", "perplexity"] {
        assert!(table.contains(part), "{part}: {table}");
    }

    // Lines that are longer than the context are left out, of training and of what is measured; a template's line end is typed `\n`.
    let long = serde_json::json!({ "input": "soup ".repeat(2000), "target": "positive" });
    std::fs::write(dir.path().join("long.jsonl"), format!("{}{long}\n", lines(20))).unwrap();
    let template = "--target-template {{~target~}}\\n";
    let done = shell.json(&format!("train long.jsonl --adapter words --steps 4 --virtual-tokens 5 {template}"));
    let at_end = &done["evaluation"];
    assert_eq!((&at_end["examples"], &at_end["too_long"]), (&20.into(), &1.into()), "{done}");
    let measured = shell.json(&format!("eval long.jsonl --adapter words {template}"));
    assert_eq!(measured["scores"]["perplexity"], at_end["scores"]["perplexity"]);
    assert!(shell.text("eval long.jsonl --adapter words").contains("20 examples (1 more do not fit into the context)"));

    // One that is left alone, then ended; and what is asked wrongly.
    let detached = shell.json(&format!("{train} --adapter endless --steps 1000000 --detach"));
    let endless = detached["job_id"].as_str().unwrap();
    assert_eq!(&shell.json(&format!("jobs cancel {endless}"))["job"]["state"], "CANCELLED");
    let (code, said) = shell.failure(&format!("jobs watch {endless}"));
    assert!(code == 1 && said.contains("CANCELLED"), "{code} {said}");
    let (code, said) = shell.failure(&format!("{train} --adapter mood --steps 5"));
    assert!(code == 1 && said.contains("replace"), "{code} {said}");
    let (code, said) = shell.failure("train nothing.jsonl --adapter new");
    assert!(code == 2 && said.contains("nothing.jsonl: no such file"), "{code} {said}");
    let (code, said) = shell.failure(&format!("{train} --adapter new --reparametrisation lstm"));
    assert!(code != 0 && said.contains("settings.reparametrisation"), "{code} {said}");
}
