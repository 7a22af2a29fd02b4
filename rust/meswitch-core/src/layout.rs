//! Where a part's codes lie in its bytes.
//!
//! One row of `b`-bit codes (b = 1, 2, 4, 8): eight columns take `b` bytes, lowest bits first. A 3-bit row is the 2-bit
//! row of the low two bits followed by the 1-bit row of the high ones.
//!
//! Rows lie in *blocks* of 256, whose bytes are transposed: byte `j` of all its rows, then byte `j + 1`. So one cache
//! line holds the same columns of 64 rows, a *line* of them. The last block is filled up with zeros to a multiple of 8.

pub mod old;

/// Rows of a line: one cache line, one AVX-512 register.
pub const LINE: usize = 64;

/// Rows of a block.
pub const BLOCK: usize = 256;

/// The code widths of the format.
pub const BITS: [u32; 5] = [1, 2, 3, 4, 8];

/// Bytes of one packed row.
#[must_use]
pub const fn row_bytes(bits: u32, columns: usize) -> usize {
    bits as usize * columns.div_ceil(8)
}

/// Rows that bytes are there for.
#[must_use]
pub const fn padded(rows: usize) -> usize {
    rows.next_multiple_of(8)
}

/// Bytes of a part.
#[must_use]
pub const fn part_bytes(bits: u32, rows: usize, columns: usize) -> usize {
    row_bytes(bits, columns) * padded(rows)
}

/// What a packed row is made of: the width of codes, their first byte, and their factor.
#[must_use]
pub fn planes(bits: u32, columns: usize) -> Vec<(u32, usize, f32)> {
    if bits == 3 { vec![(2, 0, 1.0), (1, row_bytes(2, columns), 4.0)] } else { vec![(bits, 0, 1.0)] }
}

/// The first row that is in two parts, each given by its rows, or none for all of `rows`.
pub fn shared_row<R: IntoIterator<Item = u32>>(rows: usize, parts: impl IntoIterator<Item = Option<R>>) -> Option<u32> {
    let mut taken = vec![false; rows];
    let mut again = |row: &u32| std::mem::replace(&mut taken[*row as usize], true);
    parts.into_iter().find_map(|part| match part {
        None => (0..rows as u32).find(&mut again),
        Some(part) => part.into_iter().find(&mut again),
    })
}

/// Packs one row of codes. `packed` is `row_bytes(bits, codes.len())` long and is overwritten.
#[inline(always)]
pub fn pack_row(codes: &[u8], bits: u32, packed: &mut [u8]) {
    match bits {
        1 => pack_plane::<1>(codes, 0, packed),
        2 => pack_plane::<2>(codes, 0, packed),
        3 => {
            let (low, high) = packed.split_at_mut(row_bytes(2, codes.len()));
            pack_plane::<2>(codes, 0, low);
            pack_plane::<1>(codes, 2, high);
        }
        4 => pack_plane::<4>(codes, 0, packed),
        _ => pack_plane::<8>(codes, 0, packed),
    }
}

/// Unpacks one row; the inverse of [`pack_row`].
#[inline(always)]
pub fn unpack_row(packed: &[u8], bits: u32, codes: &mut [u8]) {
    match bits {
        1 => unpack_plane::<1>(packed, codes),
        2 => unpack_plane::<2>(packed, codes),
        3 => {
            let (low, high) = packed.split_at(row_bytes(2, codes.len()));
            unpack_plane::<2>(low, codes);
            add_high(high, codes);
        }
        4 => unpack_plane::<4>(packed, codes),
        _ => unpack_plane::<8>(packed, codes),
    }
}

/// Fields of `count` codes of `B` bits, `8 * count` bits from one to the next.
const fn fields<const B: usize>(count: usize) -> u64 {
    let (mut mask, mut at) = (0, 0);
    while at < 8 / count {
        mask |= ((1u64 << (B * count)) - 1) << (8 * count * at);
        at += 1;
    }
    mask
}

/// Eight codes, a byte each, drawn together.
#[inline(always)]
fn gather<const B: usize>(codes: u64) -> u64 {
    if B == 8 {
        return codes;
    }
    let pairs = codes & const { fields::<B>(1) };
    let fours = (pairs | pairs >> (8 - B)) & const { fields::<B>(2) };
    let halves = (fours | fours >> (2 * (8 - B))) & const { fields::<B>(4) };
    halves | halves >> (4 * (8 - B))
}

/// Eight codes spread to a byte each.
#[inline(always)]
fn spread<const B: usize>(packed: u64) -> u64 {
    if B == 8 {
        return packed;
    }
    let halves = (packed | packed << (4 * (8 - B))) & const { fields::<B>(4) };
    let fours = (halves | halves << (2 * (8 - B))) & const { fields::<B>(2) };
    (fours | fours << (8 - B)) & const { fields::<B>(1) }
}

/// The first bytes of a word.
#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[inline(always)]
fn pack_plane<const B: usize>(codes: &[u8], shift: u32, packed: &mut [u8]) {
    let whole = codes.len() / 8;
    for (codes, packed) in codes.chunks_exact(8).zip(packed.chunks_exact_mut(B)) {
        packed.copy_from_slice(&gather::<B>(word(codes) >> shift).to_le_bytes()[..B]);
    }
    if whole * 8 < codes.len() {
        let last = gather::<B>(word(&codes[whole * 8..]) >> shift);
        packed[whole * B..].copy_from_slice(&last.to_le_bytes()[..B]);
    }
}

#[inline(always)]
fn unpack_plane<const B: usize>(packed: &[u8], codes: &mut [u8]) {
    let whole = codes.len() / 8;
    let (first, last) = codes.split_at_mut(whole * 8);
    for (codes, packed) in first.chunks_exact_mut(8).zip(packed.chunks_exact(B)) {
        codes.copy_from_slice(&spread::<B>(word(packed)).to_le_bytes());
    }
    if !last.is_empty() {
        last.copy_from_slice(&spread::<B>(word(&packed[whole * B..])).to_le_bytes()[..last.len()]);
    }
}

/// Adds the high bits of 3-bit codes.
#[inline(always)]
fn add_high(packed: &[u8], codes: &mut [u8]) {
    let high = |byte: u8| spread::<1>(u64::from(byte)) << 2;
    let mut eights = codes.chunks_exact_mut(8);
    for (codes, byte) in (&mut eights).zip(packed) {
        codes.copy_from_slice(&(word(codes) | high(*byte)).to_le_bytes());
    }
    if let (last, Some(byte)) = (eights.into_remainder(), packed.last()) {
        last.iter_mut().zip(high(*byte).to_le_bytes()).for_each(|(code, high)| *code |= high);
    }
}

/// Where a row's line lies: its first byte, and how far it is from one byte of the row to the next.
#[must_use]
pub fn line(row: usize, rows: usize, stride: usize) -> (usize, usize) {
    let block = row / BLOCK * BLOCK;
    (block * stride + (row - block) / LINE * LINE, (padded(rows) - block).min(BLOCK))
}

/// The blocks of packed rows of `stride` bytes.
#[must_use]
pub fn tile(packed: &[u8], stride: usize) -> Vec<u8> {
    let rows = packed.len() / stride.max(1);
    let mut codes = vec![0; padded(rows) * stride];
    for first in (0..rows).step_by(LINE) {
        let (start, width) = line(first, rows, stride);
        let lines = &packed[first * stride..(first + LINE).min(rows) * stride];
        transpose(lines, stride, &mut codes[start..], width);
    }
    codes
}

/// One line's rows, packed, `stride` bytes each: the inverse of [`tile`].
pub fn untile(codes: &[u8], rows: usize, stride: usize, row: usize, packed: &mut [u8]) {
    let (start, width) = line(row, rows, stride);
    if stride > 0 {
        let codes = &codes[start..];
        let here = LINE.min(width - row % BLOCK / LINE * LINE);
        for (first, eight) in (0..here).step_by(8).zip(packed.chunks_exact_mut(8 * stride)) {
            transpose_columns(&codes[first..], width, stride, eight);
        }
    }
}

/// `from [rows, stride]` to `to [stride, width]`.
fn transpose(from: &[u8], stride: usize, to: &mut [u8], width: usize) {
    for (first, rows) in from.chunks(8 * stride).enumerate() {
        let count = rows.len() / stride;
        for at in (0..stride).step_by(8) {
            let mut square = [0u64; 8];
            for (row, square) in square.iter_mut().take(count).enumerate() {
                *square = eight(&rows[row * stride..(row + 1) * stride], at);
            }
            for (byte, column) in turned(square).into_iter().take(stride - at).enumerate() {
                put_eight(&mut to[(at + byte) * width + first * 8..][..count], 0, column);
            }
        }
    }
}

/// `from [stride, width]`, of which eight columns are taken, to `to [8, stride]`.
fn transpose_columns(from: &[u8], width: usize, stride: usize, to: &mut [u8]) {
    for at in (0..stride).step_by(8) {
        let mut square = [0u64; 8];
        for (byte, square) in square.iter_mut().take(stride - at).enumerate() {
            *square = eight(&from[(at + byte) * width..][..8], 0);
        }
        for (row, packed) in turned(square).into_iter().enumerate() {
            put_eight(&mut to[row * stride..(row + 1) * stride], at, packed);
        }
    }
}

/// Eight bytes from a place on, or what there is.
#[inline(always)]
fn eight(bytes: &[u8], at: usize) -> u64 {
    match bytes[at..].first_chunk() {
        Some(eight) => u64::from_le_bytes(*eight),
        None => word(&bytes[at..]),
    }
}

/// Writes eight bytes from a place on, or as many as there is room for.
#[inline(always)]
fn put_eight(bytes: &mut [u8], at: usize, word: u64) {
    let bytes = &mut bytes[at..];
    match bytes.first_chunk_mut() {
        Some(eight) => *eight = word.to_le_bytes(),
        None => bytes.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from),
    }
}

/// Eight rows of eight bytes transposed, in halves: squares of four, of two, of one.
#[inline(always)]
fn turned(mut rows: [u64; 8]) -> [u64; 8] {
    for (size, mask) in [(4, 0x0000_0000_ffff_ffff), (2, 0x0000_ffff_0000_ffff), (1, 0x00ff_00ff_00ff_00ff_u64)] {
        let shift = 8 * size;
        for low in (0..8).filter(|row| row & size == 0) {
            let (a, b) = (rows[low], rows[low + size]);
            rows[low] = (a & mask) | (b & mask) << shift;
            rows[low + size] = (a >> shift) & mask | (b & !mask);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_of_two_parts_are_found() {
        let (even, odd, none) = (vec![0, 2, 4], vec![1, 3], vec![]);
        assert_eq!(shared_row(5, [Some(even.clone()), Some(odd.clone()), Some(none.clone())]), None);
        assert_eq!(shared_row(5, [Some(even.clone()), Some(vec![3, 4])]), Some(4));
        assert_eq!(shared_row(5, [None, Some(odd)]), Some(1));
        assert_eq!(shared_row(5, [Some(even), None]), Some(0));
        assert_eq!(shared_row(5, [None, Some(none)]), None);
    }

    proptest! {
        #[test]
        fn unpacking_undoes_packing(
            (bits, codes) in prop::sample::select(&BITS[..]).prop_flat_map(|bits| {
                (Just(bits), prop::collection::vec(0..=((1u16 << bits) - 1) as u8, 0..1200))
            })
        ) {
            let mut packed = vec![0xff; row_bytes(bits, codes.len())];
            pack_row(&codes, bits, &mut packed);
            let mut back = vec![0xff; codes.len()];
            unpack_row(&packed, bits, &mut back);
            prop_assert_eq!(back, codes);
        }

        #[test]
        fn a_byte_lies_where_the_layout_says(rows in 0usize..700, stride in 0usize..40, seed: u8) {
            let byte = |row: usize, at: usize| (row * 31 + at * 7 + usize::from(seed)) as u8;
            let packed: Vec<u8> = (0..rows * stride).map(|at| byte(at / stride, at % stride)).collect();
            let codes = tile(&packed, stride);
            prop_assert_eq!(codes.len(), if stride > 0 { padded(rows) * stride } else { 0 });
            let mut back = vec![0xff; LINE * stride];
            for row in 0..if stride > 0 { rows } else { 0 } {
                let width = (padded(rows) - row / BLOCK * BLOCK).min(BLOCK);
                let found: Vec<u8> =
                    (0..stride).map(|at| codes[row / BLOCK * BLOCK * stride + at * width + row % BLOCK]).collect();
                prop_assert_eq!(&found, &packed[row * stride..(row + 1) * stride]);
                if row % LINE == 0 {
                    untile(&codes, rows, stride, row, &mut back);
                }
                prop_assert_eq!(&back[row % LINE * stride..][..stride], &found[..]);
            }
        }
    }

    #[test]
    fn eight_columns_are_as_many_bytes_as_bits() {
        for bits in BITS {
            assert_eq!(row_bytes(bits, 4096) * 8, 4096 * bits as usize);
            assert_eq!((row_bytes(bits, 0), row_bytes(bits, 1)), (0, bits as usize));
        }
        assert_eq!(part_bytes(2, 300, 16), 4 * 304);
    }

    #[test]
    fn a_code_lies_where_the_layout_says() {
        let mut codes = vec![0u8; 256];
        codes[130] = 3;
        let mut packed = vec![0; row_bytes(2, 256)];
        pack_row(&codes, 2, &mut packed);
        assert_eq!(packed[32], 3 << 4);
        assert_eq!(packed.iter().filter(|byte| **byte != 0).count(), 1);
    }
}
