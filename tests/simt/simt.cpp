// The fibers behind simt.h, and the few functions of the CUDA runtime that the sources name.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr size_t kSharedLimit = 48 * 1024;
constexpr size_t kStack = 256 * 1024;  // its pages exist once they are touched

}  // namespace

namespace fastcnn::cuda {
float4 dynamic_shared[kSharedLimit / sizeof(float4)];
}

namespace simt {

Settings settings;

namespace {

struct Fiber {
  ucontext_t context;  // of the start
  jmp_buf place;       // of a later stop
  bool started;
  void* stack;
  uint3 thread;
  bool waiting;
};

std::vector<Fiber*> fibers;  // kept from launch to launch
Fiber* current;
jmp_buf scheduler_place;
const std::function<void()>* body;
unsigned begun, finished;

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
  if (settings.descending) number = threads() - 1 - number;
  return {number % blockDim.x, number / blockDim.x % blockDim.y,
          number / blockDim.x / blockDim.y};
}

void to_scheduler() {
  Fiber* self = current;
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_size);
  // setjmp: swapcontext makes a system call, which would be most of the time of a reduction
  if (!_setjmp(self->place)) _longjmp(scheduler_place, 1);
  arrive(fake, true);
}

// one fiber runs thread after thread until one waits, so that a kernel without barriers needs
// a single fiber
void fiber_main() {
  arrive(nullptr, true);
  for (;;) {
    while (begun < threads()) {
      threadIdx = index_of(begun++);
      (*body)();
      ++finished;
    }
    to_scheduler();
  }
}

Fiber* new_fiber() {
  auto* fiber = new Fiber();
  fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) abort();
  return fiber;
}

void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.waiting = fiber.started = false;
  makecontext(&fiber.context, fiber_main, 0);
}

void resume(Fiber& fiber) {
  current = &fiber;
  fiber.waiting = false;
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

void run_block() {
  begun = finished = 0;
  size_t used = 0;
  while (begun < threads()) {
    if (used == fibers.size()) fibers.push_back(new_fiber());
    start(*fibers[used]);
    resume(*fibers[used++]);
  }
  for (;;) {
    size_t waiting = 0;
    for (size_t i = 0; i < used; ++i) waiting += fibers[i]->waiting;
    if (waiting == 0) return;
    if (finished) {
      fprintf(stderr, "simt: %zu threads wait at a barrier, %u have ended\n", waiting, finished);
      abort();
    }
    for (size_t i = 0; i < used; ++i) resume(*fibers[i]);
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

}  // namespace simt

void __syncthreads() {
  simt::current->thread = threadIdx;
  simt::current->waiting = true;
  simt::to_scheduler();
}

extern "C" {
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaErrorNoDevice; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t) {
  return cudaErrorNoDevice;
}
const char* cudaGetErrorString(cudaError_t) { return "no GPU"; }
}
