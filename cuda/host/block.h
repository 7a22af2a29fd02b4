// Blocks of CUDA threads on a CPU. Every lane is a fiber (or, with HOST_THREADS, a thread of the operating system, for
// ThreadSanitizer); barriers are barriers; what a warp does together happens when its last lane has come. It is stricter
// than a GPU, so that what depends on luck there fails here:
//
//   * shared memory is noise when a block starts;
//   * an asynchronous copy ruins its destination at once, and lands at the lane's first barrier after its wait;
//   * blocks and lanes run in an order drawn from a seed, one warp or block far ahead of another;
//   * lanes of a warp at different operations, lanes left waiting, addresses that are not aligned and copies that nobody
//     waited for end the process with a message.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"

struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

namespace host {

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Block;

struct Lane {
    dim3 thread;
    int warp = 0;
    Block* block = nullptr;
    std::vector<Copy> open;                 // of the group that is not committed yet
    std::vector<std::vector<Copy>> on_way;  // committed groups, the oldest first
    std::vector<Copy> waited;               // to land at this lane's next barrier
    uint64_t given[6] = {}, taken[4] = {};  // what it brings to its warp's operation, and takes away
    const char* at = "the start";
    bool done = false;
    Fiber fiber;
};

struct Barrier {
    size_t expected = 0, arrived = 0;
    const char* what = nullptr;
    Gate gate;
};

struct Block {
    dim3 index, grid;
    std::unique_ptr<uint8_t, void (*)(void*)> shared{nullptr, std::free};
    std::vector<std::unique_ptr<Lane>> lanes;
    std::vector<std::unique_ptr<Barrier>> warps;
    std::unique_ptr<Barrier> all = std::make_unique<Barrier>();
    std::function<void()> kernel;
};

inline thread_local Lane* current = nullptr;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "a kernel on the host: %s\n", what);
    std::abort();
}

// All lanes of a barrier come; the last one runs `together`; all go on.
template <typename Work>
void meet(Barrier& barrier, const char* what, Work together) {
    Lane* self = current;
    self->at = what;
    auto lock = barrier.gate.lock();
    if (barrier.arrived == 0) barrier.what = what;
    if (std::strcmp(barrier.what, what)) {
        std::fprintf(stderr, "warp %d: a lane came to %s, where others are at %s\n", self->warp, what, barrier.what);
        fail("lanes at different operations");
    }
    if (++barrier.arrived == barrier.expected) {
        together();
        barrier.arrived = 0;
        barrier.gate.open(lock);
    } else {
        barrier.gate.wait(lock, self->fiber);
    }
    current = self;
    self->at = "no barrier";
}

template <typename Work>
void warp_does(const char* what, Work together) {
    Lane* self = current;
    meet(*self->block->warps[self->warp], what, [&] { together(self->block->lanes.data() + 32 * self->warp); });
}

// What a lane has waited for is there for others when the lane comes to a barrier. Shuffles, ldmatrix and mma are none.
inline void land() {
    for (const Copy& copy : current->waited) std::memcpy(copy.to, copy.from, copy.bytes);
    current->waited.clear();
}

inline void start(Block& block, uint32_t threads, size_t shared, std::mt19937& random) {
    block.lanes.clear(), block.warps.clear();
    block.all->expected = threads;
    block.shared.reset(static_cast<uint8_t*>(std::aligned_alloc(128, (shared + 127) / 128 * 128 + 128)));
    for (size_t at = 0; at < shared; at++) block.shared.get()[at] = static_cast<uint8_t>(random());
    for (uint32_t at = 0; at < threads; at++) {
        if (at % 32 == 0) block.warps.push_back(std::make_unique<Barrier>()), block.warps.back()->expected = 32;
        block.lanes.push_back(std::make_unique<Lane>());
        Lane& lane = *block.lanes.back();
        lane.thread = {at}, lane.warp = int(at / 32), lane.block = &block;
    }
    for (auto& lane : block.lanes) {
        lane->fiber.start([self = lane.get()] {
            current = self;
            self->block->kernel();
            self->done = true;
        });
    }
}

inline void finish(Block& block) {
    for (auto& lane : block.lanes) {
        lane->fiber.join();
        if (!lane->open.empty()) fail("a copy that was never committed");
        for (auto& group : lane->on_way) {
            if (!group.empty()) fail("a copy that nobody waited for");
        }
    }
}

#ifdef HOST_THREADS
// Two blocks at a time, each lane a thread.
inline void run(std::vector<Block>& blocks, uint32_t threads, size_t shared, unsigned, std::mt19937& random) {
    for (size_t first = 0; first < blocks.size(); first += 2) {
        size_t end = std::min(first + 2, blocks.size());
        for (size_t at = first; at < end; at++) start(blocks[at], threads, shared, random);
        for (size_t at = first; at < end; at++) finish(blocks[at]), blocks[at].lanes.clear();
    }
}
#else
inline bool can_move(const Lane& lane) { return !lane.done && !lane.fiber.waits(); }

// Every lane of some as far as it can go before it must wait; whether any could.
inline bool move(std::vector<Lane*>& lanes) {
    bool moved = false;
    for (Lane* lane : lanes) {
        if (can_move(*lane)) moved = true, lane->fiber.run();
    }
    return moved;
}

// One round of a block. Orders: 0 rising, 1 falling, then even ones by drawn lanes, odd ones by a drawn warp alone.
inline bool go_on(Block& block, std::mt19937& random, unsigned order) {
    std::vector<Lane*> lanes;
    for (auto& lane : block.lanes) lanes.push_back(lane.get());
    if (order == 1) std::reverse(lanes.begin(), lanes.end());
    if (order < 2 || order % 2 == 0) {
        if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
        return move(lanes);
    }
    std::vector<size_t> warps(block.warps.size());
    for (size_t at = 0; at < warps.size(); at++) warps[at] = at;
    std::shuffle(warps.begin(), warps.end(), random);
    for (size_t warp : warps) {
        std::vector<Lane*> own(lanes.begin() + 32 * warp, lanes.begin() + 32 * (warp + 1));
        std::shuffle(own.begin(), own.end(), random);
        bool moved = false;
        while (move(own)) moved = true;
        if (moved) return true;
    }
    return false;
}

// Up to three blocks at a time where the order is drawn, one ahead of another by as much as is drawn.
inline void run(std::vector<Block>& blocks, uint32_t threads, size_t shared, unsigned order, std::mt19937& random) {
    std::vector<Block*> resident;
    size_t next = 0, most = order > 1 ? 1 + order / 2 % 3 : 1;
    while (next < blocks.size() || !resident.empty()) {
        while (next < blocks.size() && resident.size() < most) {
            start(blocks[next], threads, shared, random);
            resident.push_back(&blocks[next++]);
        }
        if (order > 1) std::shuffle(resident.begin(), resident.end(), random);
        bool moved = false;
        for (Block*& block : resident) {
            for (unsigned steps = order > 1 ? 1 + random() % 64 : 1; steps && go_on(*block, random, order); steps--) moved = true;
            if (std::all_of(block->lanes.begin(), block->lanes.end(), [](auto& lane) { return lane->done; })) {
                finish(*block);
                block->lanes.clear(), block->shared.reset();
                block = nullptr, moved = true;
            }
        }
        resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
        if (moved) continue;
        for (Block* block : resident) {
            for (auto& lane : block->lanes) {
                if (!lane->done) std::fprintf(stderr, "  warp %d: a lane waits at %s\n", lane->warp, lane->at);
            }
        }
        fail("lanes wait for others that do not come");
    }
}
#endif

// Runs a kernel on a grid of `blocks`. The same order gives the same run.
inline void launch(uint32_t blocks, uint32_t threads, size_t shared, unsigned order, const std::function<void()>& kernel) {
    if (threads % 32) fail("a block is of whole warps");
    std::mt19937 random(order);
    std::vector<Block> all(blocks);
    for (uint32_t at = 0; at < blocks; at++) all[at].index = {at}, all[at].grid = {blocks}, all[at].kernel = kernel;
    if (order == 1) std::reverse(all.begin(), all.end());
    if (order > 1) std::shuffle(all.begin(), all.end(), random);
    run(all, threads, shared, order, random);
}

}  // namespace host
