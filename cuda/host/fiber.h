// A lane's own flow of control, and the gate where it waits for others. Fibers take turns on one thread; with
// HOST_THREADS, each is a thread.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>

#ifdef HOST_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

#ifdef HOST_THREADS
class Fiber {
    std::thread thread;

  public:
    void start(std::function<void()> body) { thread = std::thread(std::move(body)); }
    void join() { thread.join(); }
};

class Gate {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t generation = 0;

  public:
    std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex); }
    void open(std::unique_lock<std::mutex>& lock) {
        generation++;
        lock.unlock();
        changed.notify_all();
    }
    void wait(std::unique_lock<std::mutex>& lock, Fiber&) {
        changed.wait(lock, [this, mine = generation] { return generation != mine; });
    }
};
#else

#if defined(__x86_64__)
// Leaves one stack for another. swapcontext would make two system calls a switch, of which a kernel has millions.
extern "C" void host_switch_stack(void** leave, void* enter);
asm(R"(
.pushsection .text.host_switch_stack, "axG", @progbits, host_switch_stack, comdat
.weak host_switch_stack
.type host_switch_stack, @function
host_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size host_switch_stack, .-host_switch_stack
.popsection
)");
struct Context {
    void* at = nullptr;
    void prepare(char* stack, size_t size, void (*enter)()) {
        void** frame = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15}) - 8;
        std::memset(frame, 0, 8 * sizeof(void*));  // six registers, where to go, and a word so that calls are aligned
        frame[6] = reinterpret_cast<void*>(enter);
        at = frame;
    }
    static void change(Context& leave, Context& enter) { host_switch_stack(&leave.at, enter.at); }
};
#else
struct Context {
    ucontext_t at;
    void prepare(char* stack, size_t size, void (*enter)()) {
        getcontext(&at);
        at.uc_stack.ss_sp = stack, at.uc_stack.ss_size = size, at.uc_link = nullptr;
        makecontext(&at, enter, 0);
    }
    static void change(Context& leave, Context& enter) { swapcontext(&leave.at, &enter.at); }
};
#endif

class Fiber {
    static constexpr size_t STACK = 64 << 10;
    static inline Fiber* running = nullptr;
    static inline Context scheduler;
    static inline const void* scheduler_stack = nullptr;
    static inline size_t scheduler_size = 0;

    Context context;
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    const uint64_t* gate = nullptr;  // where it waits, until that has another generation
    uint64_t generation = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's

    static void enter() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
        running->body();
        running->leave(true);
    }
    void leave([[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack, scheduler_stack, scheduler_size);
#endif
        Context::change(context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

  public:
    void start(std::function<void()> what) {
        body = std::move(what);
        stack.reset(new char[STACK]);
        context.prepare(stack.get(), STACK, enter);
    }
    // Runs it until it waits or ends.
    void run() {
        running = this;
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, stack.get(), STACK);
#endif
        Context::change(scheduler, context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }
    bool waits() const { return gate && *gate == generation; }
    void wait(const uint64_t& at) {
        gate = &at, generation = at;
        leave(false);
        gate = nullptr;
    }
    void join() {}
};

class Gate {
    uint64_t generation = 0;

  public:
    int lock() { return 0; }
    void open(int&) { generation++; }
    void wait(int&, Fiber& fiber) { fiber.wait(generation); }
};
#endif

}  // namespace host
