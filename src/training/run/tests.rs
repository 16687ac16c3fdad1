#![allow(clippy::unwrap_used)]
use super::*;
use crate::adapter::InputRow;
use crate::model::{LoadOptions, source};
use crate::training::settings::TrainMethod;
use crate::training::step::Goal;

#[test]
fn epochs_are_permutations_or_the_data_as_it_is() {
    let shuffled = Order::new(10, Some(3)).places(0..30);
    let (first, second) = (&shuffled[..10], &shuffled[10..20]);
    for epoch in [first, second] {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    assert!(first != second && !first.is_sorted());
    // Steps that straddle an epoch's end go on in the same order.
    let mut on = Order::new(10, Some(3));
    assert_eq!(on.places(7..23), shuffled[7..23]);
    // Back, too: a checkpoint is where it is.
    assert_eq!(on.places(2..5), shuffled[2..5]);
    assert_eq!(Order::new(3, None).places(2..8), [2, 0, 1, 2, 0, 1]);
}

/// A run of three starts of two steps each.
fn three_starts(model: &Model) -> Run {
    Run::new(model, Arc::new(three_starts_plan()), None).unwrap()
}

fn three_starts_plan() -> Plan {
    let settings = Settings { method: TrainMethod::PromptTuning, init: Init::SampledVocabulary, ..Settings::default() };
    let settings = Settings { restarts: 3, max_steps: 2, batch_size: 1, ..settings }.checked(256).unwrap();
    let rows = vec![InputRow::Token(5), InputRow::Token(6)];
    let train = vec![Example { task: 0, rows, goal: Goal::Tokens(vec![None, Some(6)]) }];
    let (before, after, init_text, evaluation) = Default::default();
    let placement = Placement::VirtualTokens;
    Plan { settings, placement, before, after, init_text, labels: 0, train, evaluation }
}

/// What a batch of loss `nll` would be.
fn take(run: &mut Run, model: &Model, nll: f64) -> Result<Report> {
    let gradients = run.job().weights().map(|(_, var)| Ok((var.ones_like()? * 0.1)?)).collect::<Result<Vec<_>>>()?;
    let outcome = Outcome { nll, targets: 1, examples: 1, rows: 2, gradients: Some(gradients), ..Outcome::default() };
    Ok(run.take(model, outcome, Duration::from_millis(1))?.unwrap())
}

/// A start that diverges leaves nothing; what another one came to is the result.
#[test]
fn a_start_that_diverges_is_given_up_for_the_others() {
    let model = Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap();
    let mut run = three_starts(&model);
    take(&mut run, &model, 1.0).unwrap();
    let report = take(&mut run, &model, f64::NAN).unwrap();
    let lost = |r: &Report| matches!(&r.what, Happened::Diverged { reason } if reason.contains("loss of step"));
    assert!(lost(&report) && (report.restart, report.step) == (0, 1), "{report:?}");
    assert_eq!((run.progress().restart, run.progress().step), (1, 0));
    take(&mut run, &model, 2.0).unwrap();
    take(&mut run, &model, 1.5).unwrap();
    assert_eq!(run.progress().restart, 2);
    let better = run.kept[CHAMPION][0].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(lost(&take(&mut run, &model, f64::INFINITY).unwrap()));
    assert!(run.progress().done);
    let (_, result) = run.job().weights().next().unwrap();
    assert_eq!(result.flatten_all().unwrap().to_vec1::<f32>().unwrap(), better);

    let mut run = three_starts(&model);
    assert!(lost(&take(&mut run, &model, f64::NAN).unwrap()) && lost(&take(&mut run, &model, f64::NAN).unwrap()));
    let e = take(&mut run, &model, f64::NAN).unwrap_err();
    assert!(e.kind() == Kind::FailedPrecondition && e.to_string().contains("each of 3 restarts"), "{e}");
}

/// Without an evaluation, the start whose last epoch was the best one is the result, not that whose last batch was.
#[test]
fn a_start_is_judged_by_its_last_epoch() {
    let model = Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap();
    let mut plan = three_starts_plan();
    plan.train.extend_from_within(..);
    plan.settings.restarts = 2;
    let mut run = Run::new(&model, Arc::new(plan), None).unwrap();
    // Means of 2 and of 3; the last batch of the second start is the best one.
    for nll in [1.0, 3.0] {
        take(&mut run, &model, nll).unwrap();
    }
    let better = run.kept[CHAMPION][0].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for nll in [5.0, 1.0] {
        take(&mut run, &model, nll).unwrap();
    }
    assert!(run.progress().done);
    let (_, result) = run.job().weights().next().unwrap();
    assert_eq!(result.flatten_all().unwrap().to_vec1::<f32>().unwrap(), better);
}
