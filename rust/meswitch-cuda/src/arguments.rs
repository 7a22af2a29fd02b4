//! What the kernels are given. The structures are those of `cuda/include/delta.cuh`.

use std::ffi::c_void;
use std::ptr;

use crate::{Error, Result};

/// Parts of a slot, at most.
pub const MOST_PARTS: usize = 5;
/// Weights of a launch, at most.
pub const MOST_SITES: usize = 4;
/// Tokens of a group, at most.
pub const MOST_TOKENS: usize = 4;
/// Groups times sites of a launch, at most.
pub const MOST_UNITS: usize = 512;

const WIDTHS: usize = 4;
const SLICE: usize = 2048;
const TILE_ROWS: usize = 64;

/// Rows of a site that share a bit width. All pointers are to device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The packed codes of format version 4, at a multiple of 16 bytes.
    pub codes: *const u8,
    /// f16 `[groups, count]`.
    pub scales: *const u16,
    /// The rows `[count]`, rising; null for all rows of the site.
    pub rows: *const i32,
    /// How many rows.
    pub count: i32,
    /// 1, 2, 3, 4 or 8.
    pub bits: i32,
    /// Twice the code that means 0.
    pub twice_zero: i32,
    /// Columns that share a scale, at most all.
    pub group_size: i32,
}

/// One slot's delta of a site. A table of them lies in device memory and may change between two launches; slot s is at
/// s + 1 there, since the first entry is always [`Slot::EMPTY`] and stands for every slot beyond the table.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The first `part_count` count. No row is in two.
    pub parts: [Part; MOST_PARTS],
    /// f16 `[columns]`, or null.
    pub column_scales: *const u16,
    /// Salient channels `[salient_count]`.
    pub salient_index: *const i32,
    /// f16 `[rows, salient_count]`.
    pub salient: *const u16,
    /// f16 `[rows, rank]`.
    pub u: *const u16,
    /// f16 `[rank, columns]`.
    pub v: *const u16,
    /// Where the sparse entries of each row start `[rows + 1]`, or null.
    pub starts: *const i32,
    /// `[entries]`.
    pub gaps: *const u8,
    /// f8 e5m2 `[entries]`.
    pub values: *const u8,
    /// `2^exponent`.
    pub unit: f32,
    /// How many parts.
    pub part_count: i32,
    /// How many salient channels.
    pub salient_count: i32,
    /// Rank of the low-rank part.
    pub rank: i32,
}

/// Tokens of one slot: `order[first .. first + count]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Their slot.
    pub slot: i32,
    /// The first of them in `order`.
    pub first: i32,
    /// From one to [`MOST_TOKENS`].
    pub count: i32,
}

/// A weight of a launch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Its deltas `[slot_count + 1]`, in device memory.
    pub slots: *const Slot,
    /// `[tokens, rows]`, of the type of x.
    pub y: *mut c_void,
    /// Elements from one token of y to the next.
    pub y_stride: i64,
    /// Output channels.
    pub rows: i32,
    /// Slots of the table.
    pub slot_count: i32,
}

/// A launch: `y[t] += Δ̂_slot(t) · x[t]` for weights that share an input. All pointers are to device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// The first `site_count` count.
    pub sites: [Site; MOST_SITES],
    /// Groups of tokens, see [`groups`].
    pub groups: *const Group,
    /// Their number.
    pub group_count: *const i32,
    /// Tokens, group by group.
    pub order: *const i32,
    /// `[tokens, columns]`.
    pub x: *const c_void,
    /// Elements from one token of x to the next.
    pub x_stride: i64,
    /// Of [`Workspace::ready`] bytes, at a multiple of 16.
    pub ready: *mut u8,
    /// Of [`Workspace::steps`] bytes.
    pub steps: *mut f32,
    /// Of [`Workspace::vx`] bytes.
    pub vx: *mut f32,
    /// Of [`Workspace::partial`] bytes: zeros before a launch, and after it.
    pub partial: *mut f32,
    /// Input channels.
    pub columns: i32,
    /// How many sites.
    pub site_count: i32,
    /// Shares of the columns, see [`splits`].
    pub splits: i32,
    /// The most rows of a site.
    pub most_rows: i32,
    /// The highest rank of a slot.
    pub most_rank: i32,
    /// Zero.
    pub reserved: i32,
}

/// A launch that adds rows: `y[i] += Δ̂ of slot slot_of[i] [ids[i], :]`. What has no slot, or no such row, is left alone.
/// All pointers are to device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RowsLaunch {
    /// Deltas `[slot_count + 1]`.
    pub slots: *const Slot,
    /// Slots `[count]`, below zero for none; null: `slot` for all.
    pub slot_of: *const i32,
    /// Rows `[count]`; null: `first` and those after it.
    pub ids: *const i64,
    /// `[count, columns]`.
    pub y: *mut c_void,
    /// Elements from one row of y to the next.
    pub y_stride: i64,
    /// Rows to add.
    pub count: i32,
    /// Rows that the deltas have.
    pub rows: i32,
    /// Columns.
    pub columns: i32,
    /// The slot of all, where `slot_of` is null.
    pub slot: i32,
    /// The first row, where `ids` is null.
    pub first: i32,
    /// Slots of the table.
    pub slot_count: i32,
}

const _: () = assert!(size_of::<Part>() == 40 && size_of::<Slot>() == 280);
const _: () = assert!(size_of::<Launch>() == 224 && size_of::<RowsLaunch>() == 64);

impl Slot {
    /// A slot without a delta.
    pub const EMPTY: Self = Self {
        parts: [Part::NONE; MOST_PARTS],
        column_scales: ptr::null(),
        salient_index: ptr::null(),
        salient: ptr::null(),
        u: ptr::null(),
        v: ptr::null(),
        starts: ptr::null(),
        gaps: ptr::null(),
        values: ptr::null(),
        unit: 0.0,
        part_count: 0,
        salient_count: 0,
        rank: 0,
    };

    /// What lies in a table in device memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        // SAFETY: there are no bytes between the fields, which the sizes above say, and pointers are only copied.
        unsafe { std::mem::transmute(*self) }
    }
}

impl Part {
    const NONE: Self = Self {
        codes: ptr::null(),
        scales: ptr::null(),
        rows: ptr::null(),
        count: 0,
        bits: 0,
        twice_zero: 0,
        group_size: 0,
    };

    /// Rows of a site with so many columns, with the numbers that the kernels want.
    ///
    /// # Errors
    /// [`Error::Argument`] for codes that they do not take.
    pub fn new(bits: u32, zero: f32, group_size: usize, count: usize, columns: usize) -> Result<Self> {
        let twice_zero = 2.0 * zero;
        if !matches!(bits, 1 | 2 | 3 | 4 | 8) || twice_zero.fract() != 0.0 || !(0.0..=512.0).contains(&twice_zero) {
            let text = format!("expected 1, 2, 3, 4 or 8 bits and a zero in halves, found {bits} bits and {zero}");
            return Err(Error::Argument(text));
        }
        Ok(Self {
            count: int("rows", count)?,
            bits: bits as i32,
            twice_zero: twice_zero as i32,
            group_size: int("columns", group_size.clamp(1, columns.max(1)))?,
            ..Self::NONE
        })
    }
}

/// A count as the kernels have it.
///
/// # Errors
/// [`Error::Argument`] for one above 2²⁴, beyond which products of two might not fit their integers.
pub fn int(name: &str, count: usize) -> Result<i32> {
    const MOST: usize = 1 << 24;
    if count > MOST {
        return Err(Error::Argument(format!("{name}: expected at most {MOST}, found {count}")));
    }
    Ok(count as i32)
}

/// Groups of tokens, and the tokens in their order, for the slot of each token. Tokens of slot −1 are in no group.
#[must_use]
pub fn groups(slots: &[i32]) -> (Vec<Group>, Vec<i32>) {
    let mut order: Vec<usize> = (0..slots.len()).filter(|token| slots[*token] >= 0).collect();
    order.sort_by_key(|token| slots[*token]);
    let mut groups: Vec<Group> = Vec::new();
    for (at, token) in order.iter().enumerate() {
        match groups.last_mut() {
            Some(last) if last.slot == slots[*token] && (last.count as usize) < MOST_TOKENS => last.count += 1,
            _ => groups.push(Group { slot: slots[*token], first: at as i32, count: 1 }),
        }
    }
    (groups, order.into_iter().map(|token| token as i32).collect())
}

/// Shares of the columns that a launch is divided into: the fewest that give about 64 items, which is what it takes to
/// keep memory busy. It depends on shapes alone, so a token's bits do not depend on the batch.
///
/// `rows`: the sum of the sites'.
#[must_use]
pub fn splits(rows: usize, columns: usize) -> i32 {
    const ITEMS: usize = 64;
    const LEAST_COLUMNS: usize = 1024;
    ITEMS.div_ceil(rows.div_ceil(TILE_ROWS).max(1)).clamp(1, (columns / LEAST_COLUMNS).max(1)) as i32
}

/// Bytes of device memory that a launch works in. Launches of one stream may share them; other streams need their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// x as tensor cores read it.
    pub ready: usize,
    /// What its integers are worth.
    pub steps: usize,
    /// `v · x`.
    pub vx: usize,
    /// Codes times x; zeros at first.
    pub partial: usize,
}

impl Launch {
    /// A launch without sites.
    pub const EMPTY: Self = Self {
        sites: [Site { slots: ptr::null(), y: ptr::null_mut(), y_stride: 0, rows: 0, slot_count: 0 }; MOST_SITES],
        groups: ptr::null(),
        group_count: ptr::null(),
        order: ptr::null(),
        x: ptr::null(),
        x_stride: 0,
        ready: ptr::null_mut(),
        steps: ptr::null_mut(),
        vx: ptr::null_mut(),
        partial: ptr::null_mut(),
        columns: 0,
        site_count: 0,
        splits: 1,
        most_rows: 0,
        most_rank: 0,
        reserved: 0,
    };

    /// The workspace of this launch, for at most so many groups.
    ///
    /// # Errors
    /// [`Error::Argument`] for counts that the kernels do not take.
    pub fn workspace(&self, most_groups: usize) -> Result<Workspace> {
        let count = |name: &str, value: i32, least: usize, most: usize| match usize::try_from(value) {
            Ok(count) if (least..=most).contains(&count) => Ok(count),
            _ => Err(Error::Argument(format!("{name}: expected {least} to {most}, found {value}"))),
        };
        let sites = count("sites", self.site_count, 1, MOST_SITES)?;
        let columns = count("columns", self.columns, 1, 1 << 24)?;
        let splits = count("splits", self.splits, 1, 64)?;
        let rows = count("rows", self.most_rows, 1, 1 << 24)?;
        let rank = count("rank", self.most_rank, 0, 1 << 16)?;
        let units = most_groups.saturating_mul(sites);
        if units > MOST_UNITS {
            let text = format!("expected at most {MOST_UNITS} groups times sites, found {most_groups} times {sites}");
            return Err(Error::Argument(text));
        }
        Ok(Workspace {
            ready: units * WIDTHS * columns.next_multiple_of(256) * 2 * MOST_TOKENS,
            steps: units * WIDTHS * columns.div_ceil(SLICE) * MOST_TOKENS * size_of::<f32>(),
            vx: units * MOST_TOKENS * rank * size_of::<f32>(),
            partial: units * splits * MOST_TOKENS * rows * size_of::<f32>(),
        })
    }
}
