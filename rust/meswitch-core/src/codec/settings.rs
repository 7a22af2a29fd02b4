//! How a site is to be quantized.

/// Where the codes' zero lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// `(2^bits − 1) / 2`: symmetric levels, none of them zero. Right for dense deltas.
    Symmetric,
    /// `2^(bits − 1)`: one level is zero. Right for sparse deltas.
    Level,
    /// Whichever fits the site better.
    Auto,
}

/// Rows that get a bit width of their own.
#[derive(Clone, Debug)]
pub struct Class {
    /// Bits a code; none leave the rows as the base has them, but for the low-rank part.
    pub bits: u32,
    /// The rows, rising.
    pub rows: Vec<u32>,
}

/// How a site is quantized.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bits a code, where no class says otherwise.
    pub bits: u32,
    /// Input channels that share a scale; the whole row where none.
    pub group_size: Option<usize>,
    /// Where the zero lies.
    pub zero: Zero,
    /// One scale for the whole matrix (BitDelta), not one a row.
    pub one_scale: bool,
    /// Whether input channels have scales too.
    pub column_scales: bool,
    /// Whether scales keep a row whole along itself, at a larger error (see [`fit::unbiased`]).
    pub unbiased: bool,
    /// Salient channels to keep.
    pub salient: usize,
    /// Rank of the part under the codes.
    pub rank: usize,
    /// Rows of another bit width.
    pub classes: Vec<Class>,
    /// Whether rows without any change take no space.
    pub skip_unchanged_rows: bool,
    /// Whether changed weights are kept one by one where that takes less than codes.
    pub sparse: bool,
}

impl Settings {
    /// The bits of each row that the settings ask for; none for rows that are left as they are.
    #[must_use]
    pub fn widths(&self, rows: usize) -> Vec<Option<u32>> {
        let mut widths = vec![Some(self.bits); rows];
        for class in &self.classes {
            for row in class.rows.iter().filter(|row| (**row as usize) < rows) {
                widths[*row as usize] = (class.bits > 0).then_some(class.bits);
            }
        }
        widths
    }
}
