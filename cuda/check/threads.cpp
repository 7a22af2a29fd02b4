// One small launch with a thread of the operating system for every lane, for ThreadSanitizer: it sees what one lane
// leaves another without a barrier between them. That results are right is for tests/test_cuda_kernels.py to say.
#include "../include/delta.cuh"

extern "C" void delta_prepare_f32(const Launch launch);
extern "C" void delta_multiply(const Launch launch);
extern "C" void delta_finish_f32(const Launch launch);

struct alignas(16) Aligned {
    uint8_t bytes[16];
};

int main() {
    constexpr int ROWS = 20, COLUMNS = 2100, ENTRIES = 40, SPLITS = 2, UNITS = 2, BITS = 3;
    std::vector<Aligned> codes(row_bytes(BITS, COLUMNS) * padded_rows(ROWS) / sizeof(Aligned), Aligned{{1, 2, 3}});
    std::vector<uint16_t> halves(ROWS * COLUMNS, 0x3c00);
    std::vector<int32_t> starts(ROWS + 1, ENTRIES), order{0, 1}, salient{3};
    starts[0] = 0;
    std::vector<uint8_t> bytes(ENTRIES, 1);
    std::vector<float> x(2 * COLUMNS, 1.f), y(2 * ROWS), steps(1000), vx(100), partial(UNITS * SPLITS * MOST_TOKENS * ROWS);
    std::vector<Aligned> ready(UNITS * WIDTHS * padded_columns(COLUMNS) * 2 * MOST_TOKENS / sizeof(Aligned));

    std::vector<Slot> slots(3);  // the first is empty
    slots[1].parts[0] = {reinterpret_cast<uint8_t*>(codes.data()), halves.data(), nullptr, ROWS, BITS, 7, 300};
    slots[1].part_count = 1, slots[1].unit = 1;
    slots[1].salient_index = salient.data(), slots[1].salient = halves.data(), slots[1].salient_count = 1;
    slots[1].u = slots[1].v = halves.data(), slots[1].rank = 1;
    slots[2].starts = starts.data(), slots[2].gaps = slots[2].values = bytes.data(), slots[2].unit = 1;
    std::vector<Group> groups{{0, 0, 1}, {1, 1, 1}};
    int32_t group_count = 2;

    Launch launch{};
    launch.sites[0] = {slots.data(), y.data(), ROWS, ROWS, 2};
    launch.groups = groups.data(), launch.group_count = &group_count, launch.order = order.data();
    launch.x = x.data(), launch.x_stride = COLUMNS;
    launch.ready = reinterpret_cast<uint8_t*>(ready.data()), launch.steps = steps.data(), launch.vx = vx.data();
    launch.partial = partial.data();
    launch.columns = COLUMNS, launch.site_count = 1, launch.splits = SPLITS, launch.most_rows = ROWS, launch.most_rank = 1;
    host::launch(2, THREADS, PREPARE_SHARED, 0, [&] { delta_prepare_f32(launch); });
    host::launch(2, THREADS, MULTIPLY_SHARED, 0, [&] { delta_multiply(launch); });
    host::launch(2, THREADS, FINISH_SHARED, 0, [&] { delta_finish_f32(launch); });
    std::printf("y[0] = %g, y[%d] = %g\n", y[0], ROWS, y[ROWS]);
}
