//! Which bytes are read together.

use std::mem;
use std::ops::Range;

use super::super::checksum::{PIECE_BYTES, PieceHash};
use super::{Convert, Item};

/// What one thread reads at a time: a run of the file that goes to a run of memory, or a whole tensor that is converted.
pub(super) struct Job<'a> {
    /// The run of the file.
    pub(super) extent: Range<u64>,
    pub(super) out: &'a mut [u8],
    pub(super) convert: Option<&'a Convert<'a>>,
    pub(super) pieces: Vec<Piece>,
}

/// A piece of a tensor.
pub(super) struct Piece {
    /// The tensor, by position.
    pub(super) item: usize,
    /// Where the piece starts in it.
    pub(super) offset: usize,
    /// The bytes of the tensor in the file.
    pub(super) of: usize,
    /// Where the piece lies in the run of the file.
    pub(super) range: Range<usize>,
    /// Its hash, once it was read.
    pub(super) hash: Option<PieceHash>,
}

/// A job without its memory.
struct Run<'a> {
    extent: Range<u64>,
    place: Range<usize>,
    convert: Option<&'a Convert<'a>>,
    pieces: Vec<Piece>,
}

/// Cuts tensors into pieces, and puts neighbours together up to the size of a piece.
pub(super) fn plan<'a>(items: &'a [Item<'_>], memory: &'a mut [u8]) -> Vec<Job<'a>> {
    let mut runs: Vec<Run<'_>> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Item { extent, place, convert } = item;
        if convert.is_some() {
            let (extent, place, convert) = (extent.clone(), place.clone(), convert.as_ref());
            runs.push(Run { extent, place, convert, pieces: pieces(index, item).collect() });
            continue;
        }
        for piece in pieces(index, item) {
            let (start, first) = (extent.start + piece.offset as u64, place.start + piece.offset);
            match runs.last_mut().filter(|run| run.takes(start, first, piece.range.len())) {
                Some(run) => run.add(piece, first),
                None => {
                    let mut run = Run { extent: start..start, place: first..first, convert: None, pieces: Vec::new() };
                    run.add(piece, first);
                    runs.push(run);
                }
            }
        }
    }
    with_memory(runs, memory)
}

/// The pieces of a tensor, one for a tensor without bytes.
fn pieces(item: usize, tensor: &Item<'_>) -> impl Iterator<Item = Piece> {
    let of = (tensor.extent.end - tensor.extent.start) as usize;
    (0..of.max(1)).step_by(PIECE_BYTES).map(move |offset| {
        let range = offset..of.min(offset + PIECE_BYTES);
        Piece { item, offset, of, range, hash: None }
    })
}

impl Run<'_> {
    /// Whether a piece can be read together with these: it is as far from them in the file as in memory, and not far.
    fn takes(&self, start: u64, place: usize, bytes: usize) -> bool {
        let distance = place - self.place.start;
        self.convert.is_none() && start == self.extent.start + distance as u64 && distance + bytes <= PIECE_BYTES
    }

    /// Adds a piece that goes to a place in memory.
    fn add(&mut self, mut piece: Piece, place: usize) {
        let first = place - self.place.start;
        piece.range = first..first + piece.range.len();
        self.extent.end = self.extent.start + piece.range.end as u64;
        self.place.end = self.place.start + piece.range.end;
        self.pieces.push(piece);
    }
}

fn with_memory<'a>(runs: Vec<Run<'a>>, memory: &'a mut [u8]) -> Vec<Job<'a>> {
    let (mut rest, mut position) = (memory, 0);
    let with_out = |Run { extent, place, convert, pieces }| {
        let (out, after) = mem::take(&mut rest)[place.start - position..].split_at_mut(place.len());
        (rest, position) = (after, place.end);
        Job { extent, out, convert, pieces }
    };
    runs.into_iter().map(with_out).collect()
}
