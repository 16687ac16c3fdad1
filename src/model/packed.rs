//! A pass over packed sequences, forward and back, one layer at a time.
//!
//! Each layer is a graph of its own: its input is a variable, its output the next one's input. Backward goes from the last
//! layer to the first with the gradient in hand. A layer's graph holds its activations; it is either kept from the way
//! forward, or built again from the layer's input on the way back. Both give the same bits; the second needs memory for the
//! inputs of all layers and the activations of one.
//!
//! A step of the pass is one layer, so whoever shares the thread waits for no longer than that.
use super::Model;
use super::batch::PackedBatch;
use super::decoder::PackedRows;
use crate::error::{Error, Result};
use crate::ops::Machine;
use crate::ops::seed::backward_from;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

/// What becomes of activations on the way forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// There is no way back.
    Discard,
    /// The last so many layers keep theirs, the others compute them again.
    Keep(usize),
}

/// A pass on its way.
pub struct PackedPass {
    rows: PackedRows,
    activations: Activations,
    soft: Var,
    /// `[rows, 2 * layers * kv_heads * head_dim]`
    stored: Option<Tensor>,
    embedded: Option<Tensor>,
    /// Layers run.
    done: usize,
    /// Those that the way back has not come to yet.
    layers: Vec<Layer>,
    /// Output of the last layer so far, on its own.
    hidden: Option<Tensor>,
    /// Gradient of the output of the last of `layers`; of the last layer's in parts, one after the other.
    gradient: Vec<Tensor>,
    /// Of the stored rows, by layer, from the last to the first.
    stored_gradients: Vec<Tensor>,
    soft_gradient: Option<Tensor>,
}

/// A layer that has been run.
struct Layer {
    input: Var,
    stored: Option<Var>,
    /// With its graph, where that is kept.
    output: Option<Tensor>,
}

impl PackedPass {
    /// Over `batch`, with the values of the virtual tokens `soft` `[num_soft, hidden]` and of the stored rows `stored`
    /// `[rows, 2 * layers * kv_heads * head_dim]`.
    pub fn new(
        model: &Model,
        batch: &PackedBatch,
        soft: &Tensor,
        stored: Option<&Tensor>,
        activations: Activations,
    ) -> Result<Self> {
        // Both stay f32: weights of adapters are not rounded to the base's type, nor are their gradients.
        let machine = model.decoder.machine();
        let stored = stored.map(|s| machine.to_device(&s.detach())).transpose()?;
        Ok(PackedPass {
            rows: model.decoder.packed(batch, stored.as_ref().map_or(0, |s| s.dims()[0]))?,
            activations,
            soft: Var::from_tensor(&machine.to_device(&soft.detach())?)?,
            stored,
            embedded: None,
            done: 0,
            layers: Vec::new(),
            hidden: None,
            gradient: Vec::new(),
            stored_gradients: Vec::new(),
            soft_gradient: None,
        })
    }

    /// Runs the next layer. False: all are done.
    pub fn forward(&mut self, model: &Model) -> Result<bool> {
        let (index, count) = (self.done, model.info.num_layers);
        if index == count {
            return Ok(false);
        }
        let forward_only = self.activations == Activations::Discard;
        let input = match self.hidden.take() {
            Some(hidden) => hidden,
            None => {
                let soft = if forward_only { self.soft.as_detached_tensor() } else { self.soft.as_tensor().clone() };
                let embedded = model.decoder.packed_inputs(&self.rows, &soft)?;
                self.embedded.insert(embedded).detach()
            }
        };
        let stored = self.columns(index, count)?;
        let keep = matches!(self.activations, Activations::Keep(n) if index.saturating_add(n) >= count);
        self.done += 1;
        if keep {
            let stored = stored.map(|s| Var::from_tensor(&s)).transpose()?;
            let mut layer = Layer { input: Var::from_tensor(&input)?, stored, output: None };
            let output = self.run(model, index, &layer)?;
            self.hidden = Some(layer.output.insert(output).detach());
            self.layers.push(layer);
        } else {
            self.hidden = Some(model.decoder.packed_layer(index, &input, &self.rows, stored.as_ref())?);
            if !forward_only {
                let stored = stored.map(|s| Var::from_tensor(&s)).transpose()?;
                self.layers.push(Layer { input: Var::from_tensor(&input)?, stored, output: None });
            }
        }
        Ok(self.done < count)
    }

    /// The hidden rows that the batch wants, `range` of them, final norm applied: a graph over the variable that is
    /// returned first.
    ///
    /// # Errors
    /// `Internal` before the last layer.
    pub fn wanted(&self, model: &Model, range: std::ops::Range<usize>) -> Result<(Var, Tensor)> {
        let hidden = self.hidden.as_ref().ok_or_else(|| Error::internal("a pass that has not come to its end"))?;
        let hidden = Var::from_tensor(&hidden.narrow(0, range.start, range.len())?.detach())?;
        let wanted = model.decoder.finish(&hidden)?;
        Ok((hidden, wanted))
    }

    /// The gradient of the next rows `[n, hidden]` that the batch wants, from the first to the last.
    pub fn push_gradient(&mut self, gradient: Tensor) {
        self.gradient.push(gradient);
    }

    /// Goes back through one layer. False: the gradients are ready.
    ///
    /// # Errors
    /// `Internal` if the gradient is not that of all wanted rows.
    pub fn backward(&mut self, model: &Model) -> Result<bool> {
        let gradient = Tensor::cat(&std::mem::take(&mut self.gradient), 0)?;
        self.hidden = None;
        let Some(mut layer) = self.layers.pop() else {
            return Err(Error::internal("a way back past the first layer"));
        };
        let index = self.layers.len();
        let output = match layer.output.take() {
            Some(output) => output,
            None => self.run(model, index, &layer)?,
        };
        let gradients = back(&output, &gradient)?;
        if let Some(stored) = &layer.stored {
            self.stored_gradients.push(of(&gradients, stored)?);
        }
        let gradient = of(&gradients, &layer.input)?;
        if index > 0 {
            self.gradient.push(gradient);
            return Ok(true);
        }
        if let Some(embedded) = self.embedded.take().filter(|_| self.soft.dims()[0] > 0) {
            self.soft_gradient = Some(of(&back(&embedded, &gradient)?, &self.soft)?);
        }
        Ok(false)
    }

    /// Gradients of `soft` and `stored`, in their shapes, as f32 on the processor; `None` where there are none.
    pub fn gradients(mut self) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.stored_gradients.reverse();
        let stored = match self.stored_gradients.as_slice() {
            [] => None,
            layers => Some(Tensor::cat(layers, 1)?),
        };
        let to_host = |t: Option<Tensor>| t.map(|t| Machine::to_host(&t)).transpose();
        Ok((to_host(self.soft_gradient)?, to_host(stored)?))
    }

    /// One layer with its graph.
    fn run(&self, model: &Model, index: usize, layer: &Layer) -> Result<Tensor> {
        model.decoder.packed_layer(index, &layer.input, &self.rows, layer.stored.as_ref().map(Var::as_tensor))
    }

    /// Columns of the stored rows that are K and V of a layer.
    fn columns(&self, index: usize, count: usize) -> Result<Option<Tensor>> {
        let Some(stored) = &self.stored else { return Ok(None) };
        let width = stored.dim(1)? / count;
        Ok(Some(stored.narrow(1, index * width, width)?.contiguous()?))
    }
}

/// Gradients of everything below `output`, given its own.
pub fn back(output: &Tensor, gradient: &Tensor) -> Result<GradStore> {
    Ok(backward_from(output, gradient)?)
}

/// The gradient of a variable, on its own: candle leaves the graph of its making on it. None at all is a defect, never a
/// zero.
pub fn of(gradients: &GradStore, var: &Var) -> Result<Tensor> {
    gradients.get(var).map(Tensor::detach).ok_or_else(|| Error::internal("a variable without gradient"))
}
