//! stories260K, a real pretrained Llama: the greedy text that its author published.
use crate::support::{ask_all, data, engine, load, request};
use prefixd::config::DtypeChoice;

#[test]
fn oracle_stories260k_golden_text() {
    let Some(dir) = data("stories260K") else { return };
    let golden = std::fs::read_to_string(dir.join("golden_greedy.txt")).unwrap();
    let model = load(dir.to_str().unwrap(), DtypeChoice::F32);
    let bos = model.tokenizer().encode("", true).unwrap();
    let engine = engine(model, 1024);
    let answer = ask_all(&engine.handle(), vec![request(None, &bos, 511)]).remove(0);
    let equal = golden.chars().zip(answer.text.trim_start().chars()).take_while(|(a, b)| a == b).count();
    println!("{equal} of {} characters", golden.chars().count());
    // The author's program and f32 sums in another order part at the last character.
    assert!(equal >= 564, "{equal}\n{}", answer.text);
}
