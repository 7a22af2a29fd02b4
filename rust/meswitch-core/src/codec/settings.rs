//! How a site is quantized.

/// Which code value means 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zero {
    /// `(2^bits − 1) / 2`: symmetric levels, none of which is 0. Suits dense deltas.
    Symmetric,
    /// `2^(bits − 1)`: one level is 0. Suits deltas with many zeros.
    Level,
    /// Whichever fits the part better.
    #[default]
    Auto,
}

/// Rows with a bit width of their own.
#[derive(Clone, Debug)]
pub struct Class {
    /// Bits per code. With 0, the rows get no codes.
    pub bits: u32,
    /// The rows, rising.
    pub rows: Vec<u32>,
}

/// How a site is quantized. The default is 2 bits, one scale per row, and nothing else but sparse entries where those
/// are smaller.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bits per code of rows in no class: 1, 2, 3, 4 or 8.
    pub bits: u32,
    /// Input channels that share a scale; `None` for the whole row.
    pub group_size: Option<usize>,
    /// Which code value means 0.
    pub zero: Zero,
    /// Whether the whole matrix has one scale (BitDelta) instead of one per row.
    pub one_scale: bool,
    /// Whether input channels have scales too.
    pub column_scales: bool,
    /// Whether scales are chosen so that the projection of each quantized row onto the original row equals the
    /// original, at a larger error than least squares.
    pub unbiased: bool,
    /// The number of salient channels.
    pub salient: usize,
    /// The rank of the low-rank part.
    pub rank: usize,
    /// Rows with other bit row_bits.
    pub classes: Vec<Class>,
    /// Whether unchanged rows get no codes where that saves space.
    pub skip_unchanged_rows: bool,
    /// Whether sparse entries are stored instead where those are smaller.
    pub sparse: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            bits: 2,
            group_size: None,
            zero: Zero::Auto,
            one_scale: false,
            column_scales: false,
            unbiased: false,
            salient: 0,
            rank: 0,
            classes: Vec::new(),
            skip_unchanged_rows: false,
            sparse: true,
        }
    }
}

impl Settings {
    /// The bits per code of each row; `None` for rows without codes.
    pub(crate) fn row_bits(&self, rows: usize) -> Vec<Option<u32>> {
        let mut row_bits = vec![Some(self.bits); rows];
        for class in &self.classes {
            for row in class.rows.iter().filter(|row| (**row as usize) < rows) {
                row_bits[*row as usize] = (class.bits > 0).then_some(class.bits);
            }
        }
        row_bits
    }
}
