//! Checksums, which are content hashes: equal bytes have equal checksums wherever they are stored.

use std::fmt;
use std::io::{self, Read};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A BLAKE3 hash cut to 128 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Checksum([u8; 16]);

/// The checksum of bytes that come in pieces.
#[derive(Default)]
pub(super) struct Hasher(blake3::Hasher);

impl Hasher {
    /// Adds a piece, on the calling thread.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds a piece, with rayon's pool for more than a megabyte (feature `rayon`).
    fn update_shared(&mut self, bytes: &[u8]) {
        #[cfg(feature = "rayon")]
        if bytes.len() > 1 << 20 {
            self.0.update_rayon(bytes);
            return;
        }
        self.update(bytes);
    }

    /// The checksum of all pieces so far.
    pub(super) fn finish(&self) -> Checksum {
        Checksum::of(&self.0.finalize())
    }
}

/// Bytes of a piece that is hashed by itself: a power of two, so that pieces are subtrees of BLAKE3's tree.
pub(super) const PIECE_BYTES: usize = 1 << 20;

/// The hash of one of the pieces that some bytes are cut into, each of [`PIECE_BYTES`] but the last. It is the bytes'
/// own where there is one piece, else the chaining value of a subtree.
#[derive(Clone, Copy)]
pub(super) struct PieceHash([u8; 32]);

impl PieceHash {
    /// The hash of the piece that starts at an `offset` of `of` bytes.
    pub(super) fn new(piece: &[u8], offset: usize, of: usize) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset as u64).update(piece);
        if of <= PIECE_BYTES { Self(hasher.finalize().into()) } else { Self(hasher.finalize_non_root()) }
    }

    /// The checksum of bytes that have these pieces, at least one.
    pub(super) fn join(pieces: &[Self]) -> Checksum {
        match pieces {
            [one] => Checksum::of(&blake3::Hash::from_bytes(one.0)),
            _ => {
                let (left, right) = Self::subtrees(pieces);
                Checksum::of(&merge_subtrees_root(&left, &right, Mode::Hash))
            }
        }
    }

    /// The chaining values of the two subtrees of several pieces. The left one is the largest that is complete.
    fn subtrees(pieces: &[Self]) -> (ChainingValue, ChainingValue) {
        let value = |pieces: &[Self]| match pieces {
            [one] => one.0,
            _ => {
                let (left, right) = Self::subtrees(pieces);
                merge_subtrees_non_root(&left, &right, Mode::Hash)
            }
        };
        let (left, right) = pieces.split_at(pieces.len().next_power_of_two() / 2);
        (value(left), value(right))
    }
}

/// The checksum of some bytes. Uses rayon's pool for more than a megabyte (feature `rayon`).
#[must_use]
pub fn checksum(bytes: &[u8]) -> Checksum {
    let mut hasher = Hasher::default();
    hasher.update_shared(bytes);
    hasher.finish()
}

/// The checksum of all that can be read, and how many bytes that are. Memory holds a piece at a time.
pub(super) fn checksum_of(mut reader: impl Read) -> io::Result<(Checksum, u64)> {
    let (mut hasher, mut piece, mut bytes) = (Hasher::default(), vec![0; PIECE_BYTES], 0);
    loop {
        match reader.read(&mut piece) {
            Ok(0) => return Ok((hasher.finish(), bytes)),
            Ok(count) => {
                hasher.update_shared(&piece[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Checksum {
    fn of(hash: &blake3::Hash) -> Self {
        Self(*hash.as_bytes().first_chunk().expect("a hash is longer"))
    }

    /// Reads 32 lower-case hexadecimal digits; `None` for anything else.
    pub(super) fn from_hex(text: &[u8]) -> Option<Self> {
        let mut bytes = [0; 16];
        if text.len() != 32 {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_chunks::<2>().0) {
            *byte = digit(digits[0])? << 4 | digit(digits[1])?;
        }
        Some(Self(bytes))
    }
}

/// Whether a text is `count` lower-case hexadecimal digits.
pub(super) fn is_hex(text: &str, count: usize) -> bool {
    text.len() == count && text.bytes().all(|byte| digit(byte).is_some())
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// Bytes as lower-case hexadecimal digits.
#[cfg(feature = "compress")]
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Checksum;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a checksum of 32 lower-case hexadecimal digits")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Checksum, E> {
                Checksum::from_hex(text.as_bytes()).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_have_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..5 * PIECE_BYTES + 3).map(|at| ((at * 31) >> 7) as u8).collect();
        let sizes = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 3 * PIECE_BYTES + 1024];
        for size in sizes.into_iter().chain([4 * PIECE_BYTES, bytes.len()]) {
            let starts = (0..size.max(1)).step_by(PIECE_BYTES);
            let piece = |start: usize| &bytes[start..size.min(start + PIECE_BYTES)];
            let pieces: Vec<PieceHash> = starts.map(|start| PieceHash::new(piece(start), start, size)).collect();
            assert_eq!(PieceHash::join(&pieces), checksum(&bytes[..size]), "{size}");
        }
    }
}
