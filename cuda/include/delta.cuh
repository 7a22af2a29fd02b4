// What a launch is given: deltas of sites by slot, and what is multiplied with them (Launch) or added to them (RowsLaunch).
//
// The launcher (rust/meswitch-cuda/src/arguments.rs) has the same structures and checks what is said of them here.
#pragma once
#include "machine.cuh"

constexpr int MOST_PARTS = 5;    // of a slot
constexpr int MOST_SITES = 4;    // of a launch: weights that share an input, as q, k and v do
constexpr int MOST_TOKENS = 4;   // of a group: with two bytes a token, the eight columns of an mma
constexpr int MOST_UNITS = 512;  // groups · sites of a launch
constexpr int WIDTHS = 4;        // layouts of x: for codes of 1, 2, 4 and 8 bits
constexpr int SLICE = 2048;      // columns that share a step of x
constexpr int BLOCK_ROWS = 256;  // rows whose bytes lie together (docs/format.md)
constexpr int TILE_ROWS = 64;    // rows that a block works on at a time

// Bytes of shared memory that each kernel is launched with.
constexpr int PREPARE_SHARED = 2080, MULTIPLY_SHARED = 100352, FINISH_SHARED = 3072, ROWS_SHARED = 33280;

// Rows that share a bit width. Pointers are to tensors as the file has them, at multiples of 16 bytes.
struct Part {
    const uint8_t* codes;
    const uint16_t* scales;  // f16 [groups, count]
    const int32_t* rows;     // [count], or null: all rows of the site
    int32_t count, bits;
    int32_t twice_zero;      // zero is a multiple of one half
    int32_t group_size;      // columns of a scale, at most all
};

// One slot's delta of a site. All zeros: an empty slot. Changing it between two launches needs nothing else.
// In a table, slot s lies at s + 1: the first is always empty and stands for every slot beyond the table.
struct Slot {
    Part parts[MOST_PARTS];
    const uint16_t* column_scales;  // f16 [columns], or null
    const int32_t* salient_index;   // [salient_count]
    const uint16_t* salient;        // f16 [rows, salient_count]
    const uint16_t* u;              // f16 [rows, rank]
    const uint16_t* v;              // f16 [rank, columns]
    const int32_t* starts;          // of sparse entries [rows + 1], or null
    const uint8_t* gaps;            // [entries]
    const uint8_t* values;          // f8 e5m2 [entries]
    float unit;                     // 2^exponent
    int32_t part_count, salient_count, rank;
};

// Tokens of one slot: order[first .. first + count), from one to MOST_TOKENS.
struct Group {
    int32_t slot, first, count;
};

struct Site {
    const Slot* slots;  // [slot_count + 1]
    void* y;            // [tokens, rows], of x's type
    int64_t y_stride;   // elements from one token to the next
    int32_t rows, slot_count;
};

// A unit is a group at a site: unit = group · site_count + site.
struct Launch {
    Site sites[MOST_SITES];
    const Group* groups;
    const int32_t* group_count;
    const int32_t* order;  // tokens
    const void* x;         // [tokens, columns], bfloat16 or float32
    int64_t x_stride;
    // The workspace, of one stream: launches of other streams need their own.
    uint8_t* ready;  // [units, WIDTHS, padded columns, 2 · MOST_TOKENS]: x as mma reads it
    float* steps;    // [units, WIDTHS, slices, MOST_TOKENS]: what an integer of `ready` is worth
    float* vx;       // [units, MOST_TOKENS, most_rank]: v · x
    float* partial;  // [units, splits, MOST_TOKENS, most_rows]: codes · x; zeros before a launch and after it
    int32_t columns, site_count;
    int32_t splits;  // of the columns; from shapes alone, so that bits do not depend on the batch
    int32_t most_rows, most_rank, reserved;
};

// y[i] += row ids[i] of Δ̂ of slot slot_of[i]. What has no slot, or no such row, is left alone.
struct RowsLaunch {
    const Slot* slots;       // [slot_count + 1]
    const int32_t* slot_of;  // [count], below zero for none; null: `slot` for all
    const int64_t* ids;      // [count]; null: first, first + 1 and so on
    void* y;                 // [count, columns], bfloat16 or float32
    int64_t y_stride;
    int32_t count, rows, columns;
    int32_t slot, first, slot_count;
};
static_assert(sizeof(Part) == 40 && sizeof(Slot) == 280 && sizeof(Launch) == 224 && sizeof(RowsLaunch) == 64,
              "as the launcher has them");

HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
HOST_DEVICE int row_bytes(int bits, int columns) { return bits * ceil_div(columns, 8); }
HOST_DEVICE int padded_columns(int columns) { return ceil_div(columns, 256) * 256; }
HOST_DEVICE int slices_of(int columns) { return ceil_div(columns, SLICE); }
HOST_DEVICE int padded_rows(int rows) {
    int multiple = rows > 48 ? 64 : 16;
    return ceil_div(rows, multiple) * multiple;
}
// 0, 1, 2 or 3 for codes of 1, 2, 4 or 8 bits, of which a byte holds 8 >> width.
HOST_DEVICE int width_of(int bits) { return bits == 8 ? 3 : bits / 2; }

DEVICE const Slot& slot_in(const Slot* slots, int slot_count, int slot) {
    return slots[slot >= 0 && slot < slot_count ? slot + 1 : 0];
}
DEVICE bool is_empty(const Slot& slot) { return !slot.part_count && !slot.salient_count && !slot.rank && !slot.starts; }

// A group at a site.
struct Unit {
    const Launch& launch;
    int number;
    const Group& group;
    const Site& site;
    const Slot& slot;

    MEMBER Unit(const Launch& launch, int number)
        : launch(launch), number(number), group(launch.groups[number / launch.site_count]),
          site(launch.sites[number % launch.site_count]), slot(slot_in(site.slots, site.slot_count, group.slot)) {}

    MEMBER int token(int at) const { return launch.order[group.first + at]; }
    template <typename T>
    MEMBER const T* x(int at) const {
        return static_cast<const T*>(launch.x) + token(at) * launch.x_stride;
    }
    MEMBER uint8_t* ready(int width) const {
        return launch.ready + (int64_t{number} * WIDTHS + width) * padded_columns(launch.columns) * (2 * MOST_TOKENS);
    }
    MEMBER float* steps(int width, int slice) const {
        return launch.steps + ((int64_t{number} * WIDTHS + width) * slices_of(launch.columns) + slice) * MOST_TOKENS;
    }
    MEMBER float* vx(int at) const { return launch.vx + (int64_t{number} * MOST_TOKENS + at) * launch.most_rank; }
    MEMBER float* partial(int split, int at) const {
        return launch.partial + ((int64_t{number} * launch.splits + split) * MOST_TOKENS + at) * launch.most_rows;
    }
};

// How a kernel's items are dealt to blocks: those of unit 0, then those of unit 1, and so on.
struct Schedule {
    int32_t ends[MOST_UNITS];  // the number of items up to and with those of a unit

    // The number of all items, where `count(unit)` is that of one. Every thread of the block comes.
    template <typename Count>
    MEMBER int plan(const Launch& launch, Count count) {
        int units = *launch.group_count * launch.site_count, thread = threadIdx.x;
        for (int unit = thread; unit < units; unit += THREADS) ends[unit] = count(Unit(launch, unit));
        __syncthreads();
        int before = 0;
        for (int first = 0; thread < 32 && first < units; first += 32) {
            int sum = before + warp_running_sum(first + thread < units ? ends[first + thread] : 0);
            if (first + thread < units) ends[first + thread] = sum;
            before = __shfl_sync(~0u, sum, 31);
        }
        __syncthreads();
        return units ? ends[units - 1] : 0;
    }

    // The unit of an item, which becomes the item's number within the unit.
    MEMBER int find(int& item, const Launch& launch) const {
        int low = 0, high = *launch.group_count * launch.site_count - 1;
        while (low < high) {
            int middle = (low + high) / 2;
            if (ends[middle] > item) high = middle;
            else low = middle + 1;
        }
        if (low) item -= ends[low - 1];
        return low;
    }
};
