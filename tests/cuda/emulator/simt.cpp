// The emulated device. Each thread of a block is a fiber; blocks run one after another.
//
// The checker: the kernels' source is compiled with g++
// -fsanitize=thread,bounds,alignment,shift,signed-integer-overflow and linked without any sanitizer's library: the
// callbacks are at the end of this file. So each access arrives here with its address, size and place. Found are
//  - races: two accesses to the same memory by different threads, one of them a write, that neither a barrier nor
//    __syncwarp orders. Shuffles order nothing; blocks of one launch are never ordered. So a missing barrier is found
//    even in a run whose values are all right.
//  - accesses outside of buffers, misaligned ones, reads of what was never written, shared memory of earlier blocks
//  - barriers that not all threads reach, warp operations whose mask leaves the caller out, or that read a lane which
//  is
//    not there, deadlocks, launches beyond CUDA's limits, a stream asked for without a device guard
//  - array indices, signed overflow and shifts, as UBSan sees them
//  - assertions of the kernels (CUDA_KERNEL_ASSERT), which end the block
// It knows two readers of an address in each epoch, so a write that races with a third one only may be missed.
#include "simt.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

// Saves the registers of one fiber and loads those of another.
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* to);
asm(R"(.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

namespace simt {

Options options;
const std::vector<Schedule> schedules = {
    {Order::Forward, 0}, {Order::Backward, 0}, {Order::Random, 1}, {Order::Random, 2}};

namespace {

constexpr size_t kStack = size_t{256} << 10;
constexpr int kWarp = 32;
constexpr uint64_t kNan = 0x7ff8dead7fc0dead;  // in both halves, and as a double

// -- Fibers ----------------------------------------------------------------------------------------------------------

class Context {
 public:
  void start(char* stack, void (*entry)());
  void switch_to(Context& other);

 private:
#if defined(__x86_64__)
  void* sp_ = nullptr;
#else
  ucontext_t context_{};
#endif
};
#if defined(__x86_64__)
void Context::start(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *--top = nullptr;  // the stack's alignment at a function's entry
  *--top = reinterpret_cast<void*>(entry);
  sp_ = top - 6;
}
void Context::switch_to(Context& other) { simt_switch(&sp_, other.sp_); }
#else
void Context::start(char* stack, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStack;
  makecontext(&context_, entry, 0);
}
void Context::switch_to(Context& other) { swapcontext(&context_, &other.context_); }
#endif

enum class State { Ready, AtBarrier, InWarpOp, Done };

struct Thread {
  Context context;
  int index = 0;
  uint3 id;
  State state = State::Ready;
  // Where and for what it waits.
  const char* file = "";
  int line = 0;
  WarpOp op = WarpOp::Sync;
  unsigned mask = 0;
  int argument = 0, width = kWarp;
  uint64_t in = 0, out = 0;

  int warp() const { return index / kWarp; }
  int lane() const { return index % kWarp; }
  bool in_mask(unsigned m) const { return (m >> lane() & 1U) != 0; }
};

struct Range {
  uintptr_t first = 0, last = 0;
  bool has(uintptr_t p) const { return p >= first && p < last; }
};
Range range_of(const void* p, size_t bytes) {
  return {reinterpret_cast<uintptr_t>(p), reinterpret_cast<uintptr_t>(p) + bytes};
}

// One access; block 0: none.
struct Access {
  uint32_t block = 0, epoch = 0, clock = 0, thread = 0;
  const void* where = nullptr;
};
struct Cell {
  Access write;
  std::array<Access, 2> reads;
};
// Of shadow memory. Nothing of ours is narrower than two bytes.
constexpr uintptr_t kGrain = 2;
constexpr uintptr_t kCells = 512;

struct KnownBuffer {
  size_t bytes;
  std::string name;
  std::vector<bool> written;  // by grain; empty: all
};

struct Device {
  std::mutex launching;
  // Of the launch.
  std::vector<Thread> threads;
  char* stacks = nullptr;
  size_t stack_count = 0;
  void (*body)(void*) = nullptr;
  void* parameters = nullptr;
  Range parameter_range, shared, constants;
  std::mt19937 random;
  Indices indices;
  Context scheduler;
  Thread* current = nullptr;
  std::vector<int> ready;
  bool aborted = false;
  // Of the checker.
  uint32_t block = 0, epoch = 0;                    // epoch: how many barriers the block has passed
  std::vector<std::array<uint32_t, kWarp>> clocks;  // of each thread: what it knows of its warp's lanes
  std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, kCells>>> shadow;
  std::map<uintptr_t, KnownBuffer> buffers;
  std::set<std::string> seen;
  std::vector<std::string> findings;
  int guards = 0;
};
Device device;

// -- Findings --------------------------------------------------------------------------------------------------------

std::string place(const char* file, int line) {
  const char* const slash = std::strrchr(file, '/');
  return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
}

std::string place(const void* where) {
  Dl_info info;
  if (where == nullptr || dladdr(where, &info) == 0) return "?";
  std::ostringstream command;
  command << "addr2line -e '" << info.dli_fname << "' 0x" << std::hex
          << static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase) - 1 << " 2>/dev/null";
  std::string line;
  if (FILE* const pipe = popen(command.str().c_str(), "r")) {
    std::array<char, 1024> buffer;
    if (fgets(buffer.data(), buffer.size(), pipe) != nullptr) line = buffer.data();
    pclose(pipe);
  }
  const size_t slash = line.rfind('/');
  if (slash != std::string::npos) line.erase(0, slash + 1);
  return line.substr(0, line.find_first_of(" \n"));
}

// Each kind of finding once a launch and place; text() is not asked for more often.
template <class Text>
void found(const std::string& key, const Text& text) {
  if (!device.seen.insert(key).second) return;
  std::ostringstream message;
  message << text();
  if (device.current != nullptr)
    message << " [block " << device.indices.block.x << ", thread " << device.current->index << "]";
  device.findings.push_back(message.str());
}
std::string key_of(const char* kind, const void* a, const void* b = nullptr) {
  std::ostringstream key;
  key << kind << a << b;
  return key.str();
}

// -- Scheduler -------------------------------------------------------------------------------------------------------

void thread_main() {
  device.body(device.parameters);
  device.current->state = State::Done;
  device.current->context.switch_to(device.scheduler);
  __builtin_unreachable();
}

void make_ready(Thread& t) {
  t.state = State::Ready;
  device.ready.push_back(t.index);
}

void wait_as(State state) {
  Thread& t = *device.current;
  t.state = state;
  t.context.switch_to(device.scheduler);
  if (device.aborted) {  // this fiber never runs again
    t.state = State::Done;
    t.context.switch_to(device.scheduler);
  }
}

Thread& next_thread() {
  auto& ready = device.ready;
  auto chosen = ready.begin();
  if (options.order == Order::Forward) chosen = std::min_element(ready.begin(), ready.end());
  if (options.order == Order::Backward) chosen = std::max_element(ready.begin(), ready.end());
  if (options.order == Order::Random) chosen += static_cast<std::ptrdiff_t>(device.random() % ready.size());
  const int index = *chosen;
  *chosen = ready.back();
  ready.pop_back();
  return device.threads[static_cast<size_t>(index)];
}

int source_lane(const Thread& t) {
  const int first = t.lane() / t.width * t.width, end = first + t.width;
  switch (t.op) {
    case WarpOp::Index:
      return first + (t.argument & (t.width - 1));
    case WarpOp::Up:
      return t.lane() - t.argument >= first ? t.lane() - t.argument : t.lane();
    case WarpOp::Down:
      return t.lane() + t.argument < end ? t.lane() + t.argument : t.lane();
    default:
      return (t.lane() ^ t.argument) < end ? t.lane() ^ t.argument : t.lane();
  }
}

// Does the operation that `group`, the lanes of one mask, have all reached.
void complete_warp_op(const std::vector<Thread*>& group) {
  const Thread& first = *group.front();
  uint64_t ballot = 0;
  std::array<const Thread*, kWarp> lanes{};
  for (const Thread* t : group) {
    lanes[static_cast<size_t>(t->lane())] = t;
    ballot |= static_cast<uint64_t>(t->in != 0) << t->lane();
    if (t->line != first.line || std::strcmp(t->file, first.file) != 0)
      found("meet" + place(first.file, first.line) + place(t->file, t->line), [&] {
        return "lanes of one warp meet in different operations: " + place(first.file, first.line) + " and " +
               place(t->file, t->line);
      });
  }
  std::vector<uint64_t> results;
  for (const Thread* t : group) {
    if (t->op == WarpOp::Ballot || t->op == WarpOp::Sync) {
      results.push_back(ballot);
      continue;
    }
    const int from = source_lane(*t);
    const Thread* const source = from < kWarp ? lanes[static_cast<size_t>(from)] : nullptr;
    if (source == nullptr)
      found("lane" + place(t->file, t->line), [&] {
        return place(t->file, t->line) + ": lane " + std::to_string(t->lane()) + " reads lane " + std::to_string(from) +
               ", which is not in the mask or has exited";
      });
    results.push_back(source != nullptr ? source->in : kNan);
  }
  if (first.op == WarpOp::Sync) {
    std::array<uint32_t, kWarp> joined{};
    for (const Thread* t : group)
      for (size_t l = 0; l < kWarp; ++l)
        joined[l] = std::max(joined[l], device.clocks[static_cast<size_t>(t->index)][l]);
    for (const Thread* t : group) {
      device.clocks[static_cast<size_t>(t->index)] = joined;
      ++device.clocks[static_cast<size_t>(t->index)][static_cast<size_t>(t->lane())];
    }
  }
  for (size_t i = 0; i < group.size(); ++i) {
    group[i]->out = results[i];
    make_ready(*group[i]);
  }
}

// Completes the operations for which no lane of their mask is missing any more.
void try_warp(int warp) {
  const size_t begin = static_cast<size_t>(warp * kWarp), end = std::min(begin + kWarp, device.threads.size());
  for (size_t i = begin; i < end; ++i) {
    const Thread& t = device.threads[i];
    if (t.state != State::InWarpOp) continue;
    std::vector<Thread*> group;
    bool complete = true;
    for (size_t j = begin; j < end && complete; ++j) {
      Thread& other = device.threads[j];
      if (!other.in_mask(t.mask) || other.state == State::Done) continue;
      complete = other.state == State::InWarpOp && other.mask == t.mask && other.op == t.op;
      group.push_back(&other);
    }
    if (complete) complete_warp_op(group);
  }
}

void try_barrier() {
  const Thread* first = nullptr;
  size_t waiting = 0, done = 0;
  for (const Thread& t : device.threads) {
    if (t.state == State::AtBarrier && first == nullptr) first = &t;
    waiting += t.state == State::AtBarrier;
    done += t.state == State::Done;
  }
  if (waiting == 0 || waiting + done < device.threads.size()) return;
  for (const Thread& t : device.threads)
    if (t.state == State::AtBarrier && (t.line != first->line || std::strcmp(t.file, first->file) != 0))
      found("barriers" + place(first->file, first->line), [&] {
        return "threads of one block wait at different barriers: " + place(first->file, first->line) + " and " +
               place(t.file, t.line);
      });
  if (done > 0)
    found("exited" + place(first->file, first->line), [&] {
      return place(first->file, first->line) + ": a barrier that " + std::to_string(done) +
             " threads of the block never reach";
    });
  ++device.epoch;
  for (Thread& t : device.threads)
    if (t.state == State::AtBarrier) make_ready(t);
}

// Nobody can run. Ends the block, if it has not ended by itself.
bool is_over() {
  std::set<std::string> places;
  for (const Thread& t : device.threads)
    if (t.state != State::Done) places.insert(place(t.file, t.line));
  if (places.empty()) return true;
  if (!device.aborted)
    found("deadlock", [&] {
      std::string text = "deadlock: threads wait for each other at";
      for (const auto& p : places) text += " " + p;
      return text;
    });
  device.aborted = true;
  for (Thread& t : device.threads)
    if (t.state != State::Done) make_ready(t);
  return false;
}

void run_block() {
  ++device.block;
  device.epoch = 0;
  device.aborted = false;
  device.clocks.assign(device.threads.size(), {});
  for (Thread& t : device.threads) {
    device.clocks[static_cast<size_t>(t.index)][static_cast<size_t>(t.lane())] = 1;
    t.context.start(device.stacks + static_cast<size_t>(t.index) * kStack, &thread_main);
    make_ready(t);
  }
  for (;;) {
    if (device.ready.empty()) {
      if (is_over()) return;
      continue;
    }
    Thread& t = next_thread();
    device.current = &t;
    device.indices.thread = t.id;
    device.scheduler.switch_to(t.context);
    device.current = nullptr;
    if (device.aborted) continue;
    if (t.state == State::InWarpOp || t.state == State::Done) try_warp(t.warp());
    if (t.state == State::AtBarrier || t.state == State::Done) try_barrier();
  }
}

// -- Checker ---------------------------------------------------------------------------------------------------------

// The segments of the module that the kernel is in: its __shared__ variables are in the writable one.
void find_module(const void* kernel) {
  device.shared = device.constants = {};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* address) {
        Range written, read;
        bool here = false;
        for (int k = 0; k < info->dlpi_phnum; ++k) {
          const auto& header = info->dlpi_phdr[k];
          if (header.p_type != PT_LOAD) continue;
          const uintptr_t first = info->dlpi_addr + header.p_vaddr;
          const Range range{first, first + header.p_memsz};
          here = here || range.has(reinterpret_cast<uintptr_t>(address));
          if ((header.p_flags & PF_W) != 0) {
            written = range;
          } else {
            read = {read.first == 0 ? range.first : read.first, range.last};
          }
        }
        if (here) device.shared = written, device.constants = read;
        return here ? 1 : 0;
      },
      const_cast<void*>(kernel));
}

Cell& cell_of(uintptr_t grain) {
  static uintptr_t last_page = 0;
  static std::array<Cell, kCells>* last = nullptr;
  if (last == nullptr || grain / kCells != last_page || device.shadow.empty()) {
    auto& page = device.shadow[grain / kCells];
    if (page == nullptr) page = std::make_unique<std::array<Cell, kCells>>();
    last_page = grain / kCells;
    last = page.get();
  }
  return (*last)[grain % kCells];
}

// Whether the current thread's access comes after `before`.
bool comes_after(const Access& before, bool shared) {
  const Thread& t = *device.current;
  if (before.block != device.block) return shared;  // each block has its own shared memory
  if (before.thread == static_cast<uint32_t>(t.index) || before.epoch < device.epoch) return true;
  const int thread = static_cast<int>(before.thread);
  return thread / kWarp == t.warp() &&
         before.clock <= device.clocks[static_cast<size_t>(t.index)][static_cast<size_t>(thread % kWarp)];
}

void check_order(const Access& before, const char* kinds, bool shared, const void* where) {
  if (before.block == 0 || comes_after(before, shared)) return;
  found(key_of("race", before.where, where), [&] {
    return std::string("race (") + kinds + ") on " + (shared ? "shared" : "global") +
           " memory: " + place(before.where) + " by thread " + std::to_string(before.thread) + " against " +
           place(where);
  });
}

void note_read(Cell& cell, const Access& now) {
  auto& [a, b] = cell.reads;
  if (a.block != now.block || a.epoch != now.epoch) {
    a = now, b = {};
  } else if (a.thread == now.thread) {
    a = now;
  } else if (b.block == 0 || b.thread / kWarp == a.thread / kWarp) {
    b = now;  // rather one of another warp
  }
}

KnownBuffer* buffer_at(uintptr_t p, size_t bytes, uintptr_t& first) {
  auto it = device.buffers.upper_bound(p);
  if (it == device.buffers.begin()) return nullptr;
  --it;
  first = it->first;
  return p + bytes <= first + it->second.bytes ? &it->second : nullptr;
}

std::string nearest_buffer(uintptr_t p) {
  for (const auto& [first, buffer] : device.buffers)
    if (p + 4096 >= first && p < first + buffer.bytes + 4096)
      return buffer.name + " at byte " + std::to_string(static_cast<int64_t>(p - first)) + " of " +
             std::to_string(buffer.bytes);
  return "no buffer";
}

}  // namespace

void touch(const void* address, size_t bytes, bool write, const void* where) {
  const Thread* const t = device.current;
  if (t == nullptr) return;
  const auto p = reinterpret_cast<uintptr_t>(address);
  if (p - reinterpret_cast<uintptr_t>(device.stacks) < device.stack_count * kStack) return;
  if (device.parameter_range.has(p) || range_of(&device, sizeof device).has(p) ||
      range_of(device.threads.data(), device.threads.size() * sizeof(Thread)).has(p))
    return;
  const char* const verb = write ? "store" : "load";
  if ((bytes & (bytes - 1)) == 0 && p % std::min<size_t>(bytes, 16) != 0)
    found(key_of("aligned", where),
          [&] { return "misaligned " + std::to_string(bytes) + "-byte " + verb + " at " + place(where); });
  const bool shared = device.shared.has(p);
  uintptr_t first = 0;
  KnownBuffer* const buffer = shared ? nullptr : buffer_at(p, bytes, first);
  if (!shared && buffer == nullptr) {
    if (!write && device.constants.has(p)) return;
    if (options.only_buffers)
      found(key_of("bounds", where), [&] {
        return "out of bounds: " + std::to_string(bytes) + "-byte " + verb + " at " + place(where) + ", " +
               nearest_buffer(p);
      });
  }
  const Access now{device.block, device.epoch,
                   device.clocks[static_cast<size_t>(t->index)][static_cast<size_t>(t->lane())],
                   static_cast<uint32_t>(t->index), where};
  for (uintptr_t grain = p / kGrain; grain * kGrain < p + bytes; ++grain) {
    Cell& cell = cell_of(grain);
    const size_t in_buffer = buffer != nullptr && !buffer->written.empty() ? grain - first / kGrain : 0;
    const bool tracked = buffer != nullptr && !buffer->written.empty();
    if (!write && ((shared && cell.write.block != device.block) || (tracked && !buffer->written[in_buffer])))
      found(key_of("uninitialised", where), [&] {
        return std::string("uninitialised ") + (shared ? "shared" : "global") + " memory is read at " + place(where);
      });
    check_order(cell.write, write ? "write, write" : "write, read", shared, where);
    if (write) {
      for (const Access& read : cell.reads) check_order(read, "read, write", shared, where);
      cell = {now, {}};
      if (tracked) buffer->written[in_buffer] = true;
    } else {
      note_read(cell, now);
    }
  }
}

void block_barrier(const char* file, int line) {
  device.current->file = file;
  device.current->line = line;
  wait_as(State::AtBarrier);
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, const char* file, int line) {
  Thread& t = *device.current;
  t.file = file, t.line = line, t.op = op, t.mask = mask, t.in = value, t.argument = argument, t.width = width;
  if (!t.in_mask(mask)) {
    found("mask" + place(file, line), [&] {
      return place(file, line) + ": lane " + std::to_string(t.lane()) + " calls with a mask that leaves it out";
    });
    return kNan;
  }
  wait_as(State::InWarpOp);
  return t.out;
}

const Indices& indices() { return device.indices; }

void run(dim3 grid, dim3 block, void (*body)(void*), void* parameters, size_t parameter_bytes, const void* kernel) {
  const std::lock_guard<std::mutex> lock(device.launching);
  const int64_t threads = int64_t{block.x} * block.y * block.z, blocks = int64_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || block.z > 64 || blocks < 1 || grid.x > 0x7fffffffU || grid.y > 65535 ||
      grid.z > 65535 || parameter_bytes > 4096)
    found("launch", [&] {
      return "a launch beyond CUDA's limits: " + std::to_string(blocks) + " blocks, " + std::to_string(threads) +
             " threads, " + std::to_string(parameter_bytes) + " bytes of parameters";
    });
  if (device.findings.empty()) {
    if (device.stack_count < static_cast<size_t>(threads)) {
      if (device.stacks != nullptr) munmap(device.stacks, device.stack_count * kStack);
      device.stack_count = static_cast<size_t>(threads);
      device.stacks = static_cast<char*>(mmap(nullptr, device.stack_count * kStack, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    find_module(kernel);
    device.shadow.clear();  // what earlier launches did comes before
    device.random.seed(options.seed);
    device.body = body;
    device.parameters = parameters;
    device.parameter_range = range_of(parameters, parameter_bytes);
    device.block = 0;
    device.indices.block_size = block;
    device.indices.grid_size = grid;
    device.threads.assign(static_cast<size_t>(threads), {});
    for (int i = 0; i < threads; ++i) {
      const auto k = static_cast<unsigned>(i);
      device.threads[k].index = i;
      device.threads[k].id = {k % block.x, k / block.x % block.y, k / block.x / block.y};
    }
    std::vector<int64_t> order;
    for (int64_t b = std::max<int64_t>(0, options.first_block); b < std::min(blocks, options.last_block); ++b)
      order.push_back(b);
    if (options.order == Order::Backward) std::reverse(order.begin(), order.end());
    if (options.order == Order::Random) std::shuffle(order.begin(), order.end(), device.random);
    for (const int64_t b : order) {
      const auto k = static_cast<unsigned>(b);
      device.indices.block = {k % grid.x, k / grid.x % grid.y, k / grid.x / grid.y};
      run_block();
    }
  }
  if (device.findings.empty()) return;
  std::string text = "simt:";
  for (const auto& finding : device.findings) text += "\n  " + finding;
  device.findings.clear();
  device.seen.clear();
  throw std::runtime_error(text);
}

Buffer::Buffer(const void* data, size_t bytes, const char* name, bool initialised) : data_(data) {
  device.buffers[reinterpret_cast<uintptr_t>(data)] = {
      bytes, name, std::vector<bool>(initialised ? 0 : (bytes + kGrain - 1) / kGrain)};
}
Buffer::~Buffer() { device.buffers.erase(reinterpret_cast<uintptr_t>(data_)); }

DeviceGuard::DeviceGuard() { ++device.guards; }
DeviceGuard::~DeviceGuard() { --device.guards; }
cudaStream_t current_stream() {
  if (device.guards == 0)
    found("guard", [] { return "a stream is asked for without a device guard: it may be another device's"; });
  return nullptr;
}

void fail_assertion(const char* assertion, const char* file, unsigned line) {
  found("assertion" + place(file, static_cast<int>(line)),
        [&] { return "assertion failed at " + place(file, static_cast<int>(line)) + ": " + assertion; });
  Thread& t = *device.current;
  device.aborted = true;
  t.state = State::Done;
  t.context.switch_to(device.scheduler);
}

namespace {
void report_undefined(const char* what, const char* file, unsigned line) {
  if (device.current == nullptr) return;
  found(what + place(file, static_cast<int>(line)),
        [&] { return std::string(what) + " at " + place(file, static_cast<int>(line)); });
}
}  // namespace

}  // namespace simt

// -- What CUDA_KERNEL_ASSERT calls, in place of libc's
// -----------------------------------------------------------------

extern "C" __attribute__((visibility("hidden"), noreturn)) void __assert_fail(const char* assertion, const char* file,
                                                                              unsigned line, const char*) noexcept {
  if (simt::device.current != nullptr) simt::fail_assertion(assertion, file, line);
  std::fprintf(stderr, "%s:%u: %s\n", file, line, assertion);
  std::abort();
}

// -- What g++ -fsanitize=thread,... calls ----------------------------------------------------------------------------

#define SIMT_ACCESS(name, bytes, write) \
  extern "C" void name(void* p) { simt::touch(p, bytes, write, __builtin_return_address(0)); }
#define SIMT_ACCESSES(bytes)                              \
  SIMT_ACCESS(__tsan_read##bytes, bytes, false)           \
  SIMT_ACCESS(__tsan_write##bytes, bytes, true)           \
  SIMT_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  SIMT_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
extern "C" void __tsan_read_range(void* p, size_t n) { simt::touch(p, n, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t n) { simt::touch(p, n, true, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
// The guard of a function's static variable.
extern "C" unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }

struct UbsanPlace {
  const char* file;
  unsigned line, column;
};
#define SIMT_UNDEFINED(name, what) \
  extern "C" void __ubsan_handle_##name(UbsanPlace* at, ...) { simt::report_undefined(what, at->file, at->line); }
SIMT_UNDEFINED(out_of_bounds, "array index out of bounds")
SIMT_UNDEFINED(add_overflow, "signed overflow")
SIMT_UNDEFINED(sub_overflow, "signed overflow")
SIMT_UNDEFINED(mul_overflow, "signed overflow")
SIMT_UNDEFINED(negate_overflow, "signed overflow")
SIMT_UNDEFINED(divrem_overflow, "division overflow")
SIMT_UNDEFINED(shift_out_of_bounds, "shift out of bounds")
SIMT_UNDEFINED(type_mismatch_v1, "misaligned pointer")
SIMT_UNDEFINED(pointer_overflow, "pointer overflow")
