//! Where a part's codes lie in its bytes (format version 4).
//!
//! A packed row of `b`-bit codes (b = 1, 2, 4, 8) holds eight columns in `b` bytes, lowest bits first. A 3-bit row is
//! two *planes*: the 2-bit row of the low two bits, then the 1-bit row of the high bits.
//!
//! Rows are stored in *blocks* of 256, whose bytes are transposed: byte 0 of all rows of the block, then byte 1 of all
//! rows, and so on. So one cache line holds the same columns of 64 rows; such 64 rows are a *line*. The last block is
//! padded with rows of zeros to whole lines, or, in a part of less than one line, to a multiple of 16 rows.

mod content;
pub mod legacy;

pub(crate) use content::{first_stray_bit, row_in_two_parts};

/// Rows of a line: one cache line, one AVX-512 register.
pub(crate) const LINE_ROWS: usize = 64;

/// Rows of a block.
pub(crate) const BLOCK_ROWS: usize = 256;

/// The code widths of the format.
pub const BITS: [u32; 5] = [1, 2, 3, 4, 8];

/// Bytes of one packed row.
#[must_use]
pub const fn row_bytes(bits: u32, columns: usize) -> usize {
    bits as usize * columns.div_ceil(8)
}

/// What parts of less than a line are padded to: rows that start at a multiple of 16 bytes.
const SHORT_ROWS: usize = 16;

/// Rows of a part, padding included; `None` where that overflows.
const fn checked_padded_rows(rows: usize) -> Option<usize> {
    rows.checked_next_multiple_of(if rows > LINE_ROWS - SHORT_ROWS { LINE_ROWS } else { SHORT_ROWS })
}

/// Rows of a part, padding included.
pub(crate) const fn padded_rows(rows: usize) -> usize {
    checked_padded_rows(rows).expect("a part has fewer than 2^31 rows")
}

/// Bytes of the codes of a part; `None` where that overflows.
#[must_use]
pub const fn part_bytes(bits: u32, rows: usize, columns: usize) -> Option<usize> {
    match ((bits as usize).checked_mul(columns.div_ceil(8)), checked_padded_rows(rows)) {
        (Some(row_bytes), Some(rows)) => row_bytes.checked_mul(rows),
        _ => None,
    }
}

/// The planes of a packed row: the width of their codes, their first byte, and the factor of their codes.
pub(crate) fn planes(bits: u32, columns: usize) -> Vec<(u32, usize, f32)> {
    if bits == 3 { vec![(2, 0, 1.0), (1, row_bytes(2, columns), 4.0)] } else { vec![(bits, 0, 1.0)] }
}

/// Packs one row of codes into `packed`, which must have `row_bytes(bits, codes.len())` bytes.
#[doc(hidden)]
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

/// Unpacks one row of codes; the inverse of [`pack_row`].
#[inline(always)]
pub(crate) fn unpack_row(packed: &[u8], bits: u32, codes: &mut [u8]) {
    match bits {
        1 => unpack_plane::<1>(packed, codes),
        2 => unpack_plane::<2>(packed, codes),
        3 => {
            let (low, high) = packed.split_at(row_bytes(2, codes.len()));
            unpack_plane::<2>(low, codes);
            add_high_bits(high, codes);
        }
        4 => unpack_plane::<4>(packed, codes),
        _ => unpack_plane::<8>(packed, codes),
    }
}

/// A mask of fields that hold `count` codes of `B` bits each, one field every `8 * count` bits.
const fn field_mask<const B: usize>(count: usize) -> u64 {
    let (mut mask, mut field) = (0, 0);
    while field < 8 / count {
        mask |= ((1u64 << (B * count)) - 1) << (8 * count * field);
        field += 1;
    }
    mask
}

/// Packs eight codes of one byte each into `B` bytes.
#[inline(always)]
fn compact<const B: usize>(codes: u64) -> u64 {
    if B == 8 {
        return codes;
    }
    let pairs = codes & const { field_mask::<B>(1) };
    let fours = (pairs | pairs >> (8 - B)) & const { field_mask::<B>(2) };
    let halves = (fours | fours >> (2 * (8 - B))) & const { field_mask::<B>(4) };
    halves | halves >> (4 * (8 - B))
}

/// Unpacks eight codes from `B` bytes to one byte each.
#[inline(always)]
fn expand<const B: usize>(packed: u64) -> u64 {
    if B == 8 {
        return packed;
    }
    let halves = (packed | packed << (4 * (8 - B))) & const { field_mask::<B>(4) };
    let fours = (halves | halves << (2 * (8 - B))) & const { field_mask::<B>(2) };
    (fours | fours << (8 - B)) & const { field_mask::<B>(1) }
}

/// Loads at most eight bytes, little-endian; missing ones are zero.
#[inline(always)]
fn load(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[inline(always)]
fn pack_plane<const B: usize>(codes: &[u8], shift: u32, packed: &mut [u8]) {
    let whole = codes.len() / 8;
    for (codes, packed) in codes.chunks_exact(8).zip(packed.chunks_exact_mut(B)) {
        packed.copy_from_slice(&compact::<B>(load(codes) >> shift).to_le_bytes()[..B]);
    }
    if whole * 8 < codes.len() {
        let last = compact::<B>(load(&codes[whole * 8..]) >> shift);
        packed[whole * B..].copy_from_slice(&last.to_le_bytes()[..B]);
    }
}

#[inline(always)]
fn unpack_plane<const B: usize>(packed: &[u8], codes: &mut [u8]) {
    let whole = codes.len() / 8;
    let (first, last) = codes.split_at_mut(whole * 8);
    for (codes, packed) in first.chunks_exact_mut(8).zip(packed.chunks_exact(B)) {
        codes.copy_from_slice(&expand::<B>(load(packed)).to_le_bytes());
    }
    if !last.is_empty() {
        last.copy_from_slice(&expand::<B>(load(&packed[whole * B..])).to_le_bytes()[..last.len()]);
    }
}

/// Adds the high bits of 3-bit codes to their low bits.
#[inline(always)]
fn add_high_bits(packed: &[u8], codes: &mut [u8]) {
    let high = |byte: u8| expand::<1>(u64::from(byte)) << 2;
    let mut eights = codes.chunks_exact_mut(8);
    for (codes, byte) in (&mut eights).zip(packed) {
        codes.copy_from_slice(&(load(codes) | high(*byte)).to_le_bytes());
    }
    if let (last, Some(byte)) = (eights.into_remainder(), packed.last()) {
        last.iter_mut().zip(high(*byte).to_le_bytes()).for_each(|(code, high)| *code |= high);
    }
}

/// The offset of a row's line in the codes, and the distance from one byte of a row to the next. `row_size` is in
/// bytes.
pub(crate) fn line_start(row: usize, rows: usize, row_size: usize) -> (usize, usize) {
    let block = row / BLOCK_ROWS * BLOCK_ROWS;
    (block * row_size + (row - block) / LINE_ROWS * LINE_ROWS, (padded_rows(rows) - block).min(BLOCK_ROWS))
}

/// Brings packed rows of `row_size` bytes, one after another, into blocks.
pub(crate) fn tile_rows(packed: &[u8], row_size: usize) -> Vec<u8> {
    let rows = packed.len() / row_size.max(1);
    let mut codes = vec![0; padded_rows(rows) * row_size];
    for first in (0..rows).step_by(LINE_ROWS) {
        let (start, width) = line_start(first, rows, row_size);
        let line = &packed[first * row_size..(first + LINE_ROWS).min(rows) * row_size];
        transpose(line, row_size, &mut codes[start..], width);
    }
    codes
}

/// The elements of `[rows, columns]` as `[columns, rows]`.
pub(crate) fn turned<T: Copy>(elements: &[T], rows: usize) -> Vec<T> {
    let columns = elements.len().checked_div(rows).unwrap_or(0);
    (0..columns).flat_map(|column| elements.iter().skip(column).step_by(columns).copied()).collect()
}

/// Writes the packed rows of the line that holds `row`, `row_size` bytes each: the inverse of [`tile_rows`].
pub(crate) fn untile_line(codes: &[u8], rows: usize, row_size: usize, row: usize, packed: &mut [u8]) {
    let (start, width) = line_start(row, rows, row_size);
    if row_size > 0 {
        let codes = &codes[start..];
        let count = LINE_ROWS.min(width - row % BLOCK_ROWS / LINE_ROWS * LINE_ROWS);
        for (first, eight_rows) in (0..count).step_by(8).zip(packed.chunks_exact_mut(8 * row_size)) {
            transpose_columns(&codes[first..], width, row_size, eight_rows);
        }
    }
}

/// Transposes `from [rows, row_size]` into `to [row_size, width]`.
fn transpose(from: &[u8], row_size: usize, to: &mut [u8], width: usize) {
    for (first, rows) in from.chunks(8 * row_size).enumerate() {
        let count = rows.len() / row_size;
        for offset in (0..row_size).step_by(8) {
            let mut square = [0u64; 8];
            for (row, square) in square.iter_mut().take(count).enumerate() {
                *square = load_at(&rows[row * row_size..(row + 1) * row_size], offset);
            }
            for (byte, column) in transpose_8x8(square).into_iter().take(row_size - offset).enumerate() {
                store_at(&mut to[(offset + byte) * width + first * 8..][..count], 0, column);
            }
        }
    }
}

/// Transposes the first eight columns of `from [row_size, width]` into `to [8, row_size]`.
fn transpose_columns(from: &[u8], width: usize, row_size: usize, to: &mut [u8]) {
    for offset in (0..row_size).step_by(8) {
        let mut square = [0u64; 8];
        for (byte, square) in square.iter_mut().take(row_size - offset).enumerate() {
            *square = load_at(&from[(offset + byte) * width..][..8], 0);
        }
        for (row, packed) in transpose_8x8(square).into_iter().enumerate() {
            store_at(&mut to[row * row_size..(row + 1) * row_size], offset, packed);
        }
    }
}

/// Loads eight bytes at an offset, little-endian; bytes beyond the end are zero.
#[inline(always)]
fn load_at(bytes: &[u8], offset: usize) -> u64 {
    match bytes[offset..].first_chunk() {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => load(&bytes[offset..]),
    }
}

/// Stores eight bytes at an offset, little-endian; bytes beyond the end are dropped.
#[inline(always)]
fn store_at(bytes: &mut [u8], offset: usize, word: u64) {
    let bytes = &mut bytes[offset..];
    match bytes.first_chunk_mut() {
        Some(bytes) => *bytes = word.to_le_bytes(),
        None => bytes.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from),
    }
}

/// Transposes eight rows of eight bytes: exchanges squares of four bytes, then of two, then single bytes.
#[inline(always)]
fn transpose_8x8(mut rows: [u64; 8]) -> [u64; 8] {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

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
            let byte = |row: usize, offset: usize| (row * 31 + offset * 7 + usize::from(seed)) as u8;
            let packed: Vec<u8> = (0..rows * stride).map(|offset| byte(offset / stride, offset % stride)).collect();
            let codes = tile_rows(&packed, stride);
            prop_assert_eq!(codes.len(), if stride > 0 { padded_rows(rows) * stride } else { 0 });
            let mut back = vec![0xff; LINE_ROWS * stride];
            for row in 0..if stride > 0 { rows } else { 0 } {
                let width = (padded_rows(rows) - row / BLOCK_ROWS * BLOCK_ROWS).min(BLOCK_ROWS);
                let found: Vec<u8> =
                    (0..stride).map(|offset| codes[row / BLOCK_ROWS * BLOCK_ROWS * stride + offset * width + row % BLOCK_ROWS]).collect();
                prop_assert_eq!(&found, &packed[row * stride..(row + 1) * stride]);
                if row % LINE_ROWS == 0 {
                    untile_line(&codes, rows, stride, row, &mut back);
                }
                prop_assert_eq!(&back[row % LINE_ROWS * stride..][..stride], &found[..]);
            }
        }
    }

    #[test]
    fn eight_columns_are_as_many_bytes_as_bits() {
        for bits in BITS {
            assert_eq!(row_bytes(bits, 4096) * 8, 4096 * bits as usize);
            assert_eq!((row_bytes(bits, 0), row_bytes(bits, 1)), (0, bits as usize));
        }
        assert_eq!(part_bytes(2, 300, 16), Some(4 * 320));
        assert_eq!([0, 1, 16, 17, 48, 49, 64, 65].map(padded_rows), [0, 16, 16, 32, 48, 64, 64, 128]);
        assert_eq!([part_bytes(2, usize::MAX, 16), part_bytes(8, 8, usize::MAX)], [None, None]);
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
