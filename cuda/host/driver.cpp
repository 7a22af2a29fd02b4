// A CUDA driver without a GPU: the part of libcuda.so.1 that rust/meswitch-cuda asks for, over kernels that were
// compiled for the host. Device memory is the process's own, and a launch has ended when it returns.
//
// It says no where the real driver would: before cuInit, without a current context, for a kernel that it does not have,
// for more shared memory than was asked for, for an image that is no fat binary. Tests load it in place of libcuda, or
// call `host_launch` directly.
#include <atomic>
#include <map>
#include <mutex>

#include "../include/delta.cuh"

extern "C" {
void delta_prepare_bf16(const Launch);
void delta_prepare_f32(const Launch);
void delta_multiply(const Launch);
void delta_finish_bf16(const Launch);
void delta_finish_f32(const Launch);
void delta_rows_bf16(const RowsLaunch);
void delta_rows_f32(const RowsLaunch);
}

namespace {

enum Outcome { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
constexpr unsigned FAT_BINARY = 0xba55ed50;
constexpr int MOST_SHARED = 99 << 10;  // of a block, as compute capability 8.6 has it

struct Kernel {
    const char* name;
    void (*run)(const void* parameters);
    int shared;              // what it uses
    int allowed = 48 << 10;  // what cuFuncSetAttribute allowed
};

// Calls a kernel with the parameters that a launch points to.
template <typename Parameters, void (*kernel)(const Parameters)>
void run(const void* parameters) {
    kernel(*static_cast<const Parameters*>(parameters));
}

Kernel kernels[] = {
    {"delta_prepare_bf16", run<Launch, delta_prepare_bf16>, PREPARE_SHARED},
    {"delta_prepare_f32", run<Launch, delta_prepare_f32>, PREPARE_SHARED},
    {"delta_multiply", run<Launch, delta_multiply>, MULTIPLY_SHARED},
    {"delta_finish_bf16", run<Launch, delta_finish_bf16>, FINISH_SHARED},
    {"delta_finish_f32", run<Launch, delta_finish_f32>, FINISH_SHARED},
    {"delta_rows_bf16", run<RowsLaunch, delta_rows_bf16>, ROWS_SHARED},
    {"delta_rows_f32", run<RowsLaunch, delta_rows_f32>, ROWS_SHARED},
};

bool initialized = false;
int primary = 0;
std::atomic<unsigned> launches = 0;
thread_local void* context = nullptr;

Kernel* find(const char* name) {
    for (Kernel& kernel : kernels) {
        if (!std::strcmp(kernel.name, name)) return &kernel;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// Runs a kernel on `blocks` blocks, in an order that host::launch has. One launch at a time, whatever thread asks.
int host_launch(const char* name, unsigned blocks, unsigned order, const void* parameters) {
    static std::mutex running;
    std::lock_guard<std::mutex> alone(running);
    Kernel* kernel = find(name);
    if (!kernel) return NOT_FOUND;
    host::launch(blocks, THREADS, kernel->shared, order, [&] { kernel->run(parameters); });
    return SUCCESS;
}

int cuInit(unsigned) {
    initialized = true;
    return SUCCESS;
}
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
int cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal ? NO_DEVICE : SUCCESS;
}
int cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, length, "a CPU in place of a GPU");
    return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> attributes = {{16, 4}, {75, 8}, {76, 6}, {97, MOST_SHARED}};
    auto found = attributes.find(attribute);
    if (found == attributes.end()) return INVALID_VALUE;
    *value = found->second;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}
int cuDevicePrimaryCtxRetain(void** to, int) {
    *to = &primary;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}
int cuCtxGetCurrent(void** to) {
    *to = context;
    return SUCCESS;
}
int cuCtxSetCurrent(void* to) {
    context = to;
    return SUCCESS;
}
int cuModuleLoadData(void** module, const void* image) {
    unsigned magic;
    std::memcpy(&magic, image, sizeof magic);
    if (!context) return INVALID_CONTEXT;
    if (magic != FAT_BINARY) return INVALID_IMAGE;
    *module = kernels;
    return SUCCESS;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = find(name);
    return *function ? SUCCESS : NOT_FOUND;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > MOST_SHARED) return INVALID_VALUE;
    static_cast<Kernel*>(function)->allowed = value;
    return SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t shared) {
    *blocks = int((100 << 10) / (shared + 1024));
    return SUCCESS;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void*,
                   void** parameters, void**) {
    Kernel* kernel = static_cast<Kernel*>(function);
    if (!context) return INVALID_CONTEXT;
    bool fits = int(shared) == kernel->shared && kernel->shared <= kernel->allowed;
    if (!fits || threads != THREADS || y != 1 || z != 1 || !x) return INVALID_VALUE;
    return host_launch(kernel->name, x, launches++, parameters[0]);
}
int cuGetErrorName(int error, const char** name) {
    static const std::map<int, const char*> names = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},     {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},             {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    };
    auto found = names.find(error);
    if (found == names.end()) return INVALID_VALUE;
    *name = found->second;
    return SUCCESS;
}
}
