//! The code layout of format versions 1 and 2, converted to today's when a delta is read.
//!
//! Packed rows lie one after another. A row is a sequence of runs, each 64 bytes wide but the last, which is as wide as
//! its columns need, rounded up to 4 bytes. In a run of `w` bytes, bits `b*p .. b*p+b` of byte `j` hold the code of the
//! run's column `p*w + j`. A 3-bit row is the 2-bit row of the low bits, then the 1-bit row of the high bits.

/// Bytes of a whole run.
const RUN_BYTES: usize = 64;

/// Bytes of one packed row.
#[must_use]
pub const fn row_bytes(bits: u32, columns: usize) -> usize {
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

/// Converts all rows of a part to today's layout.
#[must_use]
pub fn to_tiled(packed: &[u8], bits: u32, columns: usize) -> Vec<u8> {
    let (length, stride) = (row_bytes(bits, columns), super::row_bytes(bits, columns));
    let mut codes = vec![0u8; columns];
    let mut rows = vec![0u8; packed.len() / length.max(1) * stride];
    for (packed, row) in packed.chunks_exact(length.max(1)).zip(rows.chunks_exact_mut(stride.max(1))) {
        unpack_row(packed, bits, &mut codes);
        super::pack_row(&codes, bits, row);
    }
    super::tile_rows(&rows, stride)
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
        assert_eq!(to_tiled(&packed, 2, 300), super::super::tile_rows(&row, row.len()));
    }
}
