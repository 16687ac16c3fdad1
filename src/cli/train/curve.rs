//! The loss over the steps as a picture.
use crate::rpc::proto;
use plotters::prelude::*;
use std::path::Path;

/// Size of the picture.
const SIZE: (u32, u32) = (720, 400);

/// What was reported of a job.
#[derive(Default)]
pub(in crate::cli) struct Curve {
    steps: Vec<proto::TrainingStep>,
    evaluations: Vec<proto::TrainingEvaluation>,
}

impl Curve {
    pub fn step(&mut self, step: proto::TrainingStep) {
        self.steps.push(step);
    }

    pub fn evaluation(&mut self, evaluation: proto::TrainingEvaluation) {
        self.evaluations.push(evaluation);
    }

    /// Steps seen.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// The loss in one line of `width` characters, the highest one at the top.
    pub fn sparkline(&self, width: usize) -> String {
        let marks = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let most = self.steps.iter().map(|s| s.loss).fold(0.0, f64::max).max(1e-9);
        let (n, width) = (self.steps.len(), width.min(self.steps.len()));
        let mean = |i: usize| {
            let part = &self.steps[i * n / width..((i + 1) * n / width).max(i * n / width + 1)];
            part.iter().map(|s| s.loss).sum::<f64>() / part.len() as f64
        };
        (0..width).map(|i| marks[((mean(i) / most * 7.0).round() as usize).min(7)]).collect()
    }

    /// Loss of the first and of the last step.
    pub fn ends(&self) -> Option<(f64, f64)> {
        Some((self.steps.first()?.loss, self.steps.last()?.loss))
    }
}

/// An SVG with the loss of every step, one line a restart, and a dot an evaluation.
pub(in crate::cli) fn draw(curve: &Curve, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let losses = curve.steps.iter().map(|s| s.loss).chain(curve.evaluations.iter().map(|e| e.loss));
    let most = losses.filter(|l| l.is_finite()).fold(0.0, f64::max).max(1e-6);
    let last = curve.steps.iter().map(|s| s.step).max().unwrap_or(1).max(2);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(14)
            .x_label_area_size(44)
            .y_label_area_size(58)
            .build_cartesian_2d(1..last, 0.0..most * 1.05)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_style(RGBColor(120, 120, 120))
            .x_desc("step")
            .y_desc("loss (nats a token)")
            .label_style(("sans-serif", 14))
            .axis_desc_style(("sans-serif", 15))
            .draw()?;
        let restarts = curve.steps.iter().map(|s| s.restart).max().unwrap_or(0);
        for restart in 0..=restarts {
            let line = curve.steps.iter().filter(|s| s.restart == restart).map(|s| (s.step, s.loss));
            // The last one stands out.
            let shade = if restart == restarts { RGBColor(31, 98, 178) } else { RGBColor(170, 190, 215) };
            let drawn = chart.draw_series(LineSeries::new(line, shade.stroke_width(2)))?;
            if restart == restarts {
                drawn
                    .label("training")
                    .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], shade.stroke_width(2)));
            }
        }
        if !curve.evaluations.is_empty() {
            let shade = RGBColor(200, 80, 30);
            let dots = curve.evaluations.iter().map(|e| Circle::new((e.step.max(1), e.loss), 4, shade.filled()));
            chart
                .draw_series(dots)?
                .label("evaluation")
                .legend(move |(x, y)| Circle::new((x + 9, y), 4, shade.filled()));
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .label_font(("sans-serif", 14))
                .draw()?;
        }
        root.present()?;
    }
    std::fs::write(path, text)?;
    Ok(())
}
