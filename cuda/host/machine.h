// What include/machine.cuh names, on a CPU: each function does to the lanes of host/block.h what the instruction does to
// those of a GPU, by the tables of the PTX manual.
#pragma once
#include <cmath>

#include "block.h"

#define KERNEL extern "C" void
#define DEVICE static inline
#define HOST_DEVICE static inline
#define MEMBER inline
#define __grid_constant__
#define threadIdx (host::current->thread)
#define blockIdx (host::current->block->index)
#define gridDim (host::current->block->grid)

struct alignas(8) uint2 {
    uint32_t x, y;
};

DEVICE uint8_t* shared_memory() { return host::current->block->shared.get(); }

DEVICE void __syncthreads() {
    host::land();
    host::meet(*host::current->block->all, "__syncthreads", [] {});
}
DEVICE void __syncwarp() {
    host::land();
    host::warp_does("__syncwarp", [](auto*) {});
}

// Each lane takes the value of lane `from(lane)`.
template <typename T, typename From>
DEVICE T shuffle(const char* what, T value, From from) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(host::current->given, &value, sizeof(T));
    host::warp_does(what, [&](std::unique_ptr<host::Lane>* lanes) {
        for (int lane = 0; lane < 32; lane++) lanes[lane]->taken[0] = lanes[from(lane)]->given[0];
    });
    std::memcpy(&value, host::current->taken, sizeof(T));
    return value;
}
template <typename T>
DEVICE T __shfl_xor_sync(uint32_t, T value, int mask) {
    return shuffle("__shfl_xor_sync", value, [mask](int lane) { return lane ^ mask; });
}
template <typename T>
DEVICE T __shfl_up_sync(uint32_t, T value, int distance) {
    return shuffle("__shfl_up_sync", value, [distance](int lane) { return lane < distance ? lane : lane - distance; });
}
template <typename T>
DEVICE T __shfl_sync(uint32_t, T value, int from) {
    return shuffle("__shfl_sync", value, [from](int) { return from; });
}

DEVICE void copy16(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) host::fail("cp.async is not aligned");
    std::memset(to, 0xa5, 16);
    host::current->open.push_back({to, from, 16});
}
DEVICE void copies_commit() {
    host::current->on_way.push_back(std::move(host::current->open));
    host::current->open.clear();
}
template <int left>
DEVICE void copies_wait() {
    auto& groups = host::current->on_way;
    while (groups.size() > left) {
        for (const host::Copy& copy : groups.front()) host::current->waited.push_back(copy);
        groups.erase(groups.begin());
    }
}

DEVICE void load_transposed(uint32_t (&to)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) host::fail("ldmatrix is not aligned");
    host::current->given[0] = reinterpret_cast<uintptr_t>(row);
    host::warp_does("ldmatrix", [](std::unique_ptr<host::Lane>* lanes) {
        for (int matrix = 0; matrix < 4; matrix++) {
            uint16_t rows[8][8];
            unsigned banks = 0;
            for (int at = 0; at < 8; at++) {
                uintptr_t from = lanes[8 * matrix + at]->given[0];
                std::memcpy(rows[at], reinterpret_cast<const void*>(from), 16);
                banks |= 1u << (from / 16 % 8);
            }
            if (banks != 255) host::fail("ldmatrix has bank conflicts");
            for (int lane = 0; lane < 32; lane++) {
                int at = 2 * (lane % 4), column = lane / 4;
                lanes[lane]->taken[matrix] = rows[at][column] | uint32_t{rows[at + 1][column]} << 16;
            }
        }
    });
    for (int matrix = 0; matrix < 4; matrix++) to[matrix] = uint32_t(host::current->taken[matrix]);
}

DEVICE void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], uint2 b) {
    uint64_t* given = host::current->given;
    std::copy(a, a + 4, given), given[4] = b.x, given[5] = b.y;
    host::warp_does("mma", [](std::unique_ptr<host::Lane>* lanes) {
        int left[16][32], right[8][32];
        for (int lane = 0; lane < 32; lane++) {
            const uint64_t* from = lanes[lane]->given;
            int group = lane / 4, t = lane % 4;
            for (int i = 0; i < 16; i++) {
                left[group + i / 4 % 2 * 8][4 * t + i % 4 + i / 8 * 16] = from[i / 4] >> (8 * (i % 4)) & 255;
            }
            for (int i = 0; i < 8; i++) right[group][4 * t + i % 4 + i / 4 * 16] = int8_t(from[4 + i / 4] >> (8 * (i % 4)));
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int *row = left[lane / 4 + i / 2 * 8], *column = right[2 * (lane % 4) + i % 2];
                int sum = 0;
                for (int k = 0; k < 32; k++) sum += row[k] * column[k];
                lanes[lane]->taken[i] = uint32_t(sum);
            }
        }
    });
    for (int i = 0; i < 4; i++) sums[i] += int32_t(host::current->taken[i]);
}

DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
    uint64_t both = low | uint64_t{high} << 32;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++) picked |= uint32_t(both >> (8 * (which >> (4 * i) & 7)) & 255) << (8 * i);
    return picked;
}
DEVICE uint2 load8(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 8) host::fail("a load of 8 bytes is not aligned");
    uint2 value;
    std::memcpy(&value, at, 8);
    return value;
}

DEVICE int32_t nearest(float value) { return int32_t(std::nearbyint(value)); }
DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    float size = exponent ? std::ldexp(float(1024 + mantissa), int(exponent) - 25) : std::ldexp(float(mantissa), -24);
    return sign ? -size : size;
}
