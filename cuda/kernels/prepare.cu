// First of three kernels for y[t] += Δ̂_slot(t) · x[t]: x as the tensor cores will read it, and v · x of low-rank parts.
//
// x · column_scale becomes integers of 16 bits, in steps of 1 / 32512 of the largest of a token's slice, and an integer
// a high and a low byte: two columns of operand B. Bytes lie as a lane of mma.m16n8k32 takes them, for codes of b bits:
//
//     [chunk][place][token, high then low][t][8 bytes]       a chunk is 32 byte columns, a byte has 8 / b places
//
// where the 8 bytes of lane t are the columns at `place` of the chunk's byte columns 2t, 2t+1, 8+2t, 9+2t, and those
// plus 16. multiply.cu brings codes into the same order.
#include "../include/delta.cuh"

constexpr int OWN = SLICE / THREADS;  // columns of a thread
constexpr float MOST = 32512.f;       // 127 · 256

struct PrepareMemory {
    Schedule schedule;
    uint32_t most[WARPS];
};

// Which widths of codes a slot's parts are made of, a bit each. Codes of 3 bits are codes of 2 and of 1.
DEVICE int widths_of(const Slot& slot) {
    int widths = 0;
    for (int at = 0; at < slot.part_count; at++) {
        int bits = slot.parts[at].bits;
        widths |= bits == 3 ? 3 : 1 << width_of(bits);
    }
    return widths;
}
DEVICE int count_of(int widths) { return (widths & 1) + (widths >> 1 & 1) + (widths >> 2 & 1) + (widths >> 3 & 1); }

DEVICE void store_column(uint8_t* ready, int width, int planes, int token, int column, int value) {
    int byte = column >> (3 - width), place = column & ((8 >> width) - 1), chunk = byte / 32, j = byte % 32;
    uint8_t* to = ready + (((int64_t{chunk} * (8 >> width) + place) * planes + 2 * token) * 4 + j % 8 / 2) * 8 +
                  j / 16 * 4 + j % 16 / 8 * 2 + j % 2;
    int high = (value + 128) >> 8;
    to[0] = uint8_t(high);
    to[32] = uint8_t(value);
}

// One slice of one token, in the layout of one width. Columns after the last are zeros.
template <typename T>
DEVICE void prepare_slice(PrepareMemory& memory, const Unit& unit, int width, int slice, int token) {
    const T* x = unit.x<T>(token);
    const uint16_t* scales = unit.slot.column_scales;
    int first = slice * SLICE + threadIdx.x * OWN, columns = unit.launch.columns;
    float values[OWN];
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        values[i] = first + i < columns ? widen(x[first + i]) : 0.f;
        if (scales && first + i < columns) values[i] *= half_to_float(scales[first + i]);
        uint32_t size = bits_of(values[i]) & 0x7fffffff;  // as an integer, so that NaN is the largest
        most = most > size ? most : size;
    }
    most = warp_most(most);
    if (threadIdx.x % 32 == 0) memory.most[threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) most = most > memory.most[warp] ? most : memory.most[warp];

    // Below, 1 / size would not be finite; above, size is not, or nearly.
    float size = from_bits(most), inverse = size > 1e-30f && size < 1e38f ? MOST / size : 0.f;
    if (threadIdx.x == 0) unit.steps(width, slice)[token] = size < 1e38f ? size / MOST : from_bits(0x7fc00000);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i >= padded_columns(columns)) break;
        int value = inverse > 0.f ? nearest(values[i] * inverse) : 0;
        store_column(unit.ready(width), width, 2 * unit.group.count, token, first + i, value);
    }
}

// v · x of one token, for eight rows of v: one a warp.
template <typename T>
DEVICE void prepare_low_rank(const Unit& unit, int token, int first) {
    int k = first + threadIdx.x / 32, columns = unit.launch.columns;
    if (k >= unit.slot.rank) return;
    const T* x = unit.x<T>(token);
    const uint16_t* v = unit.slot.v + int64_t{k} * columns;
    float sum = 0.f;
    for (int column = threadIdx.x % 32; column < columns; column += 32) sum += half_to_float(v[column]) * widen(x[column]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) unit.vx(token)[k] = sum;
}

template <typename T>
DEVICE void prepare(const Launch& launch) {
    PrepareMemory& memory = *reinterpret_cast<PrepareMemory*>(shared_memory());
    int slices = slices_of(launch.columns);
    int items = memory.schedule.plan(launch, [slices](const Unit& unit) {
        return unit.group.count * (count_of(widths_of(unit.slot)) * slices + ceil_div(unit.slot.rank, WARPS));
    });
#pragma unroll 1
    for (int at = blockIdx.x; at < items; at += gridDim.x) {
        int item = at;
        Unit unit(launch, memory.schedule.find(item, launch));
        int token = item % unit.group.count, job = item / unit.group.count, widths = widths_of(unit.slot);
        if (job < count_of(widths) * slices) {
            for (int skip = job / slices; skip; skip--) widths &= widths - 1;
            int width = widths & 1 ? 0 : widths & 2 ? 1 : widths & 4 ? 2 : 3;
            prepare_slice<T>(memory, unit, width, job % slices, token);
        } else {
            prepare_low_rank<T>(unit, token, (job - count_of(widths) * slices) * WARPS);
        }
        __syncthreads();  // `most` is read by all before the next item writes it
    }
}

static_assert(sizeof(PrepareMemory) == PREPARE_SHARED, "as the launcher has it");

KERNEL delta_prepare_bf16(const __grid_constant__ Launch launch) { prepare<Bfloat>(launch); }
KERNEL delta_prepare_f32(const __grid_constant__ Launch launch) { prepare<float>(launch); }
