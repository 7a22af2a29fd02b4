// Second of three kernels for y[t] += Δ̂_slot(t) · x[t]: codes times x, on tensor cores, for a few tokens a slot.
//
// A block's item is a tile of 64 rows of one part, a share of the columns, and the tokens of one unit. Its warps divide
// the columns and meet only at the end. A warp goes through chunks of 32 byte columns, [32 bytes, 64 rows], that cp.async
// brings in together with their x:
//
//     file and shared memory            ldmatrix.trans                    two byte picks: operand A of mma, 16 x 32
//     byte j    of rows 0 1 2 … 63      lane (g, t): bytes 2t, 2t + 1     rows 2g (a0, a2) and 2g + 1 (a1, a3), bytes
//     byte j+1  of rows 0 1 2 … 63      of rows 2g, 2g + 1                2t, 2t+1, 8+2t, 9+2t (a0, a1), 16 more (a2, a3)
//
// A byte holds 8 / BITS columns, its places. A mask leaves one of them where it is: the tensor core then multiplies by
// code · 2^(BITS·place), and the sums of different places are kept apart until the end, so codes are hardly ever shifted.
// A tile of ones gives Σ x, which zero multiplies. All of that is in integers and exact, so a token's bits do not depend
// on its neighbours. Sums become floats where a scale or a step of x ends, and are added in the order of the columns.
#include "../include/delta.cuh"

constexpr int CHUNK = 32;  // byte columns
constexpr int CODE_BYTES = CHUNK * TILE_ROWS, X_BYTES = CHUNK * 8 * 2 * MOST_TOKENS;  // of a chunk, at most
constexpr int STAGES = 3;  // chunks of a warp in shared memory
constexpr int TILES = TILE_ROWS / 16;

struct Stage {
    uint8_t codes[CODE_BYTES];  // byte column j: 64 rows, of which 16-byte piece p lies at p ^ (j / 2 & 3)
    uint8_t x[X_BYTES];
};

// Within 99 KiB, which is what a block of compute capability 8.6, 8.9 and 12.0 may have.
struct MultiplyMemory {
    Stage stages[WARPS][STAGES];
    Schedule schedule;
};
static_assert(sizeof(MultiplyMemory) == MULTIPLY_SHARED && MULTIPLY_SHARED <= 99 << 10, "as the launcher has it");

// A tile's codes of one plane: all bits of a part, or the low two or the high one of 3.
struct Plane {
    const uint8_t* codes;  // of the tile's first row, in the plane's first byte column
    int32_t pitch, pieces;  // bytes from one byte column to the next; 16-row pieces that there are
    int32_t bytes;          // byte columns
};

DEVICE Plane plane_of(const Part& part, int columns, int tile, int bits, int first_byte) {
    int row = tile * TILE_ROWS, block = row / BLOCK_ROWS * BLOCK_ROWS, left = padded_rows(part.count) - block;
    int pitch = left < BLOCK_ROWS ? left : BLOCK_ROWS, rows = pitch - (row - block);
    const uint8_t* codes = part.codes + int64_t{block} * row_bytes(part.bits, columns) + int64_t{first_byte} * pitch;
    return {codes + (row - block), pitch, rows < TILE_ROWS ? rows / 16 : TILES, row_bytes(bits, columns)};
}

// Starts to bring a chunk and its x; nothing from `end` on. Four lanes bring a byte column of 64 rows.
DEVICE void fetch(Stage& stage, const Plane& plane, const uint8_t* x, int x_bytes, int chunk, int end) {
    int lane = threadIdx.x % 32, first = lane / 4, piece = lane % 4;
    if (chunk < end) {
        const uint8_t* from = plane.codes + (int64_t{chunk} * CHUNK + first) * plane.pitch + 16 * piece;
        uint8_t* to = stage.codes + first * TILE_ROWS + 16 * (piece ^ (first / 2 & 3));
#pragma unroll
        for (int j = 0; j < CHUNK; j += 8) {
            bool there = piece < plane.pieces && chunk * CHUNK + first + j < plane.bytes;
            if (there) copy16(to + j * TILE_ROWS, from + int64_t{j} * plane.pitch);
        }
        for (int at = 16 * lane; at < x_bytes; at += 512) copy16(stage.x + at, x + int64_t{chunk} * x_bytes + at);
    }
    copies_commit();
}

// A warp's integers: by tile of 16 rows and place, fragment C of mma; and Σ x, in each row of another.
template <int BITS>
struct Sums {
    static constexpr int PLACES = 8 / BITS, APART = PLACES < 4 ? PLACES : 4;
    int32_t codes[TILES][APART][4];
    int32_t x[4];
};

// 0xff for each byte of operand B whose column of the chunk is from `low` to before `high`.
DEVICE uint32_t bytes_within(int first_byte, int places, int place, int low, int high) {
    uint32_t within = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int column = (first_byte + i / 2 * 8 + i % 2) * places + place;
        if (column >= low && column < high) within |= 0xffu << (8 * i);
    }
    return within;
}

// Adds the chunk's columns from `low` to before `high`; all of them where it is WHOLE.
template <int BITS, bool WHOLE>
DEVICE void multiply_chunk(Sums<BITS>& sums, const Stage& stage, int planes, int low, int high) {
    constexpr int PLACES = Sums<BITS>::PLACES, APART = Sums<BITS>::APART;
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u, ONES[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
    int lane = threadIdx.x % 32, n = lane / 4 < planes ? lane / 4 : 0, t = lane % 4;
    uint32_t picked[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        uint32_t raw[4];
        load_transposed(raw, stage.codes + lane * TILE_ROWS + 16 * (tile ^ (lane / 2 & 3)));
        picked[tile][0] = pick_bytes(raw[0], raw[1], 0x6420);
        picked[tile][1] = pick_bytes(raw[0], raw[1], 0x7531);
        picked[tile][2] = pick_bytes(raw[2], raw[3], 0x6420);
        picked[tile][3] = pick_bytes(raw[2], raw[3], 0x7531);
    }
#pragma unroll
    for (int place = 0; place < PLACES; place++) {
        uint2 b = load8(stage.x + ((place * planes + n) * 4 + t) * 8);
        if (!WHOLE) {
            b.x &= bytes_within(2 * t, PLACES, place, low, high);
            b.y &= bytes_within(2 * t + 16, PLACES, place, low, high);
        }
        multiply(sums.x, ONES, b);
        int apart = place % APART;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = (picked[tile][i] >> (BITS * (place - apart))) & (MASK << (BITS * apart));
            multiply(sums.codes[tile][apart], a, b);
        }
    }
}

// What a scale covers of a plane: its factor of codes and of x, doubled, so that both are integers.
struct Terms {
    int32_t codes, x;
};

// Makes floats of the integers, in units of their scale and step, and begins anew.
template <int BITS>
DEVICE void flush(float (&done)[TILES][2], Sums<BITS>& sums, Terms twice, const uint16_t* scales, int rows, float step) {
    int first = threadIdx.x % 32 / 4 * 2;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            int32_t high = 0, low = 0;
#pragma unroll
            for (int apart = 0; apart < Sums<BITS>::APART; apart++) {
                high += sums.codes[tile][apart][2 * odd] >> (BITS * apart);
                low += sums.codes[tile][apart][2 * odd + 1] >> (BITS * apart);
            }
            high = twice.codes * high - twice.x * sums.x[0], low = twice.codes * low - twice.x * sums.x[1];
            int row = 16 * tile + first + odd;
            float scale = row < rows ? half_to_float(scales[row]) : 0.f;
            done[tile][odd] += scale * (0.5f * step * (256.f * float(high) + float(low)));
        }
    }
    sums = {};
}

// Adds this warp's share of a plane of a part to `done`, by row 16·tile + 2·(lane / 4) + odd and token lane % 4.
template <int BITS>
DEVICE void multiply_plane(float (&done)[TILES][2], Stage (&stages)[STAGES], const Unit& unit, const Part& part, int tile,
                           int split, int first_byte, Terms twice) {
    constexpr int PLACES = 8 / BITS, COLUMNS = CHUNK * PLACES;
    int columns = unit.launch.columns, token = threadIdx.x % 4, planes = 2 * unit.group.count, x_bytes = COLUMNS * planes;
    int rows = part.count - tile * TILE_ROWS, width = width_of(BITS);
    const uint8_t* x = unit.ready(width);
    Plane plane = plane_of(part, columns, tile, BITS, first_byte);
    int64_t chunks = ceil_div(plane.bytes, CHUNK), share = split * WARPS + threadIdx.x / 32, shares = unit.launch.splits * WARPS;
    int chunk = int(chunks * share / shares), end = int(chunks * (share + 1) / shares), stage = 0;
    __syncwarp();  // the last plane's chunks are no longer read
#pragma unroll 1
    for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(stages[ahead], plane, x, x_bytes, chunk + ahead, end);

    Sums<BITS> sums = {};
    int column = chunk * COLUMNS;
    int group = column / part.group_size, group_end = (group + 1) * part.group_size;
#pragma unroll 1
    for (; chunk < end; chunk++) {
        copies_wait<STAGES - 2>();
        __syncwarp();
        fetch(stages[stage ? stage - 1 : STAGES - 1], plane, x, x_bytes, chunk + STAGES - 1, end);
        int first = column, last = first + COLUMNS < columns ? first + COLUMNS : columns;
#pragma unroll 1
        while (column < last) {
            int until = group_end < last ? group_end : last;
            if (column == first && until == last) multiply_chunk<BITS, true>(sums, stages[stage], planes, 0, COLUMNS);
            else multiply_chunk<BITS, false>(sums, stages[stage], planes, column - first, until - first);
            column = until;
            if (column == group_end || column == columns || column % SLICE == 0 || (chunk + 1 == end && column == last)) {
                float step = token < unit.group.count ? unit.steps(width, first / SLICE)[token] : 0.f;
                flush(done, sums, twice, part.scales + int64_t{group} * part.count + tile * TILE_ROWS, rows, step);
            }
            if (column == group_end) group++, group_end += part.group_size;
        }
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    copies_wait<0>();
}

// One item: a tile of a part's rows, a share of the columns.
DEVICE void multiply_tile(MultiplyMemory& memory, const Unit& unit, const Part& part, int tile, int split) {
    Stage(&stages)[STAGES] = memory.stages[threadIdx.x / 32];
    float done[TILES][2] = {};
    int zero = part.twice_zero, high_plane = row_bytes(2, unit.launch.columns);
    if (part.bits == 1) multiply_plane<1>(done, stages, unit, part, tile, split, 0, {2, zero});
    else if (part.bits == 4) multiply_plane<4>(done, stages, unit, part, tile, split, 0, {2, zero});
    else if (part.bits == 8) multiply_plane<8>(done, stages, unit, part, tile, split, 0, {2, zero});
    else multiply_plane<2>(done, stages, unit, part, tile, split, 0, {2, zero});
    if (part.bits == 3) multiply_plane<1>(done, stages, unit, part, tile, split, high_plane, {8, 0});

    // What the warps have, [token][row] each, goes where their chunks were, and is added in their order.
    __syncwarp();
    int lane = threadIdx.x % 32;
    float* own = reinterpret_cast<float*>(&stages[0]) + lane % 4 * TILE_ROWS;
#pragma unroll
    for (int at = 0; at < TILES; at++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) own[16 * at + lane / 4 * 2 + odd] = done[at][odd];
    }
    __syncthreads();
    int token = threadIdx.x / TILE_ROWS, row = tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    if (token < unit.group.count && row < part.count) {
        float sum = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += reinterpret_cast<float*>(&memory.stages[warp][0])[threadIdx.x];
        unit.partial(split, token)[part.rows ? part.rows[row] : row] = sum;
    }
    __syncthreads();  // the next item's chunks go where these sums are
}

KERNEL delta_multiply(const __grid_constant__ Launch launch) {
    MultiplyMemory& memory = *reinterpret_cast<MultiplyMemory*>(shared_memory());
    int splits = launch.splits;
    int items = memory.schedule.plan(launch, [splits](const Unit& unit) {
        int tiles = 0;
        for (int at = 0; at < unit.slot.part_count; at++) tiles += ceil_div(unit.slot.parts[at].count, TILE_ROWS);
        return tiles * splits;
    });
#pragma unroll 1
    for (int at = blockIdx.x; at < items; at += gridDim.x) {
        int item = at;
        Unit unit(launch, memory.schedule.find(item, launch));
        int split = item % splits, tile = item / splits, part = 0;
        for (int tiles; tile >= (tiles = ceil_div(unit.slot.parts[part].count, TILE_ROWS)); part++) tile -= tiles;
        multiply_tile(memory, unit, unit.slot.parts[part], tile, split);
    }
}
