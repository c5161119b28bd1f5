#include "emu.h"

#include <execinfo.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Options options;
long errors = 0;

namespace {

constexpr size_t kStack = 128 << 10, kPage = 4096;
constexpr size_t kWindowDynamic = 256 << 10, kWindowStatic = 64 << 10;
constexpr size_t kReserved = 1024;  // the system's share of shared memory
constexpr size_t kMaxDynamic = 227 << 10;

struct Block;
struct Warp;

struct Copy16 {
  char* to;
  const char* from;
  int bytes;
  uint64_t group;
};

enum class State { ready, polling, waiting, done };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool slow = false;
  State state = State::ready;
  const char* what = "";  // it waits for
  void* where = nullptr;
  uint32_t detail = 0;
  std::vector<Copy16> copies;
  uint64_t group = 0;
  uint32_t calls = 0;
};

struct Open : Meeting {
  void (*finish)(Meeting&);
};

struct Warp {
  Fiber* lanes[32];
  uint32_t alive = 0, waiting = 0;
  std::vector<Open> open;
};

struct Static {
  const char* function;
  int site;
  size_t size;
  char* p;
};

struct Window {
  char* base;  // [dynamic 256 K][guard][static 64 K][guard]
};

struct Barrier {
  int arrived = 0;
  int count = 0;
  std::vector<Fiber*> waiting;
  void* where = nullptr;  // from which the first thread came
};

struct Block {
  uint3 index;
  int id;
  Window window{};
  char* dynamic = nullptr;
  char* origin = nullptr;  // where shared addresses count from
  size_t dynamic_size = 0, static_used = 0;
  std::vector<Static> statics;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  int alive = 0;
  Barrier barrier[16];
  int vote[3] = {0, 1, 0};
  struct Waiter {
    Fiber* f;
    char* address;
  };
  std::vector<Waiter> waiters;
  int copies = 0;
};

struct Bulk {
  Block* block;
  char* to;
  const char* from;
  uint32_t bytes;
  char* barrier;
  uint64_t due;
};

// ---------------------------------------------------------------------------- scheduler's state
Fiber* current = nullptr;
void* scheduler_sp = nullptr;
std::vector<Block*> blocks;  // resident
std::deque<Fiber*> fast, slow, pollers;
std::vector<Bulk> bulks;
uint64_t tick = 0, polls = 0, random_state = 88172645463325252ull;
int order = 0, copy_mode = 0;
void (*kernel_body)(void*);
void* kernel_context;
std::string kernel_name;
long live = 0;
time_t launch_started;

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
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
.size emu_switch,.-emu_switch
)");

std::string place(void* pc) {
  if (!pc) return "?";
  char command[256];
  snprintf(command, sizeof command, "addr2line -e /proc/%d/exe -f -C -i %p 2>/dev/null", getpid(),
           static_cast<void*>(static_cast<char*>(pc) - 1));
  std::string text;
  if (FILE* f = popen(command, "r")) {
    char line[4096];
    bool function = true;
    std::string name;
    int shown = 0;
    while (fgets(line, sizeof line, f)) {
      std::string s(line);
      while (!s.empty() && s.back() == '\n') s.pop_back();
      if (function) {
        name = s.substr(0, s.find('('));
        if (name.size() > 70) name = name.substr(0, 70) + "~";
      } else if (s.find("emulator/include") == std::string::npos && s.find("emu.cpp") == std::string::npos && s.find("emulator/ptx") == std::string::npos && s.compare(0, 2, "??")) {
        const size_t slash = s.find("csrc/");
        if (slash != std::string::npos) s = s.substr(slash);
        if (shown++ < 4) text += (text.empty() ? "" : " < ") + s + " (" + name + ")";
      }
      if (const size_t at = text.find(" (discriminator"); at != std::string::npos)
        text.erase(at, text.find(')', at) + 1 - at);
      function = !function;
    }
    pclose(f);
  }
  if (text.empty()) {
    char p[32];
    snprintf(p, sizeof p, "%p", pc);
    text = p;
  }
  return text;
}

std::string whoami() {
  if (!current) return "host";
  char text[128];
  snprintf(text, sizeof text, "block %d thread %u (warp %d lane %d)", current->block->id,
           current->thread.x + blockDim.x * (current->thread.y + blockDim.y * current->thread.z),
           static_cast<int>(current->warp - current->block->warps.data()), current->lane);
  return text;
}

void dump() {
  fprintf(stderr, "emu: kernel %s\n", kernel_name.c_str());
  fprintf(stderr, "emu: grid %u,%u,%u block %u,%u,%u tick %llu, %zu bulk copies under way\n", gridDim.x,
          gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z, (unsigned long long)tick,
          bulks.size());
  int lines = 0;
  std::map<void*, std::string> names;
  for (Block* b : blocks) {
    if (!b->alive) continue;
    for (size_t w = 0; w < b->warps.size(); ++w) {
      Warp& warp = b->warps[w];
      std::map<std::string, uint32_t> groups;
      for (int l = 0; l < 32; ++l)
        if (Fiber* f = warp.lanes[l]; f && f->state != State::done) {
          char text[64];
          snprintf(text, sizeof text, " [%08x]", f->detail);
          if (!names.count(f->where)) names[f->where] = place(f->where);
          groups[std::string(f->state == State::waiting ? "waits: "
                             : f->state == State::polling ? "polls: " : "ready: ") +
                 f->what + text + " at " + names[f->where]] |= 1u << l;
        }
      for (auto& [text, mask] : groups)
        if (++lines <= 60)
          fprintf(stderr, "emu:   block %d warp %zu lanes %08x (alive %08x) %s\n", b->id, w, mask,
                  warp.alive, text.c_str());
    }
  }
  if (lines > 60) fprintf(stderr, "emu:   ... %d lines more\n", lines - 60);
}

void ready(Fiber* f) {
  f->state = State::ready;
  (f->slow ? slow : fast).push_back(f);
}

void suspend(State state, const char* what, void* where, uint32_t detail = 0) {
  Fiber* self = current;
  self->state = state;
  self->what = what;
  self->where = where;
  self->detail = detail;
  if (state == State::polling) {
    pollers.push_back(self);
    ++polls;
  } else {
    polls = 0;
  }
  emu_switch(&self->sp, scheduler_sp);
}

void release_barrier(Barrier& b) {
  for (Fiber* f : b.waiting)
    if (f != current) ready(f);
  b.waiting.clear();
  b.arrived = 0;
  polls = 0;
}

void try_finish(Warp& warp) {
  for (bool again = true; again;) {
    again = false;
    for (size_t i = 0; i < warp.open.size(); ++i) {
      Open& o = warp.open[i];
      if ((o.mask & warp.alive) != o.arrived || !o.arrived) continue;
      Open done = o;
      warp.open.erase(warp.open.begin() + i);
      done.finish(done);
      for (int l = 0; l < 32; ++l)
        if (done.arrived >> l & 1 && warp.lanes[l] != current) ready(warp.lanes[l]);
      polls = 0;
      again = true;
      break;
    }
  }
}

void check_canaries(Block* b) {
  const size_t size = (b->dynamic_size + 1023) / 1024 * 1024;
  for (size_t i = b->dynamic_size; i < size; ++i)
    if (b->dynamic[i] != (char)0xA5) {
      error("block %d wrote past its dynamic shared memory: byte %zu of %zu", b->id, i, b->dynamic_size);
      break;
    }
  for (size_t i = 0; i < kReserved; ++i)
    if (b->origin[i] != (char)0xA5) {
      error("block %d wrote below its dynamic shared memory: byte -%zu", b->id, kReserved - i);
      break;
    }
}

extern "C" void emu_entry() {
  kernel_body(kernel_context);
  Fiber* self = current;
  Block* block = self->block;
  Warp& warp = *self->warp;
  warp.alive &= ~(1u << self->lane);
  self->copies.clear();
  --block->alive;
  --live;
  polls = 0;
  try_finish(warp);
  for (Barrier& b : block->barrier)
    if (b.arrived && !b.count && b.arrived == block->alive) release_barrier(b);
  self->state = State::done;
  emu_switch(&self->sp, scheduler_sp);
  abort();
}

// ------------------------------------------------------------------------------------- pools
std::vector<Fiber*> free_fibers;
std::vector<Window> free_windows;

Fiber* take_fiber() {
  if (free_fibers.empty()) {
    Fiber* f = new Fiber;
    f->stack = static_cast<char*>(mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (f->stack == MAP_FAILED) fatal("no memory for another fiber's stack");
    mprotect(f->stack, kPage, PROT_NONE);
    return f;
  }
  Fiber* f = free_fibers.back();
  free_fibers.pop_back();
  return f;
}

Window take_window() {
  if (free_windows.empty()) {
    const size_t size = kWindowDynamic + kPage + kWindowStatic + kPage;
    char* p = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED) fatal("no memory for shared memory");
    mprotect(p + kWindowDynamic, kPage, PROT_NONE);
    mprotect(p + size - kPage, kPage, PROT_NONE);
    return {p};
  }
  Window w = free_windows.back();
  free_windows.pop_back();
  return w;
}

std::map<const void*, int> dynamic_limit;
cudaError_t last_error = cudaSuccess;

int slow_of(int block, int warp, int lane, uint64_t salt) {
  uint64_t key;
  switch (order) {
    case 2: key = block * 64 + warp; break;
    case 3: key = (block * 64 + warp) * 32 + lane; break;
    case 4: key = block; break;
    default: return 0;
  }
  key = (key + 1) * 0x9E3779B97F4A7C15ull ^ salt;
  key ^= key >> 29;
  key *= 0xBF58476D1CE4E5B9ull;
  return key >> 62 & 1;
}

Block* start_block(int id, const Launch& l, uint64_t salt) {
  Block* b = new Block;
  b->id = id;
  b->index = {id % l.grid.x, id / l.grid.x % l.grid.y, id / l.grid.x / l.grid.y};
  b->window = take_window();
  b->dynamic_size = l.smem;
  const size_t size = (l.smem + 1023) / 1024 * 1024;
  b->dynamic = b->window.base + kWindowDynamic - size;
  b->origin = b->dynamic - kReserved;
  memset(b->origin, 0xA5, kReserved + size);
  memset(b->dynamic, 0xFF, l.smem);
  const int threads = l.block.x * l.block.y * l.block.z;
  b->warps.resize((threads + 31) / 32);
  for (Warp& w : b->warps) memset(w.lanes, 0, sizeof w.lanes);
  b->alive = threads;
  live += threads;
  for (int t = 0; t < threads; ++t) {
    Fiber* f = take_fiber();
    f->thread = {t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y};
    f->block = b;
    f->warp = &b->warps[t / 32];
    f->lane = t % 32;
    f->warp->lanes[f->lane] = f;
    f->warp->alive |= 1u << f->lane;
    f->slow = slow_of(id, t / 32, t % 32, salt);
    f->what = "start";
    f->where = nullptr;
    f->group = 0;
    f->copies.clear();
    void** top = reinterpret_cast<void**>(f->stack + kPage + kStack - 64);
    top[0] = reinterpret_cast<void*>(&emu_entry);  // after six pops; then rsp % 16 == 8
    top[1] = nullptr;
    f->sp = top - 6;
    b->fibers.push_back(f);
    ready(f);
  }
  return b;
}

void perform(size_t i);

void end_block(Block* b) {
  if (b->copies) {
    error("block %d exits with %d bulk copies under way into its shared memory", b->id, b->copies);
    for (size_t i = bulks.size(); i-- > 0;)
      if (bulks[i].block == b) bulks.erase(bulks.begin() + i);
  }
  check_canaries(b);
  for (Fiber* f : b->fibers) free_fibers.push_back(f);
  free_windows.push_back(b->window);
  delete b;
}

void wake_waiters(Block* b, char* address) {
  for (size_t i = 0; i < b->waiters.size();)
    if (b->waiters[i].address == address) {
      ready(b->waiters[i].f);
      b->waiters.erase(b->waiters.begin() + i);
    } else {
      ++i;
    }
}

// mbarrier: phase 1 | expected 12 | pending 12 | tx 23 signed | magic 16
struct Mbarrier {
  uint64_t phase : 1, expected : 12, pending : 12;
  int64_t tx : 23;
  uint64_t magic : 16;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint64_t kMagic = 0xBA44;

char* barrier_at(Block* b, uint32_t address, const char* what) {
  if (address % 8) error("%s: barrier %#x is not aligned to 8", what, address);
  char* p = b->origin + address;
  const bool dynamic = p >= b->dynamic && p + 8 <= b->dynamic + b->dynamic_size;
  const char* statics = b->window.base + kWindowDynamic + kPage;
  const bool fixed = p >= statics && p + 8 <= statics + b->static_used;
  if (!dynamic && !fixed) fatal("%s: barrier address %#x is outside shared memory", what, address);
  return p;
}

Mbarrier read_barrier(char* p, const char* what) {
  Mbarrier m;
  memcpy(&m, p, 8);
  if (m.magic != kMagic) {
    fatal("%s: the barrier at %#zx is not initialised (or was overwritten)", what,
          static_cast<size_t>(p - current->block->origin));
  }
  return m;
}

void settle(Block* b, char* p, Mbarrier m) {
  const bool over = m.pending == 0 && m.tx == 0;
  if (over) {
    m.phase ^= 1;
    m.pending = m.expected;
  }
  memcpy(p, &m, 8);
  if (over) wake_waiters(b, p);
  polls = 0;
}

void perform(size_t i) {
  const Bulk c = bulks[i];
  bulks.erase(bulks.begin() + i);
  --c.block->copies;
  memcpy(c.to, c.from, c.bytes);
  Mbarrier m;
  memcpy(&m, c.barrier, 8);
  if (m.magic != kMagic) fatal("a bulk copy completes on a barrier that is not one any more");
  m.tx -= c.bytes;
  settle(c.block, c.barrier, m);
}

// ------------------------------------------------------------------------------------ trouble
char alternate_stack[1 << 16];

void on_fault(int signal, siginfo_t* info, void* context) {
  auto* u = static_cast<ucontext_t*>(context);
  char* address = static_cast<char*>(info->si_addr);
  void* pc = reinterpret_cast<void*>(u->uc_mcontext.gregs[REG_RIP] + 1);
  const char* kind = "";
  if (current) {
    Block* b = current->block;
    if (address >= current->stack && address < current->stack + kPage) kind = " (stack overflow of the fiber)";
    if (address >= b->window.base + kWindowDynamic && address < b->window.base + kWindowDynamic + kPage)
      kind = " (just past dynamic shared memory)";
  }
  fprintf(stderr, "emu: FAULT: signal %d at address %p%s, %s\n", signal, address, kind, whoami().c_str());
  if (current)
    fprintf(stderr, "emu:   shared origin %p dynamic %p + %zu\n", current->block->origin,
            current->block->dynamic, current->block->dynamic_size);
  fprintf(stderr, "emu:   at %s\n", place(pc).c_str());
  fprintf(stderr, "emu: kernel %s\n", kernel_name.c_str());
  fflush(stdout);
  _exit(3);
}

uint64_t seen_tick;
int stuck;
void on_alarm(int, siginfo_t*, void* context) {
  if (!current) return;
  if (tick == seen_tick) {
    if (++stuck >= 30) {
      auto* u = static_cast<ucontext_t*>(context);
      fprintf(stderr, "emu: STUCK: %s runs for 30 s without yielding (a loop over plain loads?)\n",
              whoami().c_str());
      fprintf(stderr, "emu:   at %s\n",
              place(reinterpret_cast<void*>(u->uc_mcontext.gregs[REG_RIP] + 1)).c_str());
      dump();
      _exit(3);
    }
  } else {
    stuck = 0;
    seen_tick = tick;
  }
}

int choice(const char* name, std::initializer_list<const char*> values, int otherwise) {
  const char* s = getenv(name);
  if (!s) return otherwise;
  int i = 0;
  for (const char* v : values) {
    if (!strcmp(s, v)) return i;
    ++i;
  }
  if (!strcmp(s, "any")) return -1;
  fprintf(stderr, "emu: %s=%s?\n", name, s);
  exit(2);
}

struct Setup {
  Setup() {
    const auto number = [](const char* name, auto& value) {
      if (const char* s = getenv(name)) value = strtoll(s, nullptr, 0);
    };
    number("EMU_SMS", options.multiprocessors);
    number("EMU_SEED", options.seed);
    number("EMU_PER_SM", options.per_sm);
    number("EMU_TIMEOUT", options.timeout);
    number("EMU_VERBOSE", options.verbose);
    number("EMU_CLOCK", options.clock);
    number("EMU_RESIDENT", options.resident);
    number("EMU_BARRIER_CHECK", options.barrier_check);
    options.order = choice("EMU_ORDER", {"fifo", "random", "warps", "lanes", "blocks"}, -1);
    options.copies = choice("EMU_COPIES", {"now", "random", "late"}, -1);
    set_seed(options.seed);
    stack_t s{};
    s.ss_sp = alternate_stack;
    s.ss_size = sizeof alternate_stack;
    sigaltstack(&s, nullptr);
    struct sigaction a{};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &a, nullptr);
    a.sa_sigaction = on_alarm;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigaction(SIGALRM, &a, nullptr);
    itimerval t{{1, 0}, {1, 0}};
    setitimer(ITIMER_REAL, &t, nullptr);
  }
} setup;

}  // namespace

void set_seed(uint64_t seed) {
  random_state = (seed + 1) * 0x9E3779B97F4A7C15ull;
  for (int i = 0; i < 8; ++i) draw();
}

void fatal(const char* format, ...) {
  fflush(stdout);
  fprintf(stderr, "emu: FATAL: ");
  va_list list;
  va_start(list, format);
  vfprintf(stderr, format, list);
  va_end(list);
  fprintf(stderr, ", %s\n", whoami().c_str());
  void* frames[12];
  const int n = backtrace(frames, 12);
  for (int i = 1; i < n && i < 7; ++i) {
    const std::string s = place(frames[i]);
    if (s.compare(0, 2, "0x")) fprintf(stderr, "emu:   at %s\n", s.c_str());
  }
  dump();
  _exit(3);
}

void warning(const char* format, ...) {
  if (!options.verbose) return;
  static std::set<const void*> seen;
  void* const from = __builtin_return_address(0);
  if (!seen.insert(from).second) return;
  va_list list;
  va_start(list, format);
  fprintf(stderr, "emu: warning: ");
  vfprintf(stderr, format, list);
  va_end(list);
  fprintf(stderr, ", %s\nemu:   at %s\n", whoami().c_str(), place(from).c_str());
}

void error(const char* format, ...) {
  ++errors;
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  static std::set<std::string> seen;
  static int shown = 0;
  void* frames[4] = {__builtin_return_address(0)};
  char key[64];
  snprintf(key, sizeof key, "%p%p", frames[0], static_cast<const void*>(format));
  if (!seen.insert(key).second || ++shown > 40) return;
  fflush(stdout);
  fprintf(stderr, "emu: ERROR: %s, %s", text, whoami().c_str());
  void* more[8];
  const int n = backtrace(more, 8);
  for (int i = 1; i < n && i < 5; ++i) {
    const std::string s = place(more[i]);
    if (s.compare(0, 2, "0x")) fprintf(stderr, "\nemu:   at %s", s.c_str());
  }
  fprintf(stderr, "\nemu:   kernel %s\n", kernel_name.c_str());
}

int lane() { return current->lane; }
uint32_t active_lanes() { return current->warp->alive; }
uint64_t ticks() { return tick; }
void touch() { polls = 0; }

void meet(uint32_t mask, void (*finish)(Meeting&), void* arg, const char* what) {
  Fiber* self = current;
  if (!self) fatal("%s outside of a kernel", what);
  Warp& warp = *self->warp;
  const uint32_t bit = 1u << self->lane;
  if (!(mask & bit)) fatal("%s: the calling lane is not in the mask %08x", what, mask);
  Open* mine = nullptr;
  for (Open& o : warp.open)
    if (o.mask == mask && o.finish == finish) mine = &o;
  if (!mine) {
    warp.open.emplace_back();
    mine = &warp.open.back();
    mine->mask = mask;
    mine->arrived = 0;
    mine->finish = finish;
  }
  mine->arrived |= bit;
  mine->arg[self->lane] = arg;
  if (mine->arrived == (mask & warp.alive)) {
    try_finish(warp);
    // The last to come goes on at once, or sometimes last.
    if (order != 0 && (draw() >> 40 & 3) == 0) {
      ready(self);
      self->what = what;
      self->where = __builtin_return_address(0);
      emu_switch(&self->sp, scheduler_sp);
    }
  } else {
    suspend(State::waiting, what, __builtin_return_address(0), mask);
  }
}

static void barrier_from(int id, int count, const char* what, void* const where);
void block_barrier(int id, int count, const char* what) {
  barrier_from(id, count, what, __builtin_return_address(0));
}
static void barrier_from(int id, int count, const char* what, void* const where) {
  Fiber* self = current;
  if (!self) fatal("%s outside of a kernel", what);
  Barrier& b = self->block->barrier[id];
  if (b.arrived && b.count != count) fatal("%s %d: waited for with counts %d and %d", what, id, b.count, count);
  b.count = count;
  ++b.arrived;
  if (b.arrived == 1) b.where = where;
  if (where != b.where && options.barrier_check) {
    static std::map<std::pair<void*, void*>, bool> same;
    const auto key = std::make_pair(where, b.where);
    if (!same.count(key)) {
      const std::string one = place(b.where), two = place(where);
      same[key] = one == two;
      if (one != two)
        fprintf(stderr, "emu: ERROR: %s: threads meet from different places:\nemu:   %s\nemu:   %s, %s\n", what,
                one.c_str(), two.c_str(), whoami().c_str());
    }
    if (!same[key]) ++errors;
  }
  b.waiting.push_back(self);
  if (b.arrived == (count ? count : self->block->alive)) {
    release_barrier(b);
  } else {
    suspend(State::waiting, what, where, id);
  }
}

int block_vote(int value, int op) {
  void* const where = __builtin_return_address(0);
  Block* b = current->block;
  int& v = b->vote[op];
  if (op == 0) v += value != 0;
  if (op == 1) v &= value != 0;
  if (op == 2) v |= value != 0;
  barrier_from(0, 0, "__syncthreads_vote", where);
  const int result = v;
  barrier_from(0, 0, "__syncthreads_vote", where);
  v = op == 1;
  barrier_from(0, 0, "__syncthreads_vote", where);
  return result;
}

void poll() {
  if (current) suspend(State::polling, "poll", __builtin_return_address(0));
}
void maybe_poll() {
  if (current && ++current->calls % 64 == 0) suspend(State::polling, "poll", __builtin_return_address(0));
}

void* dynamic_shared(size_t) {
  if (!current) fatal("dynamic shared memory outside of a kernel (extern __shared__ at namespace scope?)");
  return current->block->dynamic;
}

void* static_shared(const char* function, int site, size_t size, size_t alignment) {
  Block* b = current->block;
  for (const Static& s : b->statics)
    if (s.site == site && s.function == function && s.size == size) return s.p;
  const size_t at = (b->static_used + alignment - 1) / alignment * alignment;
  if (at + size > kWindowStatic || at + size > (48 << 10)) fatal("too much static shared memory: %zu bytes", at + size);
  char* p = b->window.base + kWindowDynamic + kPage + at;
  memset(p, 0xFF, size);
  b->static_used = at + size;
  b->statics.push_back({function, site, size, p});
  return p;
}

uint32_t shared_offset(const void* q) {
  Block* b = current->block;
  const char* p = static_cast<const char*>(q);
  const char* statics = b->window.base + kWindowDynamic + kPage;
  const bool dynamic = p >= b->dynamic && p <= b->dynamic + b->dynamic_size;
  const bool fixed = p >= statics && p <= statics + b->static_used;
  if (!dynamic && !fixed)
    error("shared_address of %p, which is %s", q,
          p >= b->origin && p < b->window.base + kWindowDynamic ? "past the dynamic shared memory"
                                                                : "no shared address of this block");
  return static_cast<uint32_t>(p - b->origin);
}

void* shared_pointer(uint32_t offset) { return current->block->origin + offset; }

// ---------------------------------------------------------------------------------- collectives
namespace {
struct MmaArg {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};
float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

void need_all(Meeting& m, const char* what) {
  if (m.arrived != ~0u) error("%s by lanes %08x only", what, m.arrived);
}

void finish_mma(Meeting& m) {
  need_all(m, "mma");
  alignas(32) uint16_t a[16][16], b[16][8];
  alignas(32) float c[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<MmaArg*>(m.arg[l]);
    const int g = l / 4, t = l % 4;
    memcpy(&a[g][2 * t], &x.a[0], 4);
    memcpy(&a[g + 8][2 * t], &x.a[1], 4);
    memcpy(&a[g][2 * t + 8], &x.a[2], 4);
    memcpy(&a[g + 8][2 * t + 8], &x.a[3], 4);
    b[2 * t][g] = static_cast<uint16_t>(x.b0), b[2 * t + 1][g] = static_cast<uint16_t>(x.b0 >> 16);
    b[2 * t + 8][g] = static_cast<uint16_t>(x.b1), b[2 * t + 9][g] = static_cast<uint16_t>(x.b1 >> 16);
    c[g][2 * t] = x.c[0], c[g][2 * t + 1] = x.c[1];
    c[g + 8][2 * t] = x.c[2], c[g + 8][2 * t + 1] = x.c[3];
  }
  __m256 bf[16];
  for (int k = 0; k < 16; ++k) bf[k] = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<__m128i*>(b[k])));
  for (int i = 0; i < 16; ++i) {
    alignas(32) float af[16];
    _mm256_store_ps(af, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<__m128i*>(a[i]))));
    _mm256_store_ps(af + 8, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<__m128i*>(a[i] + 8))));
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    for (int k = 0; k < 16; k += 2) {
      s0 = _mm256_fmadd_ps(_mm256_set1_ps(af[k]), bf[k], s0);
      s1 = _mm256_fmadd_ps(_mm256_set1_ps(af[k + 1]), bf[k + 1], s1);
    }
    _mm256_store_ps(c[i], _mm256_add_ps(_mm256_load_ps(c[i]), _mm256_add_ps(s0, s1)));
  }
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<MmaArg*>(m.arg[l]);
    const int g = l / 4, t = l % 4;
    x.c[0] = c[g][2 * t], x.c[1] = c[g][2 * t + 1];
    x.c[2] = c[g + 8][2 * t], x.c[3] = c[g + 8][2 * t + 1];
  }
}

struct Tf32Arg {
  float* c;
  const float* a;
  float b0, b1;
};
float tf32(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  u &= ~0x1FFFu;
  memcpy(&x, &u, 4);
  return x;
}
void finish_tf32(Meeting& m) {
  need_all(m, "mma_tf32");
  float a[16][8], b[8][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<Tf32Arg*>(m.arg[l]);
    const int g = l / 4, t = l % 4;
    a[g][t] = tf32(x.a[0]), a[g + 8][t] = tf32(x.a[1]);
    a[g][t + 4] = tf32(x.a[2]), a[g + 8][t + 4] = tf32(x.a[3]);
    b[t][g] = tf32(x.b0), b[t + 4][g] = tf32(x.b1);
    c[g][2 * t] = x.c[0], c[g][2 * t + 1] = x.c[1];
    c[g + 8][2 * t] = x.c[2], c[g + 8][2 * t + 1] = x.c[3];
  }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float s = 0;
      for (int k = 0; k < 8; ++k) s += a[i][k] * b[k][j];
      c[i][j] += s;
    }
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<Tf32Arg*>(m.arg[l]);
    const int g = l / 4, t = l % 4;
    x.c[0] = c[g][2 * t], x.c[1] = c[g][2 * t + 1];
    x.c[2] = c[g + 8][2 * t], x.c[3] = c[g + 8][2 * t + 1];
  }
}

struct K8Arg {
  float* c;
  uint32_t low, high, b;
};
void finish_bf16_k8(Meeting& m) {
  need_all(m, "mma_k8");
  const auto number = [](uint32_t pair, int i) {
    const uint32_t bits = i ? pair & 0xFFFF0000 : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<K8Arg*>(m.arg[l]);
    for (int i = 0; i < 2; ++i) {
      a[l / 4][l % 4 * 2 + i] = number(x.low, i);
      a[l / 4 + 8][l % 4 * 2 + i] = number(x.high, i);
      b[l % 4 * 2 + i][l / 4] = number(x.b, i);
    }
  }
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<K8Arg*>(m.arg[l]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) x.c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}

struct MatricesArg {
  uint32_t* x;
  const char* row;
  bool transposed;
};
void finish_matrices(Meeting& m) {
  need_all(m, "load_matrices");
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t x[8][8];
    uint32_t banks = 0;
    for (int i = 0; i < 8; ++i) {
      const char* row = static_cast<MatricesArg*>(m.arg[8 * matrix + i])->row;
      memcpy(x[i], row, 16);
      banks |= 1u << reinterpret_cast<uintptr_t>(row) / 16 % 8;
    }
    if (banks != 255) error("load_matrices: rows of a matrix share banks");
    for (int l = 0; l < 32; ++l) {
      const auto& lane = *static_cast<MatricesArg*>(m.arg[l]);
      const int g = l / 4, t = l % 4 * 2;
      const uint16_t pair[2] = {lane.transposed ? x[t][g] : x[g][t], lane.transposed ? x[t + 1][g] : x[g][t + 1]};
      memcpy(&lane.x[matrix], pair, 4);
    }
  }
}

void finish_transpose(Meeting& m) {
  need_all(m, "movmatrix");
  uint16_t x[8][8];
  for (int l = 0; l < 32; ++l) memcpy(&x[l / 4][l % 4 * 2], m.arg[l], 4);
  for (int l = 0; l < 32; ++l) {
    const uint16_t y[2] = {x[l % 4 * 2][l / 4], x[l % 4 * 2 + 1][l / 4]};
    memcpy(m.arg[l], y, 4);
  }
}
}  // namespace

void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArg arg = {c, a, b0, b1};
  meet(~0u, finish_mma, &arg, "mma");
}
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  Tf32Arg arg = {c, a, b0, b1};
  meet(~0u, finish_tf32, &arg, "mma_tf32");
}
void mma_bf16_k8(float (&c)[4], uint32_t low, uint32_t high, uint32_t b) {
  K8Arg arg = {c, low, high, b};
  meet(~0u, finish_bf16_k8, &arg, "mma_k8");
}
uint32_t transpose8x8(uint32_t x) {
  meet(~0u, finish_transpose, &x, "transpose8x8");
  return x;
}

// ----------------------------------------------------------------------------- asynchronous copies
void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  char* p = barrier_at(current->block, barrier, "barrier_init");
  if (arrivals < 1 || arrivals > 4095) fatal("barrier_init: %u arrivals", arrivals);
  Mbarrier m{};
  m.expected = m.pending = arrivals;
  m.magic = kMagic;
  memcpy(p, &m, 8);
}
void mbarrier_expect_only(uint32_t barrier, uint32_t bytes) {
  char* p = barrier_at(current->block, barrier, "expect_tx");
  Mbarrier m = read_barrier(p, "expect_tx");
  if (bytes >= 1u << 20) fatal("barrier_expect: %u bytes is beyond 2^20 - 1", bytes);
  m.tx += bytes;
  settle(current->block, p, m);
}
void mbarrier_arrive(uint32_t barrier, uint32_t arrivals, uint32_t bytes) {
  char* p = barrier_at(current->block, barrier, "barrier_expect");
  Mbarrier m = read_barrier(p, "barrier_expect");
  if (bytes >= 1u << 20) fatal("barrier_expect: %u bytes is beyond 2^20 - 1", bytes);
  if (m.pending < arrivals)
    fatal("barrier_expect: more arrivals than the barrier's %u in one phase (tx-count %lld)", (unsigned)m.expected,
          (long long)m.tx);
  m.tx += bytes;
  m.pending -= arrivals;
  settle(current->block, p, m);
}
bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  char* p = barrier_at(current->block, barrier, "barrier_wait");
  const Mbarrier m = read_barrier(p, "barrier_wait");
  return m.phase != (parity & 1);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  if (parity > 1) error("barrier_wait: parity %u", parity);
  char* p = barrier_at(current->block, barrier, "barrier_wait");
  while (!mbarrier_test(barrier, parity)) {
    current->block->waiters.push_back({current, p});
    suspend(State::waiting, "barrier_wait", __builtin_return_address(0), barrier);
  }
}

namespace {
char* copy_target(uint32_t to, uint32_t bytes, const char* what) {
  Block* b = current->block;
  char* p = b->origin + to;
  const char* statics = b->window.base + kWindowDynamic + kPage;
  const bool dynamic = p >= b->dynamic && p + bytes <= b->dynamic + b->dynamic_size;
  const bool fixed = p >= statics && p + bytes <= statics + b->static_used;
  if (!dynamic && !fixed) fatal("%s: %u bytes at %#x are outside shared memory", what, bytes, to);
  return p;
}
volatile char sink;
}  // namespace

void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed) {
  if (row % 16) fatal("load_matrices: row address %#x is not aligned to 16", row);
  MatricesArg arg = {x, copy_target(row, 16, "load_matrices"), transposed};
  meet(~0u, finish_matrices, &arg, "load_matrices");
}

void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16) fatal("copy_bulk: the shared address %#x is not aligned to 16", to);
  if (reinterpret_cast<uintptr_t>(from) % 16) fatal("copy_bulk: the global address %p is not aligned to 16", from);
  if (bytes % 16 || bytes == 0) fatal("copy_bulk: %u bytes", bytes);
  char* p = copy_target(to, bytes, "copy_bulk");
  char* bar = barrier_at(current->block, barrier, "copy_bulk");
  read_barrier(bar, "copy_bulk");
  for (Bulk& c : bulks)
    if (c.block == current->block && c.to < p + bytes && p < c.to + c.bytes)
      error("copy_bulk: overlaps a copy that is under way");
  // Touch the source here, so that a fault names the caller.
  const char* f = static_cast<const char*>(from);
  for (uint32_t i = 0; i < bytes; i += kPage) sink = f[i];
  sink = f[bytes - 1];
  memset(p, 0xFF, bytes);
  const uint64_t wait = copy_mode == 0 ? 0 : copy_mode == 1 ? draw() % (50 * (live + 20)) : ~0ull >> 1;
  bulks.push_back({current->block, p, f, bytes, bar, tick + wait});
  ++current->block->copies;
  if (copy_mode == 0) perform(bulks.size() - 1);
}

void copy_async(uint32_t to, const void* from, int bytes, int zeros) {
  if (to % bytes) fatal("copy_async: the shared address %#x is not aligned to %d", to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fatal("copy_async: the global address %p is not aligned to %d", from, bytes);
  char* p = copy_target(to, bytes, "copy_async");
  if (bytes > zeros) {
    sink = *static_cast<const char*>(from);
    sink = static_cast<const char*>(from)[bytes - zeros - 1];
  }
  memset(p, 0xFF, bytes);
  current->copies.push_back({p, static_cast<const char*>(from), bytes, current->group});
  current->copies.back().bytes -= zeros;
  memset(p + bytes - zeros, 0, zeros);
  if (copy_mode == 0 || (copy_mode == 1 && draw() >> 60 & 1)) {
    memcpy(p, from, bytes - zeros);
    current->copies.pop_back();
  }
}
void copies_commit() { ++current->group; }
void copies_wait(int pending) {
  auto& c = current->copies;
  size_t kept = 0;
  for (size_t i = 0; i < c.size(); ++i)
    if (c[i].group + pending < current->group)
      memcpy(c[i].to, c[i].from, c[i].bytes);
    else
      c[kept++] = c[i];
  c.resize(kept);
}

// --------------------------------------------------------------------------------------- launch
namespace {
std::string largest;
size_t largest_smem = 0;
}  // namespace
std::string largest_kernel() {
  const size_t at = largest.find('(');
  std::string s = at == std::string::npos ? largest : largest.substr(at + 1);
  largest_smem = 0;
  for (const char* cut : {"void ", "tq::cuda::", "(anonymous namespace)::"})
    if (s.rfind(cut, 0) == 0) s = s.substr(strlen(cut));
  if (!s.empty() && s.back() == ')') s.pop_back();
  return s;
}
void Launch::run(const void* kernel, void (*body)(void*), void* context, const char* name) {
  if (current) fatal("a launch inside a kernel");
  const unsigned threads = block.x * block.y * block.z;
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const auto limit = dynamic_limit.find(kernel);
  const size_t allowed = limit == dynamic_limit.end() ? 48 << 10 : limit->second;
  static std::map<const void*, std::string> names;
  if (!names.count(kernel)) names[kernel] = place(static_cast<char*>(const_cast<void*>(kernel)) + 1);
  kernel_name = names[kernel];
  if (smem >= largest_smem) largest_smem = smem, largest = kernel_name;
  if (threads == 0 || threads > 1024 || count == 0 || grid.y > 65535 || grid.z > 65535) {
    fprintf(stderr, "emu: launch refused: grid %u,%u,%u block %u,%u,%u, %s\n", grid.x, grid.y, grid.z,
            block.x, block.y, block.z, kernel_name.c_str());
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (smem > allowed || smem > kMaxDynamic) {
    fprintf(stderr, "emu: launch refused: %zu bytes of dynamic shared memory, allowed %zu, %s\n", smem, allowed,
            kernel_name.c_str());
    last_error = cudaErrorInvalidValue;
    return;
  }
  uint64_t per_sm = options.per_sm;
  if (!per_sm) {
    per_sm = std::min<uint64_t>(32, 2048 / ((threads + 31) / 32 * 32));
    per_sm = std::max<uint64_t>(1, std::min<uint64_t>(per_sm, (228 << 10) / (smem + kReserved)));
  }
  uint64_t resident = per_sm * options.multiprocessors;
  if (options.resident && resident > static_cast<uint64_t>(options.resident)) resident = options.resident;
  if (cooperative && count > resident) {
    last_error = cudaErrorCooperativeLaunchTooLarge;
    return;
  }
  while (resident > 1 && resident * threads > 16384) --resident;
  if (count > resident && per_sm * options.multiprocessors > resident && cooperative) fatal("too many fibers");

  order = options.order >= 0 ? options.order : draw() >> 33 & 7;
  if (order > 4) order -= 4;
  copy_mode = options.copies >= 0 ? options.copies : draw() >> 33 & 3;
  if (copy_mode > 2) copy_mode = 1;
  const uint64_t salt = draw();
  kernel_body = body, kernel_context = context;
  gridDim = grid, blockDim = block;
  tick = polls = 0;
  live = 0;
  launch_started = time(nullptr);
  if (options.verbose)
    fprintf(stderr, "emu: grid %u,%u,%u block %u smem %zu order %d copies %d: %s\n", grid.x, grid.y, grid.z, threads,
            smem, order, copy_mode, kernel_name.c_str());

  uint64_t next = 0;
  while (next < count && blocks.size() < resident) blocks.push_back(start_block(next++, *this, salt));
  while (live > 0 || next < count) {
    ++tick;
    if (!bulks.empty()) {
      if (fast.empty() && slow.empty()) do {
        perform(copy_mode == 2 ? draw() % bulks.size()
                               : std::min_element(bulks.begin(), bulks.end(), [](auto& a, auto& b) { return a.due < b.due; }) -
                                     bulks.begin());
      } while (fast.empty() && slow.empty() && pollers.empty() && !bulks.empty()); else if (copy_mode == 1 && tick % 16 == 0) {
        for (size_t i = bulks.size(); i-- > 0;)
          if (bulks[i].due <= tick) perform(i);
      }
    }
    auto& queue = !fast.empty() ? fast : !slow.empty() ? slow : pollers;
    if (queue.empty()) {
      if (live == 0 && next < count) {
      } else {
        fprintf(stderr, "emu: DEADLOCK\n");
        dump();
        _exit(3);
      }
    }
    // Pollers get their turn among the others.
    auto& from = !pollers.empty() && tick % 8 == 0 ? pollers : queue;
    if (!from.empty()) {
      if (order != 0 && from.size() > 1) {
        const size_t n = order == 1 ? from.size() : std::min<size_t>(from.size(), 64);
        std::swap(from[0], from[draw() % n]);
      }
      Fiber* f = from.front();
      from.pop_front();
      f->state = State::ready;
      current = f;
      threadIdx = f->thread;
      blockIdx = f->block->index;
      emu_switch(&scheduler_sp, f->sp);
      current = nullptr;
      if (f->state == State::done && f->block->alive == 0) {
        blocks.erase(std::find(blocks.begin(), blocks.end(), f->block));
        end_block(f->block);
        if (next < count) blocks.push_back(start_block(next++, *this, salt));
      }
    }
    if (polls > 100000 + 400 * static_cast<uint64_t>(live)) {
      fprintf(stderr, "emu: LIVELOCK: %llu polls without progress\n", (unsigned long long)polls);
      dump();
      _exit(3);
    }
    if ((tick & 0xFFFFF) == 0 && time(nullptr) - launch_started > options.timeout) {
      fprintf(stderr, "emu: TIMEOUT: %d s in one launch\n", options.timeout);
      dump();
      _exit(3);
    }
  }
  for (Block* b : blocks) end_block(b);
  blocks.clear();
  if (!bulks.empty()) fatal("copies left");
}

// -------------------------------------------------------------------------------------- memory
namespace {
struct Guarded {
  char* map;
  size_t size;
  char* p;
  size_t bytes, slack;
};
std::map<void*, Guarded> guarded_blocks;
}  // namespace

void* guarded(size_t bytes, size_t alignment) {
  const size_t body = (bytes + alignment + kPage - 1) / kPage * kPage + kPage;
  const size_t size = body + kPage;
  char* map = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map == MAP_FAILED) fatal("no memory");
  mprotect(map, kPage, PROT_NONE);
  mprotect(map + body, kPage, PROT_NONE);
  const size_t room = (bytes + alignment - 1) / alignment * alignment;
  char* p = map + body - room;
  memset(map + kPage, 0xFF, body - kPage);
  memset(p + bytes, 0xA5, room - bytes);
  memset(map + kPage, 0xA5, p - map - kPage);
  guarded_blocks[p] = {map, size, p, bytes, room - bytes};
  return p;
}
void protect(void* q, bool read_only) {
  auto it = guarded_blocks.find(q);
  if (it == guarded_blocks.end()) fatal("protect: unknown memory");
  const Guarded& g = it->second;
  mprotect(g.map + kPage, g.size - 2 * kPage, read_only ? PROT_READ : PROT_READ | PROT_WRITE);
}
void release(void* q) {
  if (!q) return;
  auto it = guarded_blocks.find(q);
  if (it == guarded_blocks.end()) fatal("free of unknown memory");
  const Guarded g = it->second;
  for (size_t i = 0; i < g.slack; ++i)
    if (g.p[g.bytes + i] != (char)0xA5) {
      error("a kernel wrote %zu bytes past the end of global memory of %zu bytes", i, g.bytes);
      break;
    }
  for (char* c = g.map + kPage; c < g.p; ++c)
    if (*c != (char)0xA5) {
      error("a kernel wrote %zu bytes before the start of global memory", static_cast<size_t>(g.p - c));
      break;
    }
  munmap(g.map, g.size);
  guarded_blocks.erase(it);
}

// ------------------------------------------------------- what -fsanitize=alignment,bounds,... calls
}  // namespace emu

struct UbLocation {
  const char* file;
  uint32_t line, column;
};
static void ub(const UbLocation* at, const char* what, const void* p, size_t alignment) {
  static std::set<std::pair<const char*, uint64_t>> seen;
  ++emu::errors;
  if (!seen.insert({at->file, (uint64_t)at->line << 32 | at->column}).second) return;
  fflush(stdout);
  if (alignment)
    fprintf(stderr, "emu: ERROR: %s at %p, which is not aligned to %zu: %s:%u:%u, %s\n", what, p, alignment, at->file,
            at->line, at->column, emu::whoami().c_str());
  else
    fprintf(stderr, "emu: ERROR: %s: %s:%u:%u, %s\n", what, at->file, at->line, at->column, emu::whoami().c_str());
}
extern "C" {
struct TypeMismatch {
  UbLocation at;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* d, uintptr_t p) {
  static const char* kinds[] = {"load", "store", "reference", "member access", "member call", "constructor call",
                                "downcast", "downcast", "upcast", "cast"};
  ub(&d->at, d->kind < 10 ? kinds[d->kind] : "access", reinterpret_cast<void*>(p), size_t{1} << d->log_alignment);
}
void __ubsan_handle_out_of_bounds(UbLocation* d, uintptr_t) { ub(d, "array index out of bounds", nullptr, 0); }
void __ubsan_handle_shift_out_of_bounds(UbLocation* d, uintptr_t, uintptr_t) { ub(d, "shift out of range", nullptr, 0); }
void __ubsan_handle_divrem_overflow(UbLocation* d, uintptr_t, uintptr_t) { ub(d, "division by zero or overflow", nullptr, 0); }
void __ubsan_handle_missing_return(UbLocation* d) { ub(d, "missing return", nullptr, 0); abort(); }
void __ubsan_handle_builtin_unreachable(UbLocation* d) { ub(d, "unreachable reached", nullptr, 0); abort(); }
void __ubsan_handle_float_cast_overflow(UbLocation* d, uintptr_t) { ub(d, "float to integer out of range", nullptr, 0); }
void __ubsan_handle_load_invalid_value(UbLocation* d, uintptr_t) { ub(d, "invalid bool or enum value", nullptr, 0); }
}

// ------------------------------------------------------------------------------------- host API
using namespace emu;

cudaError_t cudaGetLastError() {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "error";
  }
}
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *value = options.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = EMU_ARCH >= 900 ? 227 << 10 : 99 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = EMU_ARCH >= 900 ? 228 << 10 : 100 << 10; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = EMU_ARCH / 100; break;
    case cudaDevAttrComputeCapabilityMinor: *value = EMU_ARCH / 10 % 10; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    default:
      fprintf(stderr, "emu: cudaDeviceGetAttribute(%d) is not there\n", (int)a);
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "emulator");
  p->multiProcessorCount = options.multiprocessors;
  p->major = EMU_ARCH / 100, p->minor = EMU_ARCH / 10 % 10;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->warpSize = 32, p->regsPerBlock = 65536;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t emu_func_set_attribute(const void* f, cudaFuncAttribute a, int value) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > (EMU_ARCH >= 900 ? 227 << 10 : 99 << 10)) {
      fprintf(stderr, "emu: cudaFuncSetAttribute: %d bytes of shared memory\n", value);
      return last_error = cudaErrorInvalidValue;
    }
    dynamic_limit[f] = value;
  }
  return cudaSuccess;
}
cudaError_t emu_func_get_attributes(cudaFuncAttributes* a, const void* f) {
  *a = {};
  a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->binaryVersion = EMU_ARCH / 10, a->ptxVersion = EMU_ARCH / 10;
  a->maxDynamicSharedSizeBytes = dynamic_limit.count(f) ? dynamic_limit[f] : 48 << 10;
  return cudaSuccess;
}
cudaError_t emu_occupancy(int* n, const void*, int threads, size_t smem) {
  *n = std::min<size_t>({32, 2048u / ((threads + 31) / 32 * 32), (228u << 10) / (smem + 1024)});
  if (options.per_sm) *n = std::min(*n, options.per_sm);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t n) { return *p = guarded(n, 256), cudaSuccess; }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) { return release(p), cudaSuccess; }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMemset(void* p, int v, size_t n) { return memset(p, v, n), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return cudaMemset(p, v, n); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { return memcpy(to, from, n), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind k, cudaStream_t) { return cudaMemcpy(to, from, n, k); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { return *s = cudaStreamCaptureStatusNone, cudaSuccess; }
