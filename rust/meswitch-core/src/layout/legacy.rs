//! Where codes and scales lie in format versions 1 to 3; they are brought into today's order when tensors are read.
//!
//! Version 3 has today's blocks, but pads the last to a multiple of 8 rows, and stores scales `[rows, groups]`. So do
//! versions 1 and 2, whose codes are in another order: packed rows lie one after another. A row is a sequence of runs, each 64 bytes wide but the last, which is as wide as
//! its columns need, rounded up to 4 bytes. In a run of `w` bytes, bits `b*p .. b*p+b` of byte `j` hold the code of the
//! run's column `p*w + j`. A 3-bit row is the 2-bit row of the low bits, then the 1-bit row of the high bits.

/// Bytes of a whole run.
const RUN_BYTES: usize = 64;

/// How the codes and scales of a part lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Versions 1 and 2: row after row.
    Rows,
    /// Version 3: in blocks, the last padded to a multiple of 8 rows.
    PaddedTo8,
    /// Version 4.
    #[default]
    Current,
}

/// Bytes of one packed row of versions 1 and 2.
pub(crate) const fn row_bytes(bits: u32, columns: usize) -> usize {
    if bits == 3 {
        return row_bytes(2, columns) + row_bytes(1, columns);
    }
    let per_byte = 8 / bits as usize;
    let rest = columns % (RUN_BYTES * per_byte);
    columns / (RUN_BYTES * per_byte) * RUN_BYTES + rest.div_ceil(4 * per_byte) * 4
}

/// Unpacks one row of codes.
fn unpack_row(packed: &[u8], bits: u32, codes: &mut [u8]) {
    codes.fill(0);
    if bits == 3 {
        let (low, high) = packed.split_at(row_bytes(2, codes.len()));
        unpack_plane(low, 2, 0, codes);
        unpack_plane(high, 1, 2, codes);
    } else {
        unpack_plane(packed, bits, 0, codes);
    }
}

/// The first row of versions 1 and 2, if any, with a bit that no code has.
pub(crate) fn first_stray_bit(packed: &[u8], bits: u32, columns: usize) -> Option<usize> {
    let mut codes = vec![0; columns];
    let ones = |bytes: &[u8]| bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
    packed.chunks_exact(row_bytes(bits, columns).max(1)).position(|row| {
        unpack_row(row, bits, &mut codes);
        // Every bit of a code is one of its row's.
        ones(&codes) != ones(row)
    })
}

/// Codes of `rows` rows in today's order.
pub(crate) fn current_codes(codes: Vec<u8>, order: Order, bits: u32, rows: usize, columns: usize) -> Vec<u8> {
    match order {
        Order::Rows => tiled(&codes, bits, columns),
        Order::PaddedTo8 => padded(&codes, rows, super::row_bytes(bits, columns)),
        Order::Current => codes,
    }
}

/// Half precision scales, as bytes, that are `[rows, groups]`, in today's order `[groups, rows]`.
pub(crate) fn current_scales(scales: &[u8], rows: usize) -> Vec<u8> {
    super::turned(scales.as_chunks::<2>().0, rows).into_flattened()
}

fn tiled(packed: &[u8], bits: u32, columns: usize) -> Vec<u8> {
    let (length, stride) = (row_bytes(bits, columns), super::row_bytes(bits, columns));
    let mut codes = vec![0u8; columns];
    let mut rows = vec![0u8; packed.len() / length.max(1) * stride];
    for (packed, row) in packed.chunks_exact(length.max(1)).zip(rows.chunks_exact_mut(stride.max(1))) {
        unpack_row(packed, bits, &mut codes);
        super::pack_row(&codes, bits, row);
    }
    super::tile_rows(&rows, stride)
}

/// Widens the last block.
fn padded(codes: &[u8], rows: usize, row_size: usize) -> Vec<u8> {
    let last = rows / super::BLOCK_ROWS * super::BLOCK_ROWS;
    let (narrow, wide) = ((rows - last).next_multiple_of(8), super::padded_rows(rows) - last);
    let mut all = codes.to_vec();
    if narrow < wide {
        all.resize(super::padded_rows(rows) * row_size, 0);
        let block = &mut all[last * row_size..];
        block.fill(0);
        let lines = codes[last * row_size..].chunks_exact(narrow.max(1)).zip(block.chunks_exact_mut(wide));
        lines.for_each(|(from, to)| to[..narrow].copy_from_slice(from));
    }
    all
}

fn unpack_plane(packed: &[u8], bits: u32, shift: u32, codes: &mut [u8]) {
    let per_byte = 8 / bits as usize;
    let mask = ((1u16 << bits) - 1) as u8;
    for (run, columns) in packed.chunks(RUN_BYTES).zip(codes.chunks_mut(RUN_BYTES * per_byte)) {
        let width = run.len();
        for (plane, columns) in columns.chunks_mut(width).enumerate() {
            let right = bits * plane as u32;
            for (code, byte) in columns.iter_mut().zip(run) {
                *code |= ((byte >> right) & mask) << shift;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_row_is_read() {
        // Two bits, 300 columns: one whole run, then 44 columns in 12 bytes.
        assert_eq!(row_bytes(2, 300), 76);
        let mut packed = [0u8; 76];
        packed[64 + 2] = 3 << 2; // column 256 + 12 + 2
        packed[5] = 1 << 4; // column 2 * 64 + 5
        let mut codes = vec![9; 300];
        unpack_row(&packed, 2, &mut codes);
        let found: Vec<_> =
            (0..300).filter(|column| codes[*column] != 0).map(|column| (column, codes[column])).collect();
        assert_eq!(found, [(133, 1), (270, 3)]);
        let mut row = vec![0; super::super::row_bytes(2, 300)];
        super::super::pack_row(&codes, 2, &mut row);
        assert_eq!(tiled(&packed, 2, 300), super::super::tile_rows(&row, row.len()));
    }

    /// A packed row of 1, 2, 4 or 8 bits, column by column as the format's page says.
    fn old_row(codes: &[u8], bits: u32) -> Vec<u8> {
        if bits == 3 {
            let planes = [(3, 0, 2), (4, 2, 1)].map(|(mask, shift, bits)| {
                old_row(&codes.iter().map(|code| (code & mask) >> shift).collect::<Vec<_>>(), bits)
            });
            return planes.concat();
        }
        let per_byte = 8 / bits as usize;
        let (whole, rest) = (codes.len() / (64 * per_byte), codes.len() % (64 * per_byte));
        let last = 4 * rest.div_ceil(4 * per_byte);
        let mut packed = vec![0; 64 * whole + last];
        for (column, code) in codes.iter().enumerate() {
            let (run, place) = (column / (64 * per_byte), column % (64 * per_byte));
            let width = if run < whole { 64 } else { last };
            packed[64 * run + place % width] |= code << (bits as usize * (place / width));
        }
        packed
    }

    #[test]
    fn bits_of_old_rows_that_no_code_has_are_found() {
        for bits in super::super::BITS {
            for columns in [1, 13, 64, 300] {
                let full = old_row(&vec![((1u16 << bits) - 1) as u8; columns], bits);
                let packed = [vec![0; full.len()], full.clone()].concat();
                assert_eq!(first_stray_bit(&packed, bits, columns), None);
                for bit in (0..8 * full.len()).filter(|bit| full[bit / 8] & 1 << (bit % 8) == 0) {
                    let mut packed = packed.clone();
                    packed[full.len() + bit / 8] |= 1 << (bit % 8);
                    assert_eq!(first_stray_bit(&packed, bits, columns), Some(1), "{bits} {columns} {bit}");
                }
            }
        }
        assert_eq!(first_stray_bit(&[], 2, 0), None);
    }

    #[test]
    fn old_rows_of_any_shape_are_put_in_order() {
        for bits in super::super::BITS {
            for (rows, columns) in [(1, 1), (3, 300), (70, 513), (260, 40)] {
                let code = |index: usize| ((index * 37 + index / 7) as u8) & ((1u16 << bits) - 1) as u8;
                let codes: Vec<u8> = (0..rows * columns).map(code).collect();
                let (mut old, mut new) = (Vec::new(), Vec::new());
                for codes in codes.chunks(columns) {
                    old.extend(old_row(codes, bits));
                    let mut row = vec![0; super::super::row_bytes(bits, columns)];
                    super::super::pack_row(codes, bits, &mut row);
                    new.extend(row);
                }
                let expected = super::super::tile_rows(&new, super::super::row_bytes(bits, columns));
                assert_eq!(current_codes(old, Order::Rows, bits, rows, columns), expected, "{bits} {rows} {columns}");
            }
        }
    }

    #[test]
    fn the_last_block_is_widened_and_scales_are_turned() {
        for rows in [0, 1, 8, 16, 50, 64, 70, 256, 300] {
            let last = rows / 256 * 256;
            // Two bytes a row: its number, and a mark.
            let line = |from: usize, to: usize, width: usize, byte: fn(usize) -> u8| {
                (from..from + width).map(move |row| if row < to { byte(row) } else { 0 })
            };
            let blocks = |padded: usize| {
                let mut codes = Vec::new();
                for first in (0..rows).step_by(256) {
                    let width = (padded - first).min(256);
                    codes.extend(line(first, rows, width, |row| row as u8).chain(line(first, rows, width, |_| 9)));
                }
                codes
            };
            let old = blocks(last + (rows - last).next_multiple_of(8));
            assert_eq!(current_codes(old, Order::PaddedTo8, 2, rows, 3), blocks(super::super::padded_rows(rows)));
        }
        assert_eq!(
            current_scales(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 3),
            [1, 2, 5, 6, 9, 10, 3, 4, 7, 8, 11, 12]
        );
        assert!(current_scales(&[], 0).is_empty());
    }
}
