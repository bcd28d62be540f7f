// The fibers behind simt.h, and the few functions of the CUDA runtime that the sources name.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr size_t kSharedLimit = 48 * 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;  // its pages exist once they are touched

}  // namespace

namespace fastcnn::cuda {
float4 dynamic_shared[kSharedLimit / sizeof(float4)];
}

namespace simt {

Settings settings;

namespace {

enum class State { idle, at_warp_barrier, at_block_barrier };

struct Fiber {
  ucontext_t context;  // of the start
  jmp_buf place;       // of a later stop
  bool started;
  void* stack;
  uint3 thread;
  State state;
};

std::vector<Fiber*> fibers;  // kept from launch to launch
Fiber* current;
jmp_buf scheduler_place;
const std::function<void()>* body;

// the warp that begins: its threads are `size` from `first`
unsigned first, size, begun;
unsigned finished;  // threads of the block

#ifdef __SANITIZE_ADDRESS__
// tells the sanitizer on which stack it is
const void* scheduler_stack;
size_t scheduler_size;
void leave(void** fake, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(fake, stack, size);
}
void arrive(void* fake, bool in_fiber) {
  if (in_fiber)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
  else
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
void poison_shared(size_t shared) {
  auto* start = reinterpret_cast<char*>(fastcnn::cuda::dynamic_shared);
  ASAN_UNPOISON_MEMORY_REGION(start, kSharedLimit);
  memset(start, 0xff, kSharedLimit);
  ASAN_POISON_MEMORY_REGION(start + shared, kSharedLimit - shared);
}
#else
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
void leave(void**, const void*, size_t) {}
void arrive(void*, bool) {}
void poison_shared(size_t shared) { memset(fastcnn::cuda::dynamic_shared, 0xff, shared); }
#endif

unsigned threads() { return blockDim.x * blockDim.y * blockDim.z; }

uint3 index_of(unsigned number) {
  return {number % blockDim.x, number / blockDim.x % blockDim.y,
          number / blockDim.x / blockDim.y};
}

unsigned thread_number() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

[[noreturn]] void fail(const char* what, size_t these, size_t of) {
  fprintf(stderr, "simt: %zu of %zu threads %s\n", these, of, what);
  abort();
}

void to_scheduler() {
  Fiber* self = current;
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_size);
  // setjmp: swapcontext makes a system call, which would be most of the time of a reduction
  if (!_setjmp(self->place)) _longjmp(scheduler_place, 1);
  arrive(fake, true);
}

void check_no_copies();

// one fiber runs thread after thread of a warp until one waits, so that a kernel without barriers
// needs a single fiber
void fiber_main() {
  arrive(nullptr, true);
  for (;;) {
    while (begun < size) {
      threadIdx = index_of(first + (settings.descending ? size - 1 - begun : begun));
      ++begun;
      (*body)();
      check_no_copies();
      ++finished;
    }
    current->state = State::idle;
    to_scheduler();
  }
}

Fiber* new_fiber() {
  auto* fiber = new Fiber();
  fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) abort();
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  return fiber;
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  void* fake = nullptr;
  leave(&fake, fiber.stack, kStack);
  if (!_setjmp(scheduler_place)) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  arrive(fake, false);
}

struct Warp {
  size_t first, end;  // of `fibers`: those with a thread that waits
  unsigned size;

  size_t count(State state) const {
    size_t all = 0;
    for (size_t i = first; i < end; ++i) all += fibers[i]->state == state;
    return all;
  }
  void go_on() const {
    for (size_t i = first; i < end; ++i) resume(*fibers[i]);
  }
  // until its threads are at a block barrier or have ended
  void run() const {
    while (const size_t waiting = count(State::at_warp_barrier)) {
      if (waiting != size) fail("of a warp wait at its barrier", waiting, size);
      go_on();
    }
  }
};

Warp begin_warp(unsigned number, size_t used) {
  first = number * kWarp;
  size = std::min(threads() - first, kWarp);
  begun = 0;
  Warp warp{used, used, size};
  while (begun < size) {
    if (warp.end == fibers.size()) fibers.push_back(new_fiber());
    resume(*fibers[warp.end]);
    warp.end += fibers[warp.end]->state != State::idle;
  }
  return warp;
}

void run_block() {
  finished = 0;
  const unsigned count = (threads() + kWarp - 1) / kWarp;
  std::vector<Warp> warps;
  for (unsigned i = 0; i < count; ++i) {
    const size_t used = warps.empty() ? 0 : warps.back().end;
    warps.push_back(begin_warp(settings.descending ? count - 1 - i : i, used));
    warps.back().run();
  }
  while (finished < threads()) {
    if (finished) fail("wait at a barrier, the others have ended", threads() - finished, threads());
    for (const Warp& warp : warps) {
      warp.go_on();
      warp.run();
    }
  }
}

bool selected(unsigned block) {
  return settings.end_block < 0 ||
         (block >= settings.first_block && block < settings.end_block);
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) {
  // the limits of a GPU
  const bool valid = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 0xffffu &&
                     grid.z <= 0xffffu && block.x && block.y && block.z &&
                     block.x * block.y * block.z <= 1024 && shared <= kSharedLimit;
  if (!valid) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  body = &thread;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned i = 0; i < grid.x; ++i) {
        const unsigned x = settings.descending ? grid.x - 1 - i : i;
        if (!selected(x)) continue;
        blockIdx = {x, y, z};
        poison_shared(shared);
        run_block();
      }
  return cudaSuccess;
}

// ---------------------------------------------------------------------------- matrix product

namespace {

constexpr int kDepth = 16;
typedef float Vector __attribute__((vector_size(32)));  // 8 columns

// Two by turns: a thread that has its values of one product may write those of the next one while
// others have yet to read. Warps share them: none has a product open when another one runs.
struct Memory {
  std::vector<float> a, b, d;
  int rows, columns;
} products[2];
int turn;
unsigned arrived;

// four vectors of a row at a time, whose sums stay in registers
__attribute__((always_inline)) inline void multiply_with(Memory& product) {
  constexpr int kAtOnce = 4;
  const int vectors = product.columns / 8;
  for (int i = 0; i < product.rows; ++i)
    for (int j = 0; j < vectors; j += kAtOnce) {
      const int count = std::min(kAtOnce, vectors - j);
      Vector sums[kAtOnce]{};
      for (int k = 0; k < kDepth; ++k) {
        const float* row = &product.b[k * product.columns + 8 * j];
        for (int v = 0; v < kAtOnce; ++v) {
          Vector values{};
          if (v < count) memcpy(&values, row + 8 * v, sizeof(values));
          sums[v] += product.a[i * kDepth + k] * values;
        }
      }
      memcpy(&product.d[i * product.columns + 8 * j], sums, count * sizeof(Vector));
    }
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void multiply_wide(Memory& product) { multiply_with(product); }
#endif

void multiply(Memory& product) {
#ifdef __x86_64__
  // products of halves are exact in fp32, so that fused operations give the same bits
  static const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide) return multiply_wide(product);
#endif
  multiply_with(product);
}

}  // namespace

Product begin_product(int rows, int columns) {
  Memory& memory = products[turn];
  memory.a.resize(rows * kDepth);
  memory.b.resize(kDepth * columns);
  memory.d.resize(rows * columns);
  memory.rows = rows;
  memory.columns = columns;
  return {memory.a.data(), memory.b.data(), memory.d.data()};
}

void finish_product() {
  if (++arrived == kWarp) {
    multiply(products[turn]);
    turn = 1 - turn;
    arrived = 0;
  }
  __syncwarp();
}

// ----------------------------------------------------------------------- asynchronous copies

namespace {

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};
struct Copies {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
Copies copies[1024];  // by thread

constexpr size_t kCopied = 16;

void check_no_copies() {
  Copies& mine = copies[thread_number()];
  size_t left = mine.open.size();
  for (const auto& group : mine.groups) left += group.size();
  mine.groups.clear();
  if (!left) return;
  fprintf(stderr, "simt: thread %u has ended before %zu of its copies\n", thread_number(), left);
  abort();
}

}  // namespace

void fail_misaligned(const void* address) {
  fprintf(stderr, "simt: %p is not 16-byte aligned\n", address);
  abort();
}

namespace {

// what a copy leaves until it is waited for
void poison(const Copy& copy) { memset(copy.shared, 0xff, kCopied); }

void finish(const Copy& copy) {
  if (copy.valid)
    memcpy(copy.shared, copy.global, kCopied);
  else
    memset(copy.shared, 0, kCopied);
}

}  // namespace

void begin_copy(void* shared, const void* global, bool valid) {
  check_aligned(shared);
  check_aligned(global);
  poison({shared, global, valid});
  copies[thread_number()].open.push_back({shared, global, valid});
}

void commit_copies() {
  Copies& mine = copies[thread_number()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_copies(size_t left) {
  auto& groups = copies[thread_number()].groups;
  for (; groups.size() > left; groups.pop_front())
    for (const Copy& copy : groups.front()) finish(copy);
  // a later copy to the same place may be there already
  for (const auto& group : groups)
    for (const Copy& copy : group) poison(copy);
}

}  // namespace simt

namespace {

void wait_at(simt::State barrier) {
  simt::current->thread = threadIdx;
  simt::current->state = barrier;
  simt::to_scheduler();
}

}  // namespace

void __syncthreads() { wait_at(simt::State::at_block_barrier); }
void __syncwarp() { wait_at(simt::State::at_warp_barrier); }

extern "C" {
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaErrorNoDevice; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t) {
  return cudaErrorNoDevice;
}
const char* cudaGetErrorString(cudaError_t) { return "no GPU"; }
}
