// Last of three kernels for y[t] += Δ̂_slot(t) · x[t]: shares of codes · x are added in their order, then salient
// channels, the low-rank part and sparse entries; one rounding into y.
#include "../include/delta.cuh"

struct FinishMemory {
    Schedule schedule;
    float sparse[MOST_TOKENS][TILE_ROWS];
};

// Sparse entries times x, a warp a row, 32 entries at a time.
template <typename T>
DEVICE void multiply_sparse(FinishMemory& memory, const Unit& unit, int first_row) {
    int lane = threadIdx.x % 32;
    for (int at = threadIdx.x / 32; at < TILE_ROWS && first_row + at < unit.site.rows; at += WARPS) {
        int entry = unit.slot.starts[first_row + at], end = unit.slot.starts[first_row + at + 1], before = 0;
        float sums[MOST_TOKENS] = {};
        for (; entry < end; entry += 32) {
            bool there = entry + lane < end;
            int column = before + warp_running_sum(there ? unit.slot.gaps[entry + lane] : 0);
            before = __shfl_sync(~0u, column, 31);
            // The upper byte of an f16.
            float value = there ? half_to_float(uint16_t(unit.slot.values[entry + lane] << 8)) : 0.f;
#pragma unroll
            for (int token = 0; token < MOST_TOKENS; token++) {
                if (there && token < unit.group.count) sums[token] += value * widen(unit.x<T>(token)[column]);
            }
        }
#pragma unroll
        for (int token = 0; token < MOST_TOKENS; token++) {
            float sum = warp_sum(sums[token]);
            if (lane == 0) memory.sparse[token][at] = sum;
        }
    }
}

// What the delta adds to a token's row, in units of 2^exponent. Leaves zeros in `partial`.
template <typename T>
DEVICE float delta_of(const FinishMemory& memory, const Unit& unit, int token, int row) {
    const Slot& slot = unit.slot;
    float sum = 0.f;
    for (int split = 0; split < unit.launch.splits; split++) {
        float* partial = unit.partial(split, token) + row;
        sum += *partial;
        *partial = 0.f;
    }
    const T* x = unit.x<T>(token);
    for (int k = 0; k < slot.salient_count; k++) {
        sum += half_to_float(slot.salient[int64_t{row} * slot.salient_count + k]) * widen(x[slot.salient_index[k]]);
    }
    const float* vx = unit.vx(token);
    for (int k = 0; k < slot.rank; k++) sum += half_to_float(slot.u[int64_t{row} * slot.rank + k]) * vx[k];
    return slot.starts ? sum + memory.sparse[token][row % TILE_ROWS] : sum;
}

template <typename T>
DEVICE void finish(const Launch& launch) {
    FinishMemory& memory = *reinterpret_cast<FinishMemory*>(shared_memory());
    int items = memory.schedule.plan(launch, [](const Unit& unit) {
        return is_empty(unit.slot) ? 0 : ceil_div(unit.site.rows, TILE_ROWS);
    });
#pragma unroll 1
    for (int at = blockIdx.x; at < items; at += gridDim.x) {
        int tile = at;
        Unit unit(launch, memory.schedule.find(tile, launch));
        if (unit.slot.starts) multiply_sparse<T>(memory, unit, tile * TILE_ROWS);
        __syncthreads();
        int token = threadIdx.x / TILE_ROWS, row = tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
        if (token < unit.group.count && row < unit.site.rows) {
            T& y = static_cast<T*>(unit.site.y)[unit.token(token) * unit.site.y_stride + row];
            narrow(y, widen(y) + unit.slot.unit * delta_of<T>(memory, unit, token, row));
        }
        __syncthreads();  // `sparse` is read by all before the next item writes it
    }
}

static_assert(sizeof(FinishMemory) == FINISH_SHARED, "as the launcher has it");

KERNEL delta_finish_bf16(const __grid_constant__ Launch launch) { finish<Bfloat>(launch); }
KERNEL delta_finish_f32(const __grid_constant__ Launch launch) { finish<float>(launch); }
