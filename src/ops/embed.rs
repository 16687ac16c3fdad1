//! `embed`: rows of the token table and rows of soft prompts gathered into one packed tensor.
use super::{f32_slice, linear::Packed};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// Where an input row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowSource {
    /// A token's row of the table.
    Token(u32),
    /// A row of the batch's soft prompts.
    Soft(u32),
}

struct Embed {
    table: Arc<Packed>,
    rows: Vec<RowSource>,
}

/// `table` `[vocab, hidden]`, `soft` `[num_soft, hidden]` -> `[rows, hidden]` in f32. Soft rows are taken as they
/// are; a family's scale of token embeddings does not touch them.
pub fn embed(table: &Arc<Packed>, soft: &Tensor, rows: Vec<RowSource>) -> Result<Tensor> {
    soft.apply_op1(Embed { table: table.clone(), rows })
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, soft: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let soft = f32_slice(soft, layout, "embed")?;
        let hidden = self.table.k();
        let (num_soft, width) = layout.shape().dims2()?;
        if width != hidden {
            bail!("embed: soft rows have {width} elements, the table's {hidden}");
        }
        let mut y = vec![0f32; self.rows.len() * hidden];
        for (row, y) in self.rows.iter().zip(y.chunks_exact_mut(hidden)) {
            match *row {
                RowSource::Token(id) if (id as usize) < self.table.n() => self.table.row(id as usize, y),
                RowSource::Soft(i) if (i as usize) < num_soft => {
                    y.copy_from_slice(&soft[i as usize * hidden..][..hidden]);
                }
                other => bail!("embed: {other:?} is out of range ({} tokens, {num_soft} soft rows)", self.table.n()),
            }
        }
        Ok((CpuStorage::F32(y), (self.rows.len(), hidden).into()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::linear::Isa;
    use candle_core::Device;

    #[test]
    fn gathers_and_refuses() {
        let table = Arc::new(Packed::f32(&[0., 1., 2., 3., 4., 5.], 3, 2, Isa::Auto));
        let soft = Tensor::new(&[[10f32, 11.]], &Device::Cpu).unwrap();
        let y = embed(&table, &soft, vec![RowSource::Token(2), RowSource::Soft(0), RowSource::Token(0)]).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[4., 5.], [10., 11.], [0., 1.]]);
        assert!(embed(&table, &soft, vec![RowSource::Token(3)]).is_err());
        assert!(embed(&table, &soft, vec![RowSource::Soft(1)]).is_err());
    }
}
