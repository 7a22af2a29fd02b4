//! The tensors of a site: their roles, dtypes and shapes.

use std::fmt;

use safetensors::Dtype;

/// What a tensor of a site holds. Its name in the file is `SITE/ROLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A replaced parameter.
    Whole,
    /// The codes of the part of that index.
    Codes(usize),
    /// The scales of the part of that index.
    Scales(usize),
    /// The rows of the part of that index.
    Rows(usize),
    /// One scale per input channel.
    ColumnScales,
    /// The salient channels.
    SalientIndex,
    /// The values of the salient channels.
    Salient,
    /// The left factor of the low-rank part.
    U,
    /// The right factor of the low-rank part.
    V,
    /// Where the sparse entries of each row start.
    SparseStarts,
    /// The columns of sparse entries.
    SparseGaps,
    /// The values of sparse entries.
    SparseValues,
    /// Rows that the base does not have.
    Added,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("whole"),
            Self::Codes(part) => write!(f, "codes.{part}"),
            Self::Scales(part) => write!(f, "scales.{part}"),
            Self::Rows(part) => write!(f, "rows.{part}"),
            Self::ColumnScales => f.write_str("column_scales"),
            Self::SalientIndex => f.write_str("salient_index"),
            Self::Salient => f.write_str("salient"),
            Self::U => f.write_str("u"),
            Self::V => f.write_str("v"),
            Self::SparseStarts => f.write_str("sparse_starts"),
            Self::SparseGaps => f.write_str("sparse_gaps"),
            Self::SparseValues => f.write_str("sparse_values"),
            Self::Added => f.write_str("added"),
        }
    }
}

impl Role {
    /// The tensor of this role, at a shape. `parameter` is the dtype of the fine-tune's parameter. `None` where its size
    /// overflows or is no whole number of bytes.
    pub(crate) fn spec(self, parameter: Dtype, shape: &[usize]) -> Option<TensorSpec> {
        let dtype = match self {
            Self::Whole | Self::Added => parameter,
            Self::Codes(_) | Self::Rows(_) | Self::SalientIndex | Self::SparseStarts => Dtype::I32,
            Self::Scales(_) | Self::ColumnScales | Self::Salient | Self::U | Self::V => Dtype::F16,
            Self::SparseGaps => Dtype::U8,
            Self::SparseValues => Dtype::F8_E5M2,
        };
        let elements = shape.iter().try_fold(1usize, |product, length| product.checked_mul(*length))?;
        let bits = elements.checked_mul(dtype.bitsize()).filter(|bits| bits.is_multiple_of(8))?;
        Some(TensorSpec { role: self, name: self.to_string(), dtype, shape: shape.to_vec(), size: bits / 8 })
    }
}

/// A tensor that a site has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its role, or `SITE/ROLE` where the site is not known from the context.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    pub(super) role: Role,
    /// Its size in bytes.
    size: usize,
}

impl TensorSpec {
    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The same tensor under its full name.
    pub(crate) fn of_site(self, site: &str) -> Self {
        Self { name: format!("{site}/{}", self.name), ..self }
    }
}
