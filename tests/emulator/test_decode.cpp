// Attention problems against float64, on the emulator. See usage() below.
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "codebook.h"
#include "cuda/kernels.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "problem.h"

using namespace tq;

#if EMU_ARCH >= 900  // Hopper's prefill kernels are not emulated (Makefile)
namespace tq::cuda {
bool is_prefill(const AttentionProblem&) { return false; }
int64_t prefill_workspace(const AttentionProblem&, int) { return 0; }
cudaError_t launch_prefill(const AttentionProblem&, void*, int, cudaStream_t) { return cudaErrorInvalidValue; }
std::atomic<int64_t> prefill_images;
}  // namespace tq::cuda
#endif

// ------------------------------------------------------------------------------------ random
struct Random {
  uint64_t s;
  explicit Random(uint64_t seed) : s(seed + 0x1234567) { s = bits() ^ bits() << 7; s = bits(); }
  uint64_t bits() {
    uint64_t z = (s += 0x9E3779B97F4A7C15ull);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  int to(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }  // 0 .. n - 1
  int in(int a, int b) { return a + to(b - a + 1); }
  bool chance(double p) { return uniform() < p; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * M_PI * uniform()); }
  template <class T> T pick(std::initializer_list<T> v) { return v.begin()[to(static_cast<int>(v.size()))]; }
};

// -------------------------------------------------------------------------------------- cases
struct Case {
  int B = 1, Hq = 4, Hkv = 1, Lq = 1, Lkv = 100, D = 128;
  int dtype = 2;   // 0 f32, 1 f16, 2 bf16
  int ndtype = 2;  // of the norms: 0 f32, 2 bf16; 3: keys bf16, values f32
  int mask = 0;    // 1 [B], 2 broadcast over B, 3 strided; percent visible in `density`; 4 documents of 300 keys, one after the other
  int density = 70;
  int causal = 0;
  int kvlen = 0;   // 1 int32 per row, 2 int64 per row, 3 one for all (stride 0), 4 with 0, > Lkv, < 0; 5: `fixedlen`
  int fixedlen = -1;
  int kvstart = 0; // the same
  float softcap = 0;
  int sinks = 0;   // 1 f32, 2 f16, 3 bf16
  int lse = 1;
  float scale = 0; // 0: 1 / sqrt(D)
  int sms = 4;
  int qlayout = 0; // 1 [B, Lq, H, D], 2 last stride 2, 3 base off by one element, 4 rows padded by 3 elements
  int olayout = 0;
  int packed = 0;  // 0 capacity rounded up to 8 positions, 9 exact, 1 more capacity, 2 rows padded, 3 [B, L, H, D/2], 4 last stride 2, 5 base off by 4 bytes, 6 broadcast over B, 7 over H, 8 base off by 1
  int norms = 0;   // 0 capacity rounded up to 8, 9 exact, 8 more but a multiple of 8, 1 more capacity, 2 stride 2, 3 [B, L, H], 5 base off by an element, 6 broadcast over B, 7 over H
  int wild = 0;    // 1 norms of all sizes, 2 large norms of keys, 3 NaN norms wherever hidden, 4 zero queries, 5 queries of all sizes, 6 some NaN norms, 7 some NaN queries: rows that see them must be NaN, the others right, 8 some norms far from the others
  int general = 0; // call launch_general
  int prefill = 0; // fail if it does not go to the prefill kernels
  int images = 1 << 17;  // KB that these may have in the workspace
  int seed = 1;

  template <class F>
  void fields(F f) {
    f("B", B), f("Hq", Hq), f("Hkv", Hkv), f("Lq", Lq), f("Lkv", Lkv), f("D", D), f("dtype", dtype), f("ndtype", ndtype);
    f("mask", mask), f("density", density), f("causal", causal), f("kvlen", kvlen), f("fixedlen", fixedlen), f("kvstart", kvstart);
    f("softcap", softcap), f("sinks", sinks), f("lse", lse), f("scale", scale), f("sms", sms), f("qlayout", qlayout);
    f("olayout", olayout), f("packed", packed), f("norms", norms), f("wild", wild), f("general", general), f("prefill", prefill), f("images", images), f("seed", seed);
  }
  std::string text() {
    std::ostringstream s;
    Case standard;
    std::map<std::string, double> usual;
    standard.fields([&](const char* name, auto& v) { usual[name] = v; });
    int i = 0;
    fields([&](const char* name, auto& v) {
      if (i++ < 6 || usual[name] != v) s << (i > 1 ? " " : "") << name << "=" << v;
    });
    return s.str();
  }
};

size_t size_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }
void put(void* p, Dtype d, int64_t i, double x) {
  if (d == Dtype::f32) static_cast<float*>(p)[i] = static_cast<float>(x);
  else if (d == Dtype::f16) static_cast<__half*>(p)[i] = __float2half(static_cast<float>(x));
  else static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(static_cast<float>(x));
}
double get(const void* p, Dtype d, int64_t i) {
  if (d == Dtype::f32) return static_cast<const float*>(p)[i];
  if (d == Dtype::f16) return __half2float(static_cast<const __half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

struct Buffers {
  std::vector<void*> inputs, outputs;
  ~Buffers() {
    for (void* p : inputs) emu::protect(p, false), emu::release(p);
    for (void* p : outputs) emu::release(p);
  }
  // Of exactly this many bytes: an access after the end faults. `shift`: bytes that the tensor starts after an aligned address.
  char* make(size_t bytes, bool input, size_t shift = 0) {
    char* p = static_cast<char*>(emu::guarded(std::max<size_t>(1, bytes + shift), 16));
    (input ? inputs : outputs).push_back(p);
    return p + shift;
  }
  void freeze() { for (void* p : inputs) emu::protect(p, true); }
};

int64_t extent(const int64_t (&size)[4], const int64_t (&stride)[4]) {  // elements from the first to behind the last
  int64_t e = 1;
  for (int i = 0; i < 4; ++i) {
    if (size[i] == 0) return 0;
    e += (size[i] - 1) * stride[i];
  }
  return e;
}

struct Problem {
  Case c;
  Buffers memory;
  AttentionProblem p{};
  int64_t out_extent = 0, out_base = 0;
  std::vector<double> want, want_lse, row_spread;  // [B, Hq, Lq, D], [B, Hq, Lq] twice
  double spread = 1;

  View tensor(Dtype dtype, size_t element, int64_t B, int64_t H, int64_t S, int64_t n, int layout, bool input, int64_t* all = nullptr) {
    View v;
    v.dtype = dtype;
    const int64_t size[4] = {B, H, S, n};
    int64_t* t = v.stride;
    switch (layout) {
      case 1: t[3] = 1, t[2] = n, t[1] = S * n, t[0] = H * S * n; break;
      default: t[3] = 1, t[2] = n, t[1] = S * n, t[0] = H * S * n;
    }
    (void)layout;
    const int64_t e = extent(size, v.stride);
    v.data = memory.make(static_cast<size_t>(e) * element, input);
    if (all) *all = e;
    return v;
  }

  View place(Dtype dtype, size_t element, const int64_t (&size)[4], const int64_t (&stride)[4], size_t shift, bool input, int64_t* all = nullptr) {
    View v;
    v.dtype = dtype;
    std::copy(stride, stride + 4, v.stride);
    const int64_t e = extent(size, stride);
    v.data = memory.make(static_cast<size_t>(e) * element, input, shift);
    if (all) *all = e;
    return v;
  }

  View query_like(int layout, bool input, int64_t* all = nullptr) {
    const Dtype dtype = static_cast<Dtype>(c.dtype);
    const int64_t H = c.Hq, L = c.Lq, D = c.D, size[4] = {c.B, H, L, D};
    switch (layout) {
      case 1: return place(dtype, size_of(dtype), size, {L * H * D, D, H * D, 1}, 0, input, all);
      case 2: return place(dtype, size_of(dtype), size, {H * L * D * 2, L * D * 2, D * 2, 2}, 0, input, all);
      case 3: return place(dtype, size_of(dtype), size, {H * L * D, L * D, D, 1}, size_of(dtype), input, all);
      case 4: return place(dtype, size_of(dtype), size, {H * L * (D + 3), L * (D + 3), D + 3, 1}, 0, input, all);
      default: return place(dtype, size_of(dtype), size, {H * L * D, L * D, D, 1}, 0, input, all);
    }
  }
  View packed_like() {
    const int64_t B = c.B, H = c.Hkv, L = c.Lkv, n = c.D / 2, size[4] = {B, H, L, n};
    const Dtype d = Dtype::f32;
    switch (c.packed) {
      case 1: { const int64_t cap = (L + 16) / 16 * 16 + 16; return place(d, 1, size, {H * cap * n, cap * n, n, 1}, 0, true); }
      case 2: return place(d, 1, size, {H * L * (n + 4), L * (n + 4), n + 4, 1}, 0, true);
      case 3: return place(d, 1, size, {L * H * n, n, H * n, 1}, 0, true);
      case 4: return place(d, 1, size, {H * L * n * 2, L * n * 2, n * 2, 2}, 0, true);
      case 5: return place(d, 1, size, {H * L * n, L * n, n, 1}, 4, true);
      case 6: return place(d, 1, size, {0, L * n, n, 1}, 0, true);
      case 7: return place(d, 1, size, {L * n, 0, n, 1}, 0, true);
      case 8: return place(d, 1, size, {H * L * n, L * n, n, 1}, 1, true);
      case 9: return place(d, 1, size, {H * L * n, L * n, n, 1}, 0, true);
      default: { const int64_t cap = (L + 7) / 8 * 8; return place(d, 1, size, {H * cap * n, cap * n, n, 1}, 0, true); }
    }
  }
  View norms_like(Dtype d) {
    const int64_t B = c.B, H = c.Hkv, L = c.Lkv, size[4] = {B, H, L, 1};
    const size_t e = size_of(d);
    switch (c.norms) {
      case 1: { const int64_t cap = L + 37; return place(d, e, size, {H * cap, cap, 1, 1}, 0, true); }
      case 2: return place(d, e, size, {H * L * 2, L * 2, 2, 1}, 0, true);
      case 3: return place(d, e, size, {L * H, 1, H, 1}, 0, true);
      case 5: return place(d, e, size, {H * L, L, 1, 1}, e, true);
      case 6: return place(d, e, size, {0, L, 1, 1}, 0, true);
      case 7: return place(d, e, size, {L, 0, 1, 1}, 0, true);
      case 8: { const int64_t cap = L / 8 * 8 + 24; return place(d, e, size, {H * cap, cap, 1, 1}, 0, true); }
      case 9: return place(d, e, size, {H * L, L, 1, 1}, 0, true);
      default: { const int64_t cap = (L + 7) / 8 * 8; return place(d, e, size, {H * cap, cap, 1, 1}, 0, true); }
    }
  }
  Integers lengths(int kind, Random& r, bool start) {
    Integers n;
    if (!kind) return n;
    n.wide = kind == 2 || kind == 4;
    const bool one = kind == 3 || kind == 5;
    n.stride[0] = one ? 0 : 1;
    const int count = one ? 1 : c.B;
    char* p = memory.make(static_cast<size_t>(count) * (n.wide ? 8 : 4), true);
    for (int b = 0; b < count; ++b) {
      int64_t v = start ? (r.chance(.3) ? 0 : r.to(c.Lkv / (r.chance(.7) ? 3 : 1) + 1)) : r.in(0, c.Lkv);
      if (!start && r.chance(.2)) v = c.Lkv;
      if (kind == 4 && r.chance(.5)) v = r.pick<int64_t>({0, -3, c.Lkv + 5, int64_t{1} << 40, c.Lkv, 1});
      if (kind == 5) v = c.fixedlen;
      if (n.wide) reinterpret_cast<int64_t*>(p)[b] = v;
      else reinterpret_cast<int32_t*>(p)[b] = static_cast<int32_t>(v);
    }
    n.data = p;
    return n;
  }
  static double at(const View& v, int64_t b, int64_t h, int64_t s, int64_t d) {
    return get(v.data, v.dtype, b * v.stride[0] + h * v.stride[1] + s * v.stride[2] + d * v.stride[3]);
  }
  static uint8_t byte_at(const View& v, int64_t b, int64_t h, int64_t s, int64_t d) {
    return static_cast<uint8_t*>(v.data)[b * v.stride[0] + h * v.stride[1] + s * v.stride[2] + d * v.stride[3]];
  }

  explicit Problem(const Case& of) : c(of) {
    Random r(static_cast<uint64_t>(c.seed));
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Lq = c.Lq, p.Lkv = c.Lkv, p.D = c.D;
    p.query = query_like(c.qlayout, true);
    p.out = query_like(c.olayout, false, &out_extent);
    p.k_packed = packed_like(), p.v_packed = packed_like();
    for (const View* v : {&p.k_packed, &p.v_packed})
      for (int64_t b = 0; b < c.B; ++b) for (int64_t h = 0; h < c.Hkv; ++h) for (int64_t s = 0; s < c.Lkv; ++s) for (int64_t d = 0; d < c.D / 2; ++d)
        static_cast<uint8_t*>(v->data)[b * v->stride[0] + h * v->stride[1] + s * v->stride[2] + d * v->stride[3]] = static_cast<uint8_t>(r.bits() >> 56);
    p.k_norms = norms_like(c.ndtype == 0 ? Dtype::f32 : Dtype::bf16);
    p.v_norms = norms_like(c.ndtype == 0 || c.ndtype == 3 ? Dtype::f32 : Dtype::bf16);
    p.kv_len = lengths(c.kvlen, r, false), p.kv_start = lengths(c.kvstart, r, true);
    p.causal = c.causal, p.softcap = c.softcap;
    p.scale = c.scale == 0 ? 1 / std::sqrt(static_cast<float>(c.D)) : c.scale;
    if (c.mask) {
      const int64_t size[4] = {c.mask == 2 ? 1 : c.B, 1, c.Lq, c.Lkv};
      const int64_t last = c.mask == 3 ? 3 : 1, row = c.Lkv * last + (c.mask == 3 ? 5 : 0);
      p.mask = place(Dtype::f32, 1, size, {c.mask == 2 ? 0 : c.Lq * row, 0, row, last}, c.mask == 3 ? 1 : 0, true);
      auto* m = static_cast<uint8_t*>(p.mask.data);
      for (int64_t b = 0; b < size[0]; ++b) for (int64_t i = 0; i < c.Lq; ++i) {
        const double density = r.chance(.1) ? 0 : c.density / 100.0;
        for (int64_t j = 0; j < c.Lkv; ++j) m[b * p.mask.stride[0] + i * row + j * last] = c.mask == 4 ? j / 300 == (c.Lkv - c.Lq + i) / 300 : r.chance(density);
      }
    }
    // Values.
    for (int64_t b = 0; b < c.B; ++b) for (int64_t h = 0; h < c.Hq; ++h) for (int64_t i = 0; i < c.Lq; ++i) {
      double size = 1;
      if (c.wild == 4 && r.chance(.4)) size = 0;
      const int broken = r.chance(.2) ? r.to(c.D) : -1;
      if (c.wild == 5) size = c.dtype == 1 ? std::exp2(r.in(-10, 8)) : std::exp2(r.in(-60, 40));
      for (int64_t d = 0; d < c.D; ++d)
        put(p.query.data, p.query.dtype, b * p.query.stride[0] + h * p.query.stride[1] + i * p.query.stride[2] + d * p.query.stride[3], c.wild == 7 && d == broken ? NAN : r.normal() * size);
      sizes.push_back(size);
    }
    const double hidden = c.wild == 3 ? r.pick<double>({NAN, NAN, INFINITY, 1e4, -3e38, -INFINITY}) : NAN;
    for (int64_t b = 0; b < c.B; ++b) for (int64_t h = 0; h < c.Hkv; ++h) for (int64_t s = 0; s < c.Lkv; ++s) {
      double k = std::sqrt(static_cast<double>(c.D)) * (.5 + r.uniform()), v = std::sqrt(static_cast<double>(c.D)) * (.5 + r.uniform());
      if (c.wild == 1) {
        if (r.chance(.1)) k = 0;
        if (r.chance(.1)) v = 0;
        v *= std::exp2(r.in(-30, c.dtype == 1 ? 6 : 30));
        if (r.chance(.1)) v *= 0x1p-90;
      }
      if (c.wild == 2) k *= 6;
      if (c.wild == 8) {
        if (r.chance(.1)) k *= std::exp2(r.in(-14, 2)) * (r.chance(.2) ? -1 : 1);
        if (r.chance(.1)) v *= std::exp2(r.in(-14, 14)) * (r.chance(.2) ? -1 : 1);
        if (r.chance(.02)) v = 0;
      }
      if (c.wild == 5) k *= std::exp2(-40);
      bool seen = s < p.length(b);
      if (c.wild == 3 && seen) {
        seen = s >= p.start(b);
        if (seen && (p.mask || p.causal)) {
          bool any = false;
          for (int64_t i = 0; i < c.Lq; ++i) any |= visible(b, i, s);
          seen = any;
        }
      }
      if (!seen) k = v = hidden;
      if (c.wild == 6 && r.chance(.02)) (r.chance(.5) ? k : v) = NAN;
      if (c.norms == 6 && b > 0) continue;  // shared: batch row 0 decides
      if (c.norms == 7 && h > 0) continue;
      if (c.norms == 6 || c.norms == 7) if (!seen) k = 3 * (c.wild == 5 ? 0x1p-40 : 1), v = 3;
      put(p.k_norms.data, p.k_norms.dtype, b * p.k_norms.stride[0] + h * p.k_norms.stride[1] + s * p.k_norms.stride[2], k);
      put(p.v_norms.data, p.v_norms.dtype, b * p.v_norms.stride[0] + h * p.v_norms.stride[1] + s * p.v_norms.stride[2], v);
    }
    if (c.sinks) {
      p.sinks.dtype = static_cast<Dtype>(c.sinks - 1);
      p.sinks.stride[1] = r.chance(.3) ? 2 : 1;
      p.sinks.data = memory.make(static_cast<size_t>((c.Hq - 1) * p.sinks.stride[1] + 1) * size_of(p.sinks.dtype), true);
      for (int h = 0; h < c.Hq; ++h) put(p.sinks.data, p.sinks.dtype, h * p.sinks.stride[1], r.chance(.1) ? -INFINITY : r.normal() * 2);
    }
    if (c.lse) p.lse = reinterpret_cast<float*>(memory.make(static_cast<size_t>(c.B * c.Hq * c.Lq) * 4, false));
    static std::map<int, std::vector<float>> rotations;
    auto& rotation = rotations[c.D];
    if (rotation.empty()) {
      Random q(static_cast<uint64_t>(c.D) + 999);
      for (int i = 0; i < c.D * c.D; ++i) rotation.push_back(static_cast<float>(q.normal() / std::sqrt(static_cast<double>(c.D))));
    }
    float* pi = reinterpret_cast<float*>(memory.make(rotation.size() * 4, true, c.packed == 5 ? 4 : 0));
    std::copy(rotation.begin(), rotation.end(), pi);
    p.rotation = pi;
    const Codebook book = codebook(c.D);
    float* centroids = reinterpret_cast<float*>(memory.make(64, true));
    std::copy(book.centroids.begin(), book.centroids.end(), centroids);
    p.centroids = centroids;
    reference();
    memory.freeze();
  }
  std::vector<double> sizes;  // of the queries

  bool visible(int64_t b, int64_t i, int64_t s) const {
    const int64_t n = p.length(b);
    if (s >= n || s < p.start(b)) return false;
    if (p.causal && s > n - p.Lq + i) return false;
    return !p.mask || static_cast<const uint8_t*>(p.mask.data)[b * p.mask.stride[0] + i * p.mask.stride[2] + s * p.mask.stride[3]];
  }

  void reference() {
    const int64_t D = c.D, G = c.Hq / c.Hkv;
    want.assign(static_cast<size_t>(c.B * c.Hq * c.Lq * D), 0);
    want_lse.assign(static_cast<size_t>(c.B * c.Hq * c.Lq), -INFINITY);
    std::vector<double> pi(p.rotation, p.rotation + D * D), k(static_cast<size_t>(c.Lkv * D)), v(k.size()), q(static_cast<size_t>(D)), sum(q.size()), score(static_cast<size_t>(c.Lkv) + 1);
    double squares = 0, count = 0;
    row_spread.assign(want_lse.size(), 1);
    for (int64_t b = 0; b < c.B; ++b) for (int64_t h = 0; h < c.Hkv; ++h) {
      const int64_t n = p.length(b);
      for (int64_t s = 0; s < n; ++s) {
        const double kn = at(p.k_norms, b, h, s, 0), vn = at(p.v_norms, b, h, s, 0);
        for (int64_t d = 0; d < D; ++d) {
          const uint8_t kb = byte_at(p.k_packed, b, h, s, d / 2), vb = byte_at(p.v_packed, b, h, s, d / 2);
          k[static_cast<size_t>(s * D + d)] = kn * p.centroids[d % 2 ? kb & 15 : kb >> 4];
          v[static_cast<size_t>(s * D + d)] = vn * p.centroids[d % 2 ? vb & 15 : vb >> 4];
        }
      }
      for (int64_t hq = h * G; hq < (h + 1) * G; ++hq) for (int64_t i = 0; i < c.Lq; ++i) {
        for (int64_t d = 0; d < D; ++d) {
          double x = 0;
          for (int64_t e = 0; e < D; ++e) x += pi[static_cast<size_t>(d * D + e)] * at(p.query, b, hq, i, e);
          q[static_cast<size_t>(d)] = x;
        }
        double most = p.sinks ? get(p.sinks.data, p.sinks.dtype, hq * p.sinks.stride[1]) : -INFINITY;
        double row_squares = 0, row_count = 0;
        for (int64_t s = 0; s < n; ++s) {
          double x = -INFINITY;
          if (visible(b, i, s)) {
            x = 0;
            for (int64_t d = 0; d < D; ++d) x += q[static_cast<size_t>(d)] * k[static_cast<size_t>(s * D + d)];
            x *= p.scale;
            if (x == x) squares += x * x, ++count, row_squares += x * x, ++row_count;
            if (p.softcap != 0) x = p.softcap * std::tanh(x / p.softcap);
          }
          score[static_cast<size_t>(s)] = x;
          most = std::max(most, x);
        }
        const int64_t row = (b * c.Hq + hq) * c.Lq + i;
        if (row_count > 0) row_spread[static_cast<size_t>(row)] = std::max(1.0, std::sqrt(row_squares / row_count));
        {  // what a score's size may be: one that happens to be small has the same error
          double q2 = 0, k2 = 0;
          for (double x : q) q2 += x * x;
          for (int64_t s = 0; s < n; ++s) if (score[static_cast<size_t>(s)] > -INFINITY) k2 = std::max(k2, std::fabs(at(p.k_norms, b, h, s, 0)));
          const double size = std::fabs(p.scale) * std::sqrt(q2 / static_cast<double>(D)) * k2;
          if (size < 1e30) row_spread[static_cast<size_t>(row)] = std::max(row_spread[static_cast<size_t>(row)], size);
        }
        if (c.softcap != 0) row_spread[static_cast<size_t>(row)] = std::max(1.0, std::min<double>(row_spread[static_cast<size_t>(row)], c.softcap));
        if (most == -INFINITY) continue;
        double total = p.sinks ? std::exp(get(p.sinks.data, p.sinks.dtype, hq * p.sinks.stride[1]) - most) : 0;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t s = 0; s < n; ++s) {
          if (score[static_cast<size_t>(s)] == -INFINITY) continue;
          const double w = std::exp(score[static_cast<size_t>(s)] - most);
          total += w;
          for (int64_t d = 0; d < D; ++d) sum[static_cast<size_t>(d)] += w * v[static_cast<size_t>(s * D + d)];
        }
        want_lse[static_cast<size_t>(row)] = most + std::log(total);
        for (int64_t e = 0; e < D; ++e) {
          double x = 0;
          for (int64_t d = 0; d < D; ++d) x += pi[static_cast<size_t>(d * D + e)] * sum[static_cast<size_t>(d)];
          want[static_cast<size_t>(row * D + e)] = x / total;
        }
      }
    }
    spread = std::max(1.0, count > 0 ? std::sqrt(squares / count) : 0.0);
    if (c.softcap != 0) spread = std::max(1.0, std::min<double>(spread, c.softcap));
  }

  // Runs it and judges the result: the worst row's error; < 0 for a failure.
  bool run(double* worst_row, double* worst_lse) {
    using namespace cuda;
    bool good = true;
    const long errors_before = emu::errors;
    emu::options.multiprocessors = c.sms;
    prefill_images = int64_t{c.images} << 10;
    if (c.prefill && !is_prefill(p)) return printf("  not for the prefill kernels\n"), false;
    int64_t bytes = 0;
#ifdef HAVE_GENERAL
    if (c.general) bytes = general_workspace(p, c.sms);
#endif
#ifdef HAVE_ATTENTION
    if (!c.general) bytes = attention_workspace(p, c.sms);
#endif
    if (bytes < 0) return printf("  workspace of %lld bytes\n", (long long)bytes), false;
    char* workspace = static_cast<char*>(emu::guarded(static_cast<size_t>(std::max<int64_t>(bytes, 1)), 16));
    const size_t element = size_of(p.out.dtype), out_bytes = static_cast<size_t>(out_extent) * element, lse_bytes = p.lse ? want_lse.size() * 4 : 0;
    std::vector<char> first_out, first_lse;
    const char* runs_text = getenv("EMU_RUNS");
    const int runs = runs_text ? atoi(runs_text) : 2;
    *worst_row = *worst_lse = 0;
    for (int run = 0; run < runs; ++run) {
      emu::set_seed(static_cast<uint64_t>(c.seed) * 131 + static_cast<uint64_t>(run) + emu::options.seed * 7919);
      if (run == 2) for (int64_t i = 0; i < bytes; ++i) workspace[i] = static_cast<char>(rand());
      // run 0: workspace of 0xFF; run 1: what run 0 left
      memset(p.out.data, 0xFF, out_bytes);
      if (p.lse) memset(p.lse, 0xFF, lse_bytes);
      cudaError_t error = cudaSuccess;
#ifdef HAVE_GENERAL
      if (c.general) error = launch_general(p, workspace, c.sms, nullptr);
#endif
#ifdef HAVE_ATTENTION
      if (!c.general) error = launch_attention(p, workspace, c.sms, nullptr);
#endif
      if (error != cudaSuccess) {
        printf("  launch: %s\n", cudaGetErrorString(error));
        good = false;
        break;
      }
      if (run == 0) {
        good &= judge(worst_row, worst_lse);
        const char* o = static_cast<char*>(p.out.data);
        first_out.assign(o, o + out_bytes);
        if (p.lse) first_lse.assign(reinterpret_cast<char*>(p.lse), reinterpret_cast<char*>(p.lse) + lse_bytes);
      } else if (memcmp(first_out.data(), p.out.data, out_bytes) || (p.lse && memcmp(first_lse.data(), p.lse, lse_bytes))) {
        int64_t differ = 0;
        for (size_t i = 0; i < out_bytes; ++i) differ += first_out[i] != static_cast<char*>(p.out.data)[i];
        printf("  run %d (other schedule, workspace left over) gives other bits: %lld bytes of %zu\n", run, (long long)differ, out_bytes);
        double a, b;
        judge(&a, &b);
        good = false;
      }
    }
    emu::release(workspace);
    if (emu::errors != errors_before) {
      printf("  the emulator reported %ld errors\n", emu::errors - errors_before);
      good = false;
    }
    return good;
  }

  bool judge(double* worst_row, double* worst_lse) {
    int bad = 0;
    std::vector<char> touched(static_cast<size_t>(out_extent), 0);
    const bool prefill = !c.general && cuda::is_prefill(p);  // keys are rounded to fp16 once more
    const double cap = c.softcap, floor = c.dtype == 1 ? 0x1p-25 * std::sqrt(static_cast<double>(c.D)) : 0;  // f16 underflow
    for (int64_t b = 0; b < c.B; ++b) for (int64_t h = 0; h < c.Hq; ++h) for (int64_t i = 0; i < c.Lq; ++i) {
      const int64_t row = (b * c.Hq + h) * c.Lq + i;
      const double spread = row_spread[static_cast<size_t>(row)], bound = (c.dtype == 0 ? 1e-5 : c.dtype == 1 ? prefill ? 4e-3 : 2e-3 : 6e-3) * spread;
      double error = 0, size = 0, got_size = 0;
      bool finite = true, k_broken = false, v_broken = false;
      if (c.wild == 6) for (int64_t s = 0; s < p.length(b); ++s)
        if (visible(b, i, s)) {
          const int64_t hk = h / (c.Hq / c.Hkv);
          if (!std::isfinite(at(p.k_norms, b, hk, s, 0))) k_broken = true;
          if (!std::isfinite(at(p.v_norms, b, hk, s, 0))) v_broken = true;
        }
      if (c.wild == 7) {
        bool any = false;
        for (int64_t s = 0; s < p.length(b); ++s) any |= visible(b, i, s);
        for (int64_t d = 0; d < c.D; ++d) if (any && !std::isfinite(at(p.query, b, h, i, d))) k_broken = true;
      }
      const bool skip = k_broken || v_broken;
      int nans = 0;
      for (int64_t d = 0; d < c.D; ++d) {
        const int64_t place = b * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2] + d * p.out.stride[3];
        touched[static_cast<size_t>(place)] = 1;
        const double got = get(p.out.data, p.out.dtype, place), w = want[static_cast<size_t>(row * c.D + d)];
        nans += got != got;
        if (skip) continue;
        if (!std::isfinite(got)) finite = false;
        error += (got - w) * (got - w), size += w * w, got_size += got * got;
      }
      const double l = want_lse[static_cast<size_t>(row)];
      if (skip) {
        const bool lse_nan = p.lse && p.lse[row] != p.lse[row];
        if (nans != c.D || (p.lse && lse_nan != k_broken)) {
          if (++bad <= 6)
            printf("  row b%lld h%lld i%lld sees a NaN %s: %d of %d numbers are NaN, lse %g\n", (long long)b, (long long)h, (long long)i,
                   k_broken ? "score" : "value", nans, c.D, p.lse ? p.lse[row] : 0.0f);
        }
        continue;
      }
      const bool nothing = size == 0;
      const double relative = nothing ? (got_size == 0 ? 0 : INFINITY) : std::max(0.0, std::sqrt(error) - floor) / std::sqrt(size);
      double lse_error = 0, lse_bound = 1e-5 + 2e-6 * std::fabs(l) + (c.dtype == 0 || c.general ? 2e-6 * spread : 2e-3 * spread);
      if (prefill) lse_bound *= 2;
      if (c.dtype == 0 || c.general) lse_bound += 3e-6 * std::fabs(l);
      (void)cap;
      if (l == -INFINITY) lse_bound = 0;
      if (p.lse) {
        const double got = p.lse[row];
        lse_error = l == -INFINITY ? (got == -INFINITY ? 0 : INFINITY) : std::fabs(got - l);
        if (got != got) lse_error = INFINITY;
      }
      *worst_row = std::max(*worst_row, finite ? relative : INFINITY);
      *worst_lse = std::max(*worst_lse, lse_error);
      if (!finite || !(relative <= bound) || !(lse_error <= lse_bound)) {
        if (++bad <= 6) {
          int keys = 0;
          for (int64_t s = 0; s < p.length(b); ++s) keys += visible(b, i, s);
          printf("  row b%lld h%lld i%lld (sees %d of %lld keys, start %lld): error %.3g (bound %.3g)%s, sizes want %.4g got %.4g, lse want %.6g got %.6g (bound %.2g)\n",
                 (long long)b, (long long)h, (long long)i, keys, (long long)p.length(b), (long long)p.start(b), relative, bound, finite ? "" : " NOT FINITE",
                 std::sqrt(size), std::sqrt(got_size), l, p.lse ? p.lse[row] : NAN, lse_bound);
        }
      }
    }
    if (bad > 6) printf("  ... %d rows of %lld are wrong\n", bad, (long long)(c.B * c.Hq * c.Lq));
    const size_t element = size_of(p.out.dtype);
    for (int64_t e = 0; e < out_extent; ++e)
      if (!touched[static_cast<size_t>(e)])
        for (size_t j = 0; j < element; ++j)
          if (static_cast<unsigned char*>(p.out.data)[static_cast<size_t>(e) * element + j] != 0xFF) {
            printf("  wrote into a gap of the output at element %lld\n", (long long)e);
            return false;
          }
    return bad == 0;
  }
};

// --------------------------------------------------------------------------------------- driver
bool verbose = true;

bool run_case(Case& c, int index) {
  timespec t0, t1;
  clock_gettime(CLOCK_MONOTONIC, &t0);
  printf("[%d] %s\n", index, c.text().c_str());
  fflush(stdout);
  Problem problem(c);
  double row = 0, lse = 0;
  const bool good = problem.run(&row, &lse);
  clock_gettime(CLOCK_MONOTONIC, &t1);
  if (!good) printf("[%d] FAIL %s\n", index, c.text().c_str());
  printf("[%d] %s error %.2e lse %.1e spread %.1f  %.2f s  %s\n", index, good ? "ok  " : "FAIL", row, lse, problem.spread,
         static_cast<double>(t1.tv_sec - t0.tv_sec) + 1e-9 * static_cast<double>(t1.tv_nsec - t0.tv_nsec),
         emu::largest_kernel().c_str());
  fflush(stdout);
  return good;
}

// In child processes, so that a crash costs one case.
int run_all(std::vector<Case>& cases) {
  struct Shared { int at[16], failed; };
  auto* shared = static_cast<Shared*>(mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const int jobs = getenv("EMU_JOBS") ? std::min(16, atoi(getenv("EMU_JOBS"))) : 1;
  const bool stop = getenv("EMU_STOP") != nullptr;
  std::vector<std::string> crashed;
  fflush(stdout);
  std::map<pid_t, int> job_of;
  const auto start = [&](int job, int from) {
    const pid_t child = fork();
    if (child == 0) {
      for (int i = from; i < static_cast<int>(cases.size()); i += jobs) {
        shared->at[job] = i;
        if (!run_case(cases[static_cast<size_t>(i)], i)) {
          __atomic_fetch_add(&shared->failed, 1, __ATOMIC_SEQ_CST);
          if (stop) _exit(1);
        }
      }
      shared->at[job] = static_cast<int>(cases.size());
      fflush(stdout);
      _exit(0);
    }
    job_of[child] = job;
  };
  for (int j = 0; j < jobs; ++j) start(j, j);
  while (!job_of.empty()) {
    int status;
    const pid_t child = wait(&status);
    if (!job_of.count(child)) continue;
    const int job = job_of[child];
    job_of.erase(child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 1) continue;  // stopped
    const int i = shared->at[job];
    printf("[%d] CRASH (status %x): %s\n", i, status, cases[static_cast<size_t>(i)].text().c_str());
    fflush(stdout);
    crashed.push_back(cases[static_cast<size_t>(i)].text());
    if (!stop && crashed.size() < 50) start(job, i + jobs);
  }
  printf("== %zu cases, %d wrong, %zu crashed\n", cases.size(), shared->failed, crashed.size());
  return shared->failed || !crashed.empty();
}

const int kDims[] = {64, 80, 96, 128, 192, 256, 512};

Case random_case(uint64_t seed, int index, bool general) {
  Random r(seed * 1000003 + static_cast<uint64_t>(index));
  Case c;
  c.seed = static_cast<int>(r.bits() % 1000000);
  c.general = general;
  c.D = kDims[r.to(7)];
  if (general) c.D = r.chance(.3) ? kDims[r.to(7)] : 2 * r.in(8, r.chance(.2) ? 256 : 80);
  c.dtype = general ? r.to(3) : r.in(1, 2);
  c.ndtype = general ? r.pick({2, 2, 0, 3}) : r.pick({2, 2, 2, 2, 2, 2, 2, 2, 0, 3});
  c.sms = r.in(1, 8);
  c.Hkv = r.pick({1, 1, 2, 3, 4});
  const int group = r.pick({1, 2, 3, 4, 4, 5, 7, 8, 16});
  c.Lq = r.chance(.5) ? 1 : r.chance(.7) ? r.in(2, 6) : r.in(7, 33);
  if (c.Lq > 6 && group > 5) c.Lq = 5;
  c.B = r.pick({1, 1, 1, 2, 3, 5});
  if (r.chance(.1)) c.B = r.in(6, 40), c.Lq = 1, c.Hkv = 1;
  c.Hq = c.Hkv * group;
  c.Lkv = r.chance(.3) ? r.in(0, 70) : r.chance(.6) ? r.in(30, 600) : r.in(300, 2500);
  // about 2 s at most
  while (static_cast<double>(c.B) * c.Hkv * c.Lkv * c.D * std::max(1, group * c.Lq / 8) > (general ? 2e6 : 4e6) && c.Lkv > 40) c.Lkv = c.Lkv * 2 / 3;
  while (static_cast<double>(c.B) * c.Hkv * group * c.Lq * c.D * c.D > 5e8 && (c.B > 1 || c.Lq > 1)) c.B > 1 ? c.B /= 2 : c.Lq /= 2;
  if (r.chance(.25)) c.mask = r.in(1, 3), c.density = r.pick({5, 50, 95});
  c.causal = r.chance(.4);
  if (r.chance(.5)) c.kvlen = r.in(1, 4);
  if (r.chance(.25)) c.kvstart = r.in(1, 4);
  if (r.chance(.2)) c.softcap = r.pick({1.0f, 20.0f, 50.0f});
  if (r.chance(.3)) c.sinks = r.in(1, 3);
  c.lse = r.chance(.8);
  if (r.chance(.15)) c.scale = r.pick({0.02f, 0.5f, -0.1f, 1.0f});
  if (r.chance(.4)) c.qlayout = r.in(1, 4);
  if (r.chance(.4)) c.olayout = r.in(1, 4);
  if (r.chance(.3)) c.packed = general ? r.in(1, 9) : r.pick({1, 1, 6, 7, 9});
  if (r.chance(.3)) c.norms = general ? r.pick({1, 2, 3, 5, 6, 7, 9}) : r.pick({8, 8, 8, 1, 2, 9});
  if (c.packed == 6 || c.packed == 7) c.norms = c.packed;
  if (r.chance(.35)) c.wild = r.in(1, 7);
  if ((c.norms == 6 || c.norms == 7) && (c.wild == 3 || c.wild == 6)) c.wild = 0;
  return c;
}

void usage() {
  printf(R"(emu_test MODE ...
  random N SEED [general]   random problems (case SEED INDEX [general]: one of them again)
  lengths D [general]       Lkv 1 .. 70, and 71 .. 300 in steps
  rows [D] [general]        Lq 1 .. 20 and 1, 2, 4, 5, 8, 16, 32 query heads per KV head
  ragged [D] [general]      many batch rows with lengths 0 .. 500
  batches [D] [general]     B * Hkv from below to far above the number of multiprocessors
  splits [D] [general]      one head over 1 .. 12 multiprocessors, many lengths
  options [D] [general]     every option by itself and in pairs
  prefill [D]               many rows: tiles, options by themselves and in pairs, splits, rounds
  shape NAME=VALUE ...      one problem; names as printed, e.g. B=2 Hq=8 Hkv=2 Lq=3 Lkv=100 D=128 causal=1 kvlen=1 sms=6
Environment: EMU_JOBS=2 processes; EMU_STOP=1 after the first failure; EMU_RUNS=2 runs of each problem (the bits must
be the same; the second on the workspace the first left, a third on random bytes); EMU_DTYPE=0|1|2 f32|f16|bf16 for all; EMU_SEED
other schedules; EMU_ORDER=fifo|random|warps|lanes|blocks|any; EMU_COPIES=now|random|late|any; EMU_VERBOSE=1 launches.
)");
}

int main(int argc, char** argv) {

  std::vector<std::string> args(argv + 1, argv + argc);
  bool general = false;
  for (auto it = args.begin(); it != args.end();)
    if (*it == "general") general = true, it = args.erase(it);
    else ++it;
  const auto number = [&](size_t i, int otherwise) { return i < args.size() ? atoi(args[i].c_str()) : otherwise; };
  if (args.empty()) return usage(), 2;
  const std::string mode = args[0];
  std::vector<Case> cases;
  int n = 0;
  const auto add = [&](Case c) {
    c.general = general;
    c.seed = ++n;
    cases.push_back(c);
  };
  if (mode == "random") {
    for (int i = 0; i < number(1, 60); ++i) cases.push_back(random_case(static_cast<uint64_t>(number(2, 1)), i, general));
  } else if (mode == "case") {
    cases.push_back(random_case(static_cast<uint64_t>(number(1, 1)), number(2, 0), general));
  } else if (mode == "lengths") {
    Case c;
    c.D = number(1, 128), c.Hq = 2, c.sms = 4;
    for (c.Lkv = 1; c.Lkv <= 300; c.Lkv += c.Lkv < 70 ? 1 : 7) c.dtype = 1 + c.Lkv % 2, c.Hq = 1 + c.Lkv % 5, add(c);
  } else if (mode == "rows") {
    Case c;
    c.D = number(1, 64);
    for (int g : {1, 2, 4, 5, 8, 16, 32})
      for (c.Lq = 1; c.Lq <= 20; ++c.Lq) {
        if (g >= 16 && c.Lq > 5 && c.Lq % 4) continue;
        c.Hq = g, c.causal = c.Lq % 2, c.Lkv = 45 + 3 * c.Lq, c.sms = 3 + c.Lq % 5, c.dtype = 1 + c.Lq / 2 % 2, add(c);
      }
  } else if (mode == "ragged") {
    Case c;
    for (int round = 0; round < 12; ++round) {
      c.D = number(1, kDims[round % 7]), c.B = std::initializer_list<int>{3, 7, 33, 40, 65, 5}.begin()[round % 6], c.Lkv = c.B > 20 ? 150 : 500, c.Hq = 2, c.Hkv = 1 + round % 2;
      c.kvlen = 1 + round % 2 + (round % 3 == 0 ? 2 : 0), c.kvstart = round % 4 == 3 ? 1 : 0, c.causal = round % 2, c.sms = 4 + round % 4, c.Lq = 1 + round % 3;
      if (c.D > 200) c.B = std::min(c.B, 7), c.Lkv = 200;
      if (c.kvlen == 3) c.kvlen = 4;
      add(c);
    }
  } else if (mode == "batches") {
    Case c;
    for (int sms : {1, 4, 6, 7})
      for (int heads : {1, 2, 3, 5, 6, 7, 8, 13, 20, 33}) {
        c.D = number(1, 64), c.sms = sms, c.B = heads % 2 ? heads : heads / 2, c.Hkv = heads % 2 ? 1 : 2, c.Hq = 2 * c.Hkv, c.Lkv = 60 + 37 * (heads % 4);
        if (heads > 10 && heads % 3 == 0) c.kvlen = 1;
        else c.kvlen = 0;
        add(c);
      }
  } else if (mode == "splits") {
    Case c;
    for (int sms = 1; sms <= 12; ++sms)
      for (int L : {1, 31, 33, 64, 513, 1000, 2100}) {
        c.D = number(1, 128), c.sms = sms, c.Lkv = L, c.Hq = 1 + L % 8, c.sinks = L % 4, c.Lq = sms % 3 == 0 ? 2 : 1, add(c);
        if (c.D > 200 && L == 1000) break;
      }
  } else if (mode == "options") {
    Case base;
    base.D = number(1, 128), base.B = 2, base.Hq = 6, base.Hkv = 2, base.Lq = 3, base.Lkv = 150, base.sms = 5, base.causal = 1;
    std::vector<std::function<void(Case&)>> options = {
        [](Case& c) { c.causal = 0; }, [](Case& c) { c.mask = 1; }, [](Case& c) { c.mask = 2; c.causal = 0; }, [](Case& c) { c.mask = 3; c.density = 5; },
        [](Case& c) { c.kvlen = 1; }, [](Case& c) { c.kvlen = 3; }, [](Case& c) { c.kvlen = 4; }, [](Case& c) { c.kvstart = 1; }, [](Case& c) { c.kvstart = 4; },
        [](Case& c) { c.softcap = 2; }, [](Case& c) { c.sinks = 1; }, [](Case& c) { c.sinks = 3; }, [](Case& c) { c.lse = 0; }, [](Case& c) { c.scale = -0.2f; },
        [](Case& c) { c.wild = 1; }, [](Case& c) { c.wild = 2; }, [](Case& c) { c.wild = 3; }, [](Case& c) { c.wild = 4; }, [](Case& c) { c.wild = 5; }, [](Case& c) { c.wild = 6; c.mask = 1; }, [](Case& c) { c.wild = 6; }, [](Case& c) { c.wild = 7; },
        [](Case& c) { c.ndtype = 0; }, [](Case& c) { c.ndtype = 3; }, [](Case& c) { c.Lkv = 0; }, [](Case& c) { c.kvlen = 5; c.fixedlen = 0; }, [](Case& c) { c.Lq = 40; c.Lkv = 20; },
        [](Case& c) { c.qlayout = 1; c.olayout = 1; }, [](Case& c) { c.qlayout = 2; c.olayout = 4; }, [](Case& c) { c.qlayout = 3; c.olayout = 3; }, [](Case& c) { c.packed = 1; c.norms = 8; },
        [](Case& c) { c.packed = 6; c.norms = 6; }, [](Case& c) { c.packed = 7; c.norms = 7; }, [](Case& c) { c.norms = 2; }, [](Case& c) { c.norms = 5; }};
    for (auto& o : options) { Case c = base; o(c); add(c); }
    for (size_t i = 0; i < options.size(); ++i)
      for (size_t j = i + 1; j < options.size(); j += 3) {
        Case c = base;
        options[i](c), options[j](c);
        c.dtype = 1 + static_cast<int>(i + j) % 2;
        if ((c.wild == 3 || c.wild == 6) && (c.norms == 6 || c.norms == 7)) continue;
        add(c);
      }
  } else if (mode == "prefill") {
    Case base;
    base.prefill = 1, base.B = 2, base.Hq = 6, base.Hkv = 2, base.Lq = 65, base.Lkv = 300, base.sms = 3, base.causal = 1;
    const std::vector<std::function<void(Case&)>> options = {
        [](Case&) {}, [](Case& c) { c.causal = 0; }, [](Case& c) { c.kvlen = 1; }, [](Case& c) { c.kvlen = 4; c.kvstart = 4; }, [](Case& c) { c.kvstart = 1; },
        [](Case& c) { c.mask = 1; }, [](Case& c) { c.mask = 2; c.causal = 0; }, [](Case& c) { c.mask = 3; c.density = 5; }, [](Case& c) { c.softcap = 2; },
        [](Case& c) { c.mask = 4; c.Lkv = 700; c.Lq = 200; c.B = 1; }, [](Case& c) { c.mask = 4; c.Lkv = 700; c.causal = 0; c.wild = 3; }, [](Case& c) { c.sinks = 1; }, [](Case& c) { c.sinks = 3; c.lse = 0; }, [](Case& c) { c.scale = -0.2f; }, [](Case& c) { c.ndtype = 0; }, [](Case& c) { c.ndtype = 3; },
        [](Case& c) { c.wild = 1; }, [](Case& c) { c.wild = 8; c.dtype = 2; }, [](Case& c) { c.wild = 3; c.mask = 1; }, [](Case& c) { c.wild = 5; }, [](Case& c) { c.wild = 4; },
        [](Case& c) { c.Hq = 10; c.Lq = 39; c.qlayout = 1; c.olayout = 1; }, [](Case& c) { c.packed = 3; c.norms = 3; }, [](Case& c) { c.Lq = 200; c.Lkv = 90; },
        [](Case& c) { c.kvlen = 5; c.fixedlen = 0; }};
    for (int D : kDims) {
      if (args.size() > 1 && D != number(1, 0)) continue;
      const auto add_changed = [&](std::initializer_list<std::function<void(Case&)>> changes) {
        Case c = base;
        c.D = D, c.dtype = 1 + n % 2;
        if (D == 512) c.Hq = 2, c.Hkv = 1;
        for (auto& change : changes) change(c);
        add(c);
      };
      const int keys = D <= 128 ? 128 : 64, tile_kb = (D + 63) / 64 * keys / 4 + 2;
      for (size_t i = 0; i < options.size(); ++i) {
        add_changed({options[i]});
        // Room for one or two tiles of keys: windows, and sums of one tile of rows are carried.
        add_changed({options[i], [&](Case& c) { c.images = tile_kb * (1 + static_cast<int>(i) % 2); }});
        // Two kinds of options, and splits: a tile of rows, and tiles of keys for three blocks.
        const size_t j = (i + 1 + static_cast<size_t>(D) / 16 % 5) % options.size();
        if (i % 2) add_changed({options[i], options[j]});
        if (i % 4 == 2)
          add_changed({options[i], [&](Case& c) {
            c.B = 1, c.Hq = c.Hkv = 1, c.Lq = 193, c.Lkv = D <= 128 ? 2500 : 1250, c.sms = 3 + static_cast<int>(i % 3), c.kvlen = c.kvlen == 4 ? 1 : c.kvlen;
            if (i % 8 == 2) c.images = tile_kb * 8;
          }});
      }
      for (int Lkv : {1, 63, 64, 65, 128, 129, 0}) add_changed({[&](Case& c) { c.Lkv = Lkv, c.Lq = 192 + Lkv, c.Hq = 1, c.Hkv = 1; }});
      // Room for the tiles of one KV head, or a little more: rounds.
      for (int tiles : {0, 1}) add_changed({[&](Case& c) { c.kvlen = 1 + tiles, c.images = tile_kb * (tiles + (c.Lkv + keys - 1) / keys); }});
      // Splits of contexts that are shorter than their buffer, and rounds of them.
      for (int length : {300, 1000, 1200}) add_changed({[&](Case& c) {
        c.B = 1, c.Hq = c.Hkv = 2, c.Lq = 193, c.Lkv = 20 * keys, c.sms = 5, c.kvlen = 5, c.fixedlen = length;
        if (length == 1200) c.Hq = c.Hkv = 4, c.images = tile_kb * 2 * 20;
      }});
    }
  } else if (mode == "shape") {
    Case c;
    c.general = general;
    for (size_t i = 1; i < args.size(); ++i) {
      const size_t eq = args[i].find('=');
      bool found = false;
      c.fields([&](const char* name, auto& v) {
        if (args[i].substr(0, eq) == name) v = static_cast<std::decay_t<decltype(v)>>(atof(args[i].c_str() + eq + 1)), found = true;
      });
      if (!found) return printf("%s?\n", args[i].c_str()), 2;
    }
    cases.push_back(c);
  } else {
    return usage(), 2;
  }
  if (const char* d = getenv("EMU_DTYPE"))
    for (Case& c : cases) c.dtype = atoi(d);
  return run_all(cases);
}
