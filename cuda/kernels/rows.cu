// Rows of Δ̂ as floats, added to y: an embedding's rows by token, or a tile of a weight that is multiplied whole.
//
// A block's item is 32 rows and 256 columns. Codes of neighbouring rows are neighbours in the file, so a lane has a row,
// and a warp 32 of the columns; y is written with a lane a column. Between the two, the item lies in shared memory.
#include "../include/delta.cuh"

constexpr int ITEM_ROWS = 32, ITEM_COLUMNS = 256;
constexpr int OWN_COLUMNS = ITEM_COLUMNS / WARPS;  // of a warp

struct RowsMemory {
    float sums[ITEM_ROWS][ITEM_COLUMNS + 1];
    const Slot* slots[ITEM_ROWS];  // null: nothing to add
    int32_t rows[ITEM_ROWS];
};

// Where in a part a row of the site is; -1 where it is in another.
DEVICE int place_in(const Part& part, int row) {
    if (!part.rows) return row < part.count ? row : -1;
    int low = 0, high = part.count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (part.rows[middle] < row) low = middle + 1;
        else high = middle;
    }
    return low < part.count && part.rows[low] == row ? low : -1;
}

// A code of 1, 2, 4 or 8 bits, of the row whose first byte is at `row`.
DEVICE int code_at(const uint8_t* row, int pitch, int bits, int column) {
    int places = 8 / bits;
    return row[int64_t{column / places} * pitch] >> (bits * (column % places)) & ((1 << bits) - 1);
}

// Codes times scales of one row, for columns from `first` to before `end`.
DEVICE void add_part(float* sums, const Part& part, const uint16_t* column_scales, int place, int columns, int first, int end) {
    int block = place / BLOCK_ROWS * BLOCK_ROWS, left = padded_rows(part.count) - block;
    int pitch = left < BLOCK_ROWS ? left : BLOCK_ROWS;
    const uint8_t* row = part.codes + int64_t{block} * row_bytes(part.bits, columns) + (place - block);
    const uint8_t* high = row + int64_t{row_bytes(2, columns)} * pitch;  // of 3 bits
    float zero = 0.5f * float(part.twice_zero), scale = 0.f;
    int group_end = first;
    for (int column = first; column < end; column++) {
        if (column == group_end) {
            int group = column / part.group_size;
            scale = half_to_float(part.scales[int64_t{group} * part.count + place]);
            group_end = (group + 1) * part.group_size;
        }
        int code = part.bits == 3 ? code_at(row, pitch, 2, column) + 4 * code_at(high, pitch, 1, column)
                                  : code_at(row, pitch, part.bits, column);
        float value = scale * (float(code) - zero);
        sums[column - first] += column_scales ? value * half_to_float(column_scales[column]) : value;
    }
}

// Salient channels and sparse entries of one row, for columns from `first` to before `end`.
DEVICE void add_single(float* sums, const Slot& slot, int row, int first, int end) {
    for (int k = 0; k < slot.salient_count; k++) {
        int column = slot.salient_index[k];
        if (column >= first && column < end) {
            sums[column - first] += half_to_float(slot.salient[int64_t{row} * slot.salient_count + k]);
        }
    }
    if (!slot.starts) return;
    for (int at = slot.starts[row], column = 0; at < slot.starts[row + 1]; at++) {
        column += slot.gaps[at];
        if (column >= end) break;
        if (column >= first) sums[column - first] += half_to_float(uint16_t(slot.values[at] << 8));
    }
}

// What a row's low-rank part has in a column.
DEVICE float low_rank_at(const Slot& slot, int row, int column, int columns) {
    float sum = 0.f;
    for (int k = 0; k < slot.rank; k++) {
        sum += half_to_float(slot.u[int64_t{row} * slot.rank + k]) * half_to_float(slot.v[int64_t{k} * columns + column]);
    }
    return sum;
}

// Finds the row of each of the item's lanes.
DEVICE void find_rows(RowsMemory& memory, const RowsLaunch& launch, int first) {
    if (threadIdx.x >= ITEM_ROWS) return;
    int at = first + threadIdx.x, slot = -1;
    int64_t row = -1;
    if (at < launch.count) {
        slot = launch.slot_of ? launch.slot_of[at] : launch.slot;
        row = launch.ids ? launch.ids[at] : launch.first + at;
    }
    const Slot& delta = slot_in(launch.slots, launch.slot_count, slot);
    bool there = row >= 0 && row < launch.rows && !is_empty(delta);
    memory.slots[threadIdx.x] = there ? &delta : nullptr;
    memory.rows[threadIdx.x] = there ? int(row) : 0;
}

template <typename T>
DEVICE void add_item(RowsMemory& memory, const RowsLaunch& launch, int first_row, int first_column) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = launch.columns;
    int last_column = first_column + ITEM_COLUMNS < columns ? first_column + ITEM_COLUMNS : columns;
    find_rows(memory, launch, first_row);
    __syncthreads();

    const Slot* slot = memory.slots[lane];
    int row = memory.rows[lane], first = first_column + warp * OWN_COLUMNS;
    float* sums = &memory.sums[lane][warp * OWN_COLUMNS];
    for (int i = 0; i < OWN_COLUMNS; i++) sums[i] = 0.f;
    if (slot) {
        int end = first + OWN_COLUMNS < columns ? first + OWN_COLUMNS : columns;
        for (int at = 0; at < slot->part_count; at++) {
            int place = place_in(slot->parts[at], row);
            if (place >= 0) add_part(sums, slot->parts[at], slot->column_scales, place, columns, first, end);
        }
        add_single(sums, *slot, row, first, end);
    }
    __syncthreads();

    for (int at = warp; at < ITEM_ROWS; at += WARPS) {
        slot = memory.slots[at];
        if (!slot) continue;
        T* y = static_cast<T*>(launch.y) + (first_row + at) * launch.y_stride;
        for (int column = first_column + lane; column < last_column; column += 32) {
            float sum = memory.sums[at][column - first_column] + low_rank_at(*slot, memory.rows[at], column, columns);
            narrow(y[column], widen(y[column]) + slot->unit * sum);
        }
    }
    __syncthreads();  // `sums` are read by all before the next item writes them
}

template <typename T>
DEVICE void add_rows(const RowsLaunch& launch) {
    RowsMemory& memory = *reinterpret_cast<RowsMemory*>(shared_memory());
    int across = ceil_div(launch.columns, ITEM_COLUMNS), items = ceil_div(launch.count, ITEM_ROWS) * across;
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        add_item<T>(memory, launch, item / across * ITEM_ROWS, item % across * ITEM_COLUMNS);
    }
}

static_assert(sizeof(RowsMemory) == ROWS_SHARED, "as the launcher has it");

KERNEL delta_rows_bf16(const __grid_constant__ RowsLaunch launch) { add_rows<Bfloat>(launch); }
KERNEL delta_rows_f32(const __grid_constant__ RowsLaunch launch) { add_rows<float>(launch); }
