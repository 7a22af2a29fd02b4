//! Where the code of a column lies in a packed row.
//!
//! One row of `b`-bit codes (b = 1, 2, 4, 8) is a sequence of runs, each 64 bytes wide but the last, which is as wide
//! as its columns need, rounded up to 4 bytes. In a run of `w` bytes, bits `b*p .. b*p+b` of byte `j` hold the code of
//! the run's column `p*w + j`: one shift and one mask give `w` consecutive columns. A 3-bit row is the 2-bit row of
//! the low two bits followed by the 1-bit row of the high ones.

/// Bytes of a whole run: one cache line, one AVX-512 register.
pub const RUN: usize = 64;

/// The code widths of the format.
pub const BITS: [u32; 5] = [1, 2, 3, 4, 8];

/// Bytes of one packed row.
#[must_use]
pub const fn row_bytes(bits: u32, columns: usize) -> usize {
    if bits == 3 {
        return row_bytes(2, columns) + row_bytes(1, columns);
    }
    let per_byte = 8 / bits as usize;
    let rest = columns % (RUN * per_byte);
    columns / (RUN * per_byte) * RUN + rest.div_ceil(4 * per_byte) * 4
}

/// The byte of a packed row that holds a column's code, and how far up in it; not of 3 bits.
#[must_use]
pub fn place(column: usize, bits: u32, columns: usize) -> (usize, usize) {
    let per_byte = 8 / bits as usize;
    let run = column / (RUN * per_byte) * RUN;
    let (width, at) = ((row_bytes(bits, columns) - run).min(RUN), column % (RUN * per_byte));
    (run + at % width, at / width * bits as usize)
}

/// Packs one row of codes. `packed` is `row_bytes(bits, codes.len())` long and is overwritten.
#[inline(always)]
pub fn pack_row(codes: &[u8], bits: u32, packed: &mut [u8]) {
    if bits == 3 {
        let (low, high) = packed.split_at_mut(row_bytes(2, codes.len()));
        pack_plane(codes, 2, 0, low);
        pack_plane(codes, 1, 2, high);
    } else {
        pack_plane(codes, bits, 0, packed);
    }
}

/// Unpacks one row; the inverse of [`pack_row`].
#[inline(always)]
pub fn unpack_row(packed: &[u8], bits: u32, codes: &mut [u8]) {
    if bits == 3 {
        let (low, high) = packed.split_at(row_bytes(2, codes.len()));
        codes.fill(0);
        unpack_plane(low, 2, 0, codes);
        unpack_plane(high, 1, 2, codes);
    } else {
        codes.fill(0);
        unpack_plane(packed, bits, 0, codes);
    }
}

#[inline(always)]
fn pack_plane(codes: &[u8], bits: u32, shift: u32, packed: &mut [u8]) {
    let per_byte = 8 / bits as usize;
    let mask = ((1u16 << bits) - 1) as u8;
    packed.fill(0);
    for (run, columns) in packed.chunks_mut(RUN).zip(codes.chunks(RUN * per_byte)) {
        let width = run.len();
        for (plane, columns) in columns.chunks(width).enumerate() {
            let left = bits * plane as u32;
            for (byte, code) in run.iter_mut().zip(columns) {
                *byte |= ((code >> shift) & mask) << left;
            }
        }
    }
}

#[inline(always)]
fn unpack_plane(packed: &[u8], bits: u32, shift: u32, codes: &mut [u8]) {
    let per_byte = 8 / bits as usize;
    let mask = ((1u16 << bits) - 1) as u8;
    for (run, columns) in packed.chunks(RUN).zip(codes.chunks_mut(RUN * per_byte)) {
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
    use proptest::prelude::*;

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
    }

    #[test]
    fn rows_of_whole_runs_waste_nothing() {
        for bits in BITS {
            assert_eq!(row_bytes(bits, 4096) * 8, 4096 * bits as usize);
            assert_eq!(row_bytes(bits, 0), 0);
        }
    }

    #[test]
    fn a_code_lies_where_the_layout_says() {
        let mut codes = vec![0u8; 256];
        codes[64 * 2 + 5] = 3;
        let mut packed = vec![0; row_bytes(2, 256)];
        pack_row(&codes, 2, &mut packed);
        assert_eq!(packed[5], 3 << 4);
        assert_eq!(packed.iter().filter(|byte| **byte != 0).count(), 1);
    }
}
