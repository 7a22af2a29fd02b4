//! What must hold of a part's content, whatever its bytes are.

use super::{BLOCK_ROWS, line_start, planes, row_bytes};

/// The first row found in two parts, if any. A part is given by its rows, which rise; `None` stands for all rows, of
/// which there are `rows`. Memory is taken for the rows that are listed only.
pub(crate) fn row_in_two_parts<R: IntoIterator<Item = u32>>(
    rows: usize,
    parts: impl IntoIterator<Item = Option<R>>,
) -> Option<u32> {
    let (mut whole, mut listed) = (0, Vec::new());
    for part in parts {
        match part {
            None => whole += 1,
            Some(part) => listed.extend(part),
        }
    }
    // A stable sort merges lists that rise.
    listed.sort();
    match whole {
        0 => listed.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]),
        1 => listed.first().copied(),
        _ => (rows > 0).then_some(0),
    }
}

/// The first row, if any, with a bit that no code has: after its last column, or in a row of padding.
pub(crate) fn first_stray_bit(codes: &[u8], bits: u32, rows: usize, columns: usize) -> Option<usize> {
    let row_size = row_bytes(bits, columns);
    if row_size == 0 {
        return None;
    }
    let last_codes = if columns.is_multiple_of(8) { 8 } else { columns % 8 };
    // The bytes of the last eight columns, each with its bits that no code has.
    let mut stray = Vec::new();
    for (width, first, _) in planes(bits, columns) {
        let used = u64::MAX.unbounded_shr(64 - width * last_codes as u32).to_le_bytes();
        let start = first + row_bytes(width, columns) - width as usize;
        stray.extend((0..width as usize).map(|byte| (start + byte, !used[byte])));
    }
    for block in (0..rows).step_by(BLOCK_ROWS) {
        let (start, width) = line_start(block, rows, row_size);
        let count = width.min(rows - block);
        let line = |byte: usize| &codes[start + byte * width..][..width];
        let padded = (0..row_size).find_map(|byte| line(byte)[count..].iter().position(|byte| *byte != 0));
        let after = stray.iter().find_map(|(byte, mask)| line(*byte)[..count].iter().position(|byte| byte & mask != 0));
        if let Some(row) = after.or(padded.map(|row| count + row)) {
            return Some(block + row);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{BITS, pack_row, tile_rows};
    use super::*;

    #[test]
    fn rows_in_two_parts_are_found() {
        let (even, odd, none) = (vec![0, 2, 4], vec![1, 3], vec![]);
        assert_eq!(row_in_two_parts(5, [Some(even.clone()), Some(odd.clone()), Some(none.clone())]), None);
        assert_eq!(row_in_two_parts(5, [Some(even.clone()), Some(vec![3, 4])]), Some(4));
        assert_eq!(row_in_two_parts(5, [None, Some(odd)]), Some(1));
        assert_eq!(row_in_two_parts(5, [Some(even), None]), Some(0));
        assert_eq!(row_in_two_parts(5, [None::<Vec<u32>>, None]), Some(0));
        assert_eq!(row_in_two_parts(0, [None::<Vec<u32>>, None]), None);
        // Nothing is allocated for rows that are only counted.
        assert_eq!(row_in_two_parts(usize::MAX, [None, Some(vec![])]), None);
        assert_eq!(row_in_two_parts(5, [None, Some(none)]), None);
    }

    #[test]
    fn bits_that_no_code_has_are_found() {
        for bits in BITS {
            for (rows, columns) in [(1, 1), (70, 13), (300, 16), (16, 5)] {
                let full = ((1u16 << bits) - 1) as u8;
                let mut packed = Vec::new();
                for _ in 0..rows {
                    let mut row = vec![0; row_bytes(bits, columns)];
                    pack_row(&vec![full; columns], bits, &mut row);
                    packed.extend(row);
                }
                let codes = tile_rows(&packed, row_bytes(bits, columns));
                assert_eq!(first_stray_bit(&codes, bits, rows, columns), None);
                // A bit is set already, or is found.
                for bit in 0..8 * codes.len() {
                    let mut codes = codes.clone();
                    if codes[bit / 8] & 1 << (bit % 8) == 0 {
                        codes[bit / 8] |= 1 << (bit % 8);
                        assert!(
                            first_stray_bit(&codes, bits, rows, columns).is_some(),
                            "{bits} {rows} {columns} {bit}"
                        );
                    }
                }
            }
        }
    }
}
