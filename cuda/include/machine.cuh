// What kernels say of the machine: one set of names with two meanings.
//
// nvcc takes the device's own instructions, a host compiler (no __CUDACC__) the functions of host/machine.h that do the
// same to the lanes of a block. Kernels use nothing else of CUDA, so every kernel also runs, whole, without a GPU.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "../host/machine.h"
#else

// Two blocks on a multiprocessor where its shared memory holds them, so registers must be enough for both.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 || __CUDA_ARCH__ == 1030)
#define KERNEL extern "C" __global__ void __launch_bounds__(256, 2)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(256, 1)
#endif
#define DEVICE static __device__ __forceinline__
#define HOST_DEVICE static __host__ __device__ __forceinline__
#define MEMBER __device__ __forceinline__

DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t memory[];
    return memory;
}

DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Starts a copy of 16 bytes from global to shared memory, past registers and the first cache.
DEVICE void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Ends a group of this lane's copies.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `left` of this lane's groups are on their way. Other lanes see them after a barrier.
template <int left>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// ldmatrix: four 8 x 8 matrices of 16 bits, transposed; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// mma: sums [16, 8] += a [16, 32] of bytes from 0 to 255 · b [32, 8] of bytes from -128 to 127.
DEVICE void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Four of the eight bytes of high:low, by a hexadecimal digit each.
DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) { return __byte_perm(low, high, which); }
DEVICE uint2 load8(const void* at) { return *static_cast<const uint2*>(at); }

DEVICE float half_to_float(uint16_t half) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
    return wide;
}
DEVICE int32_t nearest(float value) { return __float2int_rn(value); }
DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

#endif

// bfloat16 as it lies in memory.
struct Bfloat {
    uint16_t bits;
};
DEVICE float widen(Bfloat value) { return from_bits(uint32_t{value.bits} << 16); }
DEVICE float widen(float value) { return value; }

// To the nearest, to even where two are; NaN stays NaN.
DEVICE void narrow(Bfloat& to, float value) {
    uint32_t bits = bits_of(value);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to.bits = nan ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DEVICE void narrow(float& to, float value) { to = value; }

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // of a block, in every kernel

template <typename T>
DEVICE T warp_sum(T value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
    return value;
}
DEVICE uint32_t warp_most(uint32_t value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        uint32_t other = __shfl_xor_sync(~0u, value, mask);
        value = value > other ? value : other;
    }
    return value;
}
// The sum of this lane's value and those of the lanes before it.
DEVICE int32_t warp_running_sum(int32_t value) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        int32_t before = __shfl_up_sync(~0u, value, distance);
        if (lane >= distance) value += before;
    }
    return value;
}
