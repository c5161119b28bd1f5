// The CPU kernels, written once over `Vec`, the vector type that the including file defines for its
// instruction set. Everything is in an anonymous namespace: each instruction set has its own copy.
//
// A Vec has `width` floats and these operations, element by element:
//   load store set1 add sub mul div fma(a, b, c) = a·b + c
//   max(a, b)             b where either is NaN
//   where_zero(c, a, b)   a where c == 0, else b (also where c is NaN)
//   where_less(a, b, x, y)  x where a < b, else y (also where unordered)
//   power_of_two(p, t)    p · 2^n, n the integer that the magic number left in t's low bits
//   load_bf16 load_f16 store_bf16 store_f16
//   reduce_max reduce_add
// Boundaries holds the 15 boundaries, ascending, and
//   below(x, index)       counts those below each element of x, to memory
// Bytes is a register of `width` bytes, with load, store and the interleaving of the lower or upper
// halves of each of its 16-byte parts. Table holds the 16 centroids, and
//   expand16(bytes, table, hi, lo)  looks up the high and the low nibbles of 16 bytes, to memory
//   expand(bytes, table)            the same of `width` bytes, to a Pair {hi, lo} of registers
// Vec::few_rows is how many query rows attention may hold in registers beside that.

namespace tq::cpu {
namespace {

constexpr int kVecs = kPanel / Vec::width;  // vectors in a row of a panel
constexpr float kNegInf = -__builtin_huge_valf();

// ---------------------------------------------------------------------- numbers in other formats

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t x) { return from_bits(uint32_t{x} << 16); }
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);  // keep a NaN a NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = uint32_t{x} >> 15 << 31, magnitude = uint32_t(x & 0x7fff) << 13;
  if ((x & 0x7c00) == 0x7c00) return from_bits(sign | 0x7f800000 | magnitude);
  // As a float the exponent is 112 too small; multiplying also normalises subnormals.
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}
inline uint16_t float_to_half(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000, bits = to_bits(x) & 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);  // NaN
  if (bits >= to_bits(65520.0f)) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < to_bits(0x1p-14f))  // subnormal: adding 0.5 rounds at the right bit
    return static_cast<uint16_t>(sign | (to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f)));
  return static_cast<uint16_t>(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}

inline float load_one(const Strided& from, int64_t i) {
  const int64_t at = i * from.stride;
  switch (from.dtype) {
    case Dtype::f32: return static_cast<const float*>(from.data)[at];
    case Dtype::f16: return half_to_float(static_cast<const uint16_t*>(from.data)[at]);
    default: return bf16_to_float(static_cast<const uint16_t*>(from.data)[at]);
  }
}

inline void store_one(void* to, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::f32: *static_cast<float*>(to) = value; break;
    case Dtype::f16: *static_cast<uint16_t*>(to) = float_to_half(value); break;
    default: *static_cast<uint16_t*>(to) = float_to_bf16(value);
  }
}

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

void load(float* to, Strided from, int64_t n) {
  int64_t i = 0;
  if (from.stride == 1) {
    const auto* words = static_cast<const uint16_t*>(from.data);
    for (; i + Vec::width <= n; i += Vec::width) {
      switch (from.dtype) {
        case Dtype::f32: Vec::load(static_cast<const float*>(from.data) + i).store(to + i); break;
        case Dtype::f16: Vec::load_f16(words + i).store(to + i); break;
        default: Vec::load_bf16(words + i).store(to + i);
      }
    }
  }
  for (; i < n; ++i) to[i] = load_one(from, i);
}

void store(void* to, Dtype dtype, const float* from, int64_t n) {
  int64_t i = 0;
  auto* words = static_cast<uint16_t*>(to);
  for (; i + Vec::width <= n; i += Vec::width) {
    const Vec x = Vec::load(from + i);
    switch (dtype) {
      case Dtype::f32: x.store(static_cast<float*>(to) + i); break;
      case Dtype::f16: x.store_f16(words + i); break;
      default: x.store_bf16(words + i);
    }
  }
  for (; i < n; ++i) store_one(static_cast<char*>(to) + i * element_size(dtype), dtype, from[i]);
}

// ------------------------------------------------------------------------------- exp and tanh

// e^x = 2^n · (1 + t) with n = round(x / ln 2) and 1 + t = e^r, |r| <= ln 2 / 2. The Taylor series
// to r⁷ leaves a relative error below 6e-9, less than rounding does. `n` stays in magic form: 2^n
// is read off its low bits.
struct Exp {
  Vec n, t;
};

inline Exp exp_parts(Vec x) {
  const Vec magic = Vec::set1(0x1.8p23f);
  const Vec n = Vec::fma(x, Vec::set1(0x1.715476p0f), magic);
  const Vec whole = Vec::sub(n, magic);
  Vec r =
      Vec::fma(whole, Vec::set1(-0x1.62e4p-1f), x);  // ln 2 in two parts; whole · first is exact
  r = Vec::fma(whole, Vec::set1(-0x1.7f7d1cp-20f), r);
  Vec t = Vec::set1(1.0f / 5040);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
  for (const float c : kTaylor) t = Vec::fma(t, r, Vec::set1(c));
  return {n, Vec::mul(t, r)};
}

constexpr float kSmallestExponent = -87.0f;  // e^x below it would be subnormal; it counts as 0

// e^x for x <= 0; exactly 0 for -inf.
inline Vec exp_nonpositive(Vec x) {
  const Exp e = exp_parts(Vec::max(Vec::set1(kSmallestExponent), x));
  const Vec value = Vec::power_of_two(Vec::add(Vec::set1(1), e.t), e.n);
  return Vec::where_less(x, Vec::set1(kSmallestExponent), Vec::set1(0), value);
}

// tanh x = -u / (2 + u) with u = e^(-2x) - 1 for x >= 0, which loses no digits near 0.
inline Vec tanh(Vec x) {
  const Vec zero = Vec::set1(0);
  const Vec minus_x = Vec::sub(zero, x);
  const Vec negative = Vec::where_less(x, zero, x, minus_x);  // -|x|
  const Vec y = Vec::max(Vec::set1(kSmallestExponent), Vec::add(negative, negative));
  const Exp e = exp_parts(y);
  const Vec power = Vec::power_of_two(Vec::set1(1), e.n);
  const Vec u = Vec::fma(power, e.t, Vec::sub(power, Vec::set1(1)));
  const Vec magnitude = Vec::div(u, Vec::add(Vec::set1(2), u));  // -tanh |x|
  return Vec::where_less(x, zero, magnitude, Vec::sub(zero, magnitude));
}

// ---------------------------------------------------------------------------------------- gemm

// C[M][16·P] = or += A[M][K] · B, all of the sum in registers: a step of K costs M broadcasts of A,
// P·kVecs loads of B and M·P·kVecs multiply-adds.
template <int M, int P>
inline void gemm_block(int64_t K, const float* A, int64_t lda, const float* B, int64_t panel_stride,
                       float* C, int64_t ldc, bool accumulate) {
  Vec c[M][P * kVecs];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < P * kVecs; ++i) c[m][i] = Vec::set1(0);
  for (int64_t k = 0; k < K; ++k) {
    Vec b[P * kVecs];
    for (int i = 0; i < P * kVecs; ++i)
      b[i] = Vec::load(B + i / kVecs * panel_stride + k * kPanel + i % kVecs * Vec::width);
    for (int m = 0; m < M; ++m) {
      const Vec a = Vec::set1(A[m * lda + k]);
      for (int i = 0; i < P * kVecs; ++i) c[m][i] = Vec::fma(a, b[i], c[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < P * kVecs; ++i) {
      float* out = C + m * ldc + i * Vec::width;
      if (accumulate) c[m][i] = Vec::add(Vec::load(out), c[m][i]);
      c[m][i].store(out);
    }
}

// Rows and panels per block: enough independent sums to hide the latency of the multiply-add, few
// enough to stay in registers (32 with AVX-512, else 16).
constexpr int kGemmRows = Vec::width == 16 ? 8 : Vec::width == 8 ? 6 : 3;
constexpr int panels_per_block(int rows) {
  const int panels = (Vec::width == 16 ? 16 : 12) / (rows * kVecs);
  return panels >= 4 ? 4 : panels >= 2 ? 2 : 1;
}

template <int M>
inline void gemm_rows(int64_t panels, int64_t K, const float* A, int64_t lda, const float* B,
                      int64_t panel_stride, float* C, int64_t ldc, bool accumulate) {
  constexpr int P = panels_per_block(M);
  int64_t p = 0;
  for (; p + P <= panels; p += P)
    gemm_block<M, P>(K, A, lda, B + p * panel_stride, panel_stride, C + p * kPanel, ldc,
                     accumulate);
  for (; p < panels; ++p)
    gemm_block<M, 1>(K, A, lda, B + p * panel_stride, panel_stride, C + p * kPanel, ldc,
                     accumulate);
}

template <int M = kGemmRows, class... Args>
inline void gemm_up_to(int64_t rows, const Args&... args) {
  if (rows == M) return gemm_rows<M>(args...);
  if constexpr (M > 1) gemm_up_to<M - 1>(rows, args...);
}

// The rounding error of a sum grows with its length. So sums of at most `sum_length` products are
// formed on their own and then added up.
inline void multiply(int64_t sum_length, int64_t M, int64_t panels, int64_t K, const float* A,
                     int64_t lda, const float* B, int64_t panel_stride, float* C, int64_t ldc,
                     bool accumulate) {
  const int64_t blocks = (M + kGemmRows - 1) / kGemmRows;
  for (int64_t i = 0; i < blocks; ++i) {  // of equal size, or one less
    const int64_t row = M * i / blocks, rows = M * (i + 1) / blocks - row;
    for (int64_t k = 0; k < K; k += sum_length) {
      const int64_t length = K - k < sum_length ? K - k : sum_length;
      gemm_up_to(rows, panels, length, A + row * lda + k, lda, B + k * kPanel, panel_stride,
                 C + row * ldc, ldc, accumulate || k > 0);
    }
  }
}

void gemm(int64_t M, int64_t panels, int64_t K, const float* A, int64_t lda, const float* B,
          int64_t panel_stride, float* C, int64_t ldc, bool accumulate) {
  constexpr int64_t kSumLength = 16;  // half of torch's error
  multiply(kSumLength, M, panels, K, A, lda, B, panel_stride, C, ldc, accumulate);
}

// ------------------------------------------------------------------------------ packed vectors

// `Wide::width` bytes of a packed row of which `n` are left: where they lie, or else copied and
// filled up with zeros.
template <int width>
struct Copy {
  alignas(64) uint8_t byte[width];

  const uint8_t* load(const uint8_t* from, int64_t stride, int64_t n) {
    if (stride == 1 && n >= width) return from;
    __builtin_memset(byte, 0, width);
    n = n < width ? n : width;
    if (stride == 1)
      __builtin_memcpy(byte, from, n);
    else
      for (int64_t i = 0; i < n; ++i) byte[i] = from[i * stride];
    return byte;
  }
};

// Transposes blocks of 16 x 16 bytes, as many side by side as a register holds: row i of block l is
// in[i] + 16·l, column j of it goes to out[j] + 16·l. Four rounds of interleaving row i with row
// i + 8 each move one bit of the row number to the column number; after four they have changed
// places.
inline void transpose(const uint8_t* const (&in)[16], uint8_t (&out)[16][Bytes::width]) {
  Bytes a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = Bytes::load(in[i]);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = Bytes::interleave_low(a[i], a[i + 8]);
      b[2 * i + 1] = Bytes::interleave_high(a[i], a[i + 8]);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 16; ++i) a[i].store(out[i]);
}

// One row as 32 values per 16 bytes, in the order of expanded_position; group g of 32 values goes
// to out + 2g · group_stride and out + (2g + 1) · group_stride.
inline void expand_row(const uint8_t* packed, int64_t byte_stride, int64_t D, const Table& table,
                       float* out, int64_t group_stride) {
  for (int64_t g = 0; g < expanded_dim(D) / 32; ++g) {
    Copy<16> copy;
    const uint8_t* bytes = copy.load(packed + g * 16 * byte_stride, byte_stride, D / 2 - g * 16);
    expand16(bytes, table, out + 2 * g * group_stride, out + (2 * g + 1) * group_stride);
  }
}

// Keys [first, first + n) as kᵀ in panels of 16 keys: panel[d][key]. Keys past n are whatever the
// zero byte means.
inline void expand_keys(const PackedHead& k, int64_t first, int64_t n, int64_t D,
                        const Table& table, float* out) {
  for (int64_t panel = 0; panel < n; panel += kPanel, out += D * kPanel) {
    for (int64_t column = 0; column < D / 2; column += Bytes::width) {
      Copy<Bytes::width> copies[16];
      const uint8_t* rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const uint8_t* row = k.data + (first + panel + i) * k.stride + column * k.byte_stride;
        rows[i] = copies[i].load(row, k.byte_stride, panel + i < n ? D / 2 - column : 0);
      }
      alignas(64) uint8_t columns[16][Bytes::width];
      transpose(rows, columns);
      for (int64_t j = 0; j < Bytes::width && column + j < D / 2; ++j) {
        float* even = out + 2 * (column + j) * kPanel;
        expand16(&columns[j % 16][j / 16 * 16], table, even, even + kPanel);
      }
    }
  }
}

// Values [first, first + n) as panels: panel[key][16 coordinates].
inline void expand_values(const PackedHead& v, int64_t first, int64_t n, int64_t D,
                          const Table& table, float* out) {
  for (int64_t i = 0; i < n; ++i)
    expand_row(v.data + (first + i) * v.stride, v.byte_stride, D, table, out + i * kPanel,
               kTile * kPanel);
}

// ----------------------------------------------------------------------------------- attention

// With few rows per KV head expansion is most of the work, and going through memory most of that.
// So where the registers suffice (Vec::few_rows), values are used as they are expanded.

// scores[m][j] = q[m] · key first + j, with the rows of q in the order of expanded_position.
template <int M>
inline void score_few(const PackedHead& k, int64_t first, int64_t n, int64_t D, const Table& table,
                      const float* q, float* scores) {
  for (int64_t j = 0; j < n; ++j) {
    const uint8_t* row = k.data + (first + j) * k.stride;
    Vec even[M], odd[M];
    for (int m = 0; m < M; ++m) even[m] = odd[m] = Vec::set1(0);
    for (int64_t c = 0; c < D / 2; c += Vec::width) {
      const Pair x = expand(row + c, table);
      const float* at = q + c / 16 * 32 + c % 16;
      for (int m = 0; m < M; ++m) {
        even[m] = Vec::fma(Vec::load(at + m * D), x.hi, even[m]);
        odd[m] = Vec::fma(Vec::load(at + m * D + 16), x.lo, odd[m]);
      }
    }
    for (int m = 0; m < M; m += 4) {  // four sums cost little more than one
      const auto sum = [&](int i) { return Vec::add(even[i < M ? i : m], odd[i < M ? i : m]); };
      float sums[4];
      Vec::reduce_add4(sum(m), sum(m + 1), sum(m + 2), sum(m + 3), sums);
      for (int i = m; i < M && i < m + 4; ++i) scores[i * kTile + j] = sums[i - m];
    }
  }
}

// out[m] += sum over j of weights[m][j] · value first + j, in the order of expanded_position.
template <int M>
inline void accumulate_few(const PackedHead& v, int64_t first, int64_t n, int64_t D,
                           const Table& table, const float* weights, float* out) {
  for (int64_t c = 0; c < D / 2; c += Vec::width) {
    float* at = out + c / 16 * 32 + c % 16;
    Vec even[M], odd[M];
    for (int m = 0; m < M; ++m) even[m] = odd[m] = Vec::set1(0);
    for (int64_t j = 0; j < n; ++j) {
      const Pair x = expand(v.data + (first + j) * v.stride + c, table);
      for (int m = 0; m < M; ++m) {
        const Vec w = Vec::set1(weights[m * kTile + j]);
        even[m] = Vec::fma(w, x.hi, even[m]);
        odd[m] = Vec::fma(w, x.lo, odd[m]);
      }
    }
    for (int m = 0; m < M; ++m) {
      Vec::add(Vec::load(at + m * D), even[m]).store(at + m * D);
      Vec::add(Vec::load(at + m * D + 16), odd[m]).store(at + m * D + 16);
    }
  }
}

template <int M = Vec::few_rows, class... Args>
inline void score_up_to(int64_t rows, const Args&... args) {
  if (rows == M) return score_few<M>(args...);
  if constexpr (M > 1) score_up_to<M - 1>(rows, args...);
}
template <int M = Vec::few_rows, class... Args>
inline void accumulate_up_to(int64_t rows, const Args&... args) {
  if (rows == M) return accumulate_few<M>(args...);
  if constexpr (M > 1) accumulate_up_to<M - 1>(rows, args...);
}

// bias[j] = 0 where row r sees key first + j, -inf elsewhere. False if it sees all n keys and n
// fills the vectors, so that no bias is needed.
inline bool visibility(const AttendTask& task, int64_t r, int64_t first, int64_t n, int64_t padded,
                       float* bias) {
  const int64_t begin = task.start - first, end = task.limit[r] - first;
  if (!task.mask && begin <= 0 && end >= n && n == padded) return false;
  for (int64_t j = 0; j < padded; ++j)
    bias[j] = j < n && begin <= j && j < end &&
                      (!task.mask || task.mask[r][(first + j) * task.mask_stride])
                  ? 0.0f
                  : kNegInf;
  return true;
}

// Scores of one row over a tile to unnormalised weights times the values' norms, in place, and the
// row's running max and sum. Returns by how much what was summed before has to be scaled.
inline float softmax_row(float* scores, int64_t padded, const float* k_norm, const float* v_norm,
                         const float* bias, float softcap, float* max, float* sum) {
  Vec tile_max = Vec::set1(kNegInf);
  for (int64_t j = 0; j < padded; j += Vec::width) {
    Vec x = Vec::mul(Vec::load(scores + j), Vec::load(k_norm + j));
    if (softcap != 0) x = Vec::mul(Vec::set1(softcap), tanh(Vec::mul(x, Vec::set1(1 / softcap))));
    // Selected, not added: an unseen key may have a NaN for a norm.
    if (bias) x = Vec::where_zero(Vec::load(bias + j), x, Vec::set1(kNegInf));
    x.store(scores + j);
    tile_max = Vec::max(tile_max, x);
  }
  const float largest = Vec::reduce_max(tile_max);
  const float new_max = largest > *max ? largest : *max;
  // Where nothing was seen yet, subtracting 0 leaves -inf what it is, and a NaN too: it must reach
  // the sum, though a maximum may lose it.
  const float shift = new_max == kNegInf ? 0 : new_max;
  Vec tile_sum = Vec::set1(0);
  for (int64_t j = 0; j < padded; j += Vec::width) {
    const Vec p = exp_nonpositive(Vec::sub(Vec::load(scores + j), Vec::set1(shift)));
    tile_sum = Vec::add(tile_sum, p);
    Vec::where_zero(p, p, Vec::mul(p, Vec::load(v_norm + j))).store(scores + j);
  }
  const Vec old = exp_nonpositive(Vec::set1(*max - shift));
  float correction[Vec::width];
  old.store(correction);
  *sum = *sum * correction[0] + Vec::reduce_add(tile_sum);
  *max = new_max;
  return correction[0];
}

// Norms [first, first + n), then zeros.
inline void load_norms(float* to, Strided norms, int64_t first, int64_t n, int64_t padded) {
  const int64_t offset = first * norms.stride * element_size(norms.dtype);
  norms.data = static_cast<const char*>(norms.data) + offset;
  load(to, norms, n);
  for (int64_t j = n; j < padded; ++j) to[j] = 0;
}

void softmax(const AttendTask& task, const ScoreTile& tile) {
  float* k_norm = tile.scratch;
  float* v_norm = k_norm + tile.padded;
  float* bias = v_norm + tile.padded;
  load_norms(k_norm, task.k.norms, tile.first, tile.n, tile.padded);
  load_norms(v_norm, task.v.norms, tile.first, tile.n, tile.padded);
  for (int64_t r = 0; r < task.rows; ++r) {
    const bool biased = visibility(task, r, tile.first, tile.n, tile.padded, bias);
    tile.correction[r] =
        softmax_row(tile.scores + r * tile.stride, tile.padded, k_norm, v_norm,
                    biased ? bias : nullptr, task.softcap, task.max + r, task.sum + r);
  }
}

// For each tile of kTile keys: scores = q · Kᵀ, softmax, out += weights · V. With more than a few
// rows K (transposed) and V are expanded to memory first and shared by all rows. Per coordinate of
// K or V: one lookup, and a multiply-add for each row. All but the packed bytes stays in the
// caches.
void attend(const AttendTask& task) {
  const int64_t rows = task.rows, D = task.D, width = expanded_dim(D);
  const bool few =
      rows <= Vec::few_rows && width == D && task.k.byte_stride == 1 && task.v.byte_stride == 1;
  const Table table(task.centroids);
  float* keys = task.scratch;  // or, for few rows, their q in the order of expansion
  float* values = keys + kTile * D;
  float* scores = values + kTile * width;
  float* norms = scores + kTile * kMaxRows;

  for (int64_t r = 0; r < rows; ++r) task.max[r] = kNegInf, task.sum[r] = 0;
  for (int64_t i = 0; i < rows * width; ++i) task.out[i] = 0;
  if (few)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < D; ++d) keys[r * D + expanded_position(d)] = task.q[r * D + d];

  for (int64_t first = task.first; first < task.last; first += kTile) {
    const int64_t n = task.last - first < kTile ? task.last - first : kTile;
    const int64_t padded = round_up(n, kPanel);
    if (few) {
      score_up_to(rows, task.k, first, n, D, table, keys, scores);
    } else {
      expand_keys(task.k, first, n, D, table, keys);
      gemm(rows, padded / kPanel, D, task.q, D, keys, D * kPanel, scores, kTile, false);
    }
    float correction[kMaxRows];
    softmax(task, {first, n, padded, scores, kTile, correction, norms});
    for (int64_t r = 0; r < rows; ++r)
      if (correction[r] != 1)
        for (int64_t i = 0; i < width; ++i) task.out[r * width + i] *= correction[r];
    if (few) {
      accumulate_up_to(rows, task.v, first, n, D, table, scores, task.out);
    } else {
      expand_values(task.v, first, n, D, table, values);
      gemm(rows, width / kPanel, n, scores, kTile, values, kTile * kPanel, task.out, width, true);
    }
  }
}

// ----------------------------------------------------------------------- compress, decompress

// x to x / |x|, or to 0 if |x| is 0 or not finite. Returns |x|. The squares of 1e-30 or 1e30 do not
// fit a float, but do fit a double.
inline float normalise(float* x, int64_t D) {
  constexpr int kSums = 8;
  double squares[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= D; i += kSums)
    for (int j = 0; j < kSums; ++j) squares[j] += double{x[i + j]} * x[i + j];
  for (int j = 0; i + j < D; ++j) squares[j] += double{x[i + j]} * x[i + j];
  for (int n = kSums / 2; n > 0; n /= 2)
    for (int j = 0; j < n; ++j) squares[j] += squares[j + n];
  const auto norm = static_cast<float>(__builtin_sqrt(squares[0]));
  if (norm > 0 && norm < __builtin_huge_valf()) {
    for (i = 0; i < D; ++i) x[i] /= norm;
  } else {
    for (i = 0; i < D; ++i) x[i] = 0;
  }
  return norm;
}

inline void bucketize(const float* x, int64_t n, const Boundaries& boundaries, int32_t* index) {
  for (int64_t i = 0; i < n; i += Vec::width) boundaries.below(Vec::load(x + i), index + i);
}

// Rotate a block of normalised vectors, count the boundaries below each coordinate, pack.
// Per coordinate: D multiply-adds, 15 comparisons.
void compress(const CompressTask& task) {
  const int64_t rows = task.rows, D = task.D, width = round_up(D, kPanel);
  float* x = task.scratch;
  float* y = x + kRowBlock * D;
  float* norm = y + kRowBlock * width;
  const Boundaries boundaries(task.boundaries);
  auto* index = reinterpret_cast<int32_t*>(norm + kRowBlock);
  for (int64_t r = 0; r < rows; ++r) {
    load(x + r * D, task.x[r], D);
    if (task.offset)
      for (int64_t i = 0; i < D; ++i) x[r * D + i] -= load_one(task.offset[r], i);
    norm[r] = normalise(x + r * D, D);
  }
  multiply(D, rows, width / kPanel, D, x, D, task.rotation_panels, D * kPanel, y, width, false);

  for (int64_t r = 0; r < rows; ++r) {
    if (!task.packed[r]) continue;
    const float* row = y + r * width;
    bucketize(row, width, boundaries, index);
    if (task.policy != NormPolicy::l2) {
      double length = 0, product = 0;  // |ŷ|², ⟨y, ŷ⟩
      for (int64_t i = 0; i < D; ++i) {
        const double rounded = task.centroids[index[i]];
        length += rounded * rounded;
        product += rounded * row[i];
      }
      if (task.policy == NormPolicy::preserve)
        norm[r] /= static_cast<float>(__builtin_sqrt(length));
      else if (product > 0)
        norm[r] /= static_cast<float>(product);
    }
    uint8_t* packed = task.packed[r];
    if (task.byte_stride == 1)  // apart, because the compiler vectorises it
      for (int64_t j = 0; j < D / 2; ++j) packed[j] = pack(index[2 * j], index[2 * j + 1]);
    else
      for (int64_t j = 0; j < D / 2; ++j)
        packed[j * task.byte_stride] = pack(index[2 * j], index[2 * j + 1]);
    store_one(task.norms[r], task.norm_dtype, norm[r]);
  }
}

// Expand a block of vectors, rotate back, scale. Per coordinate: D multiply-adds.
void decompress(const DecompressTask& task) {
  const int64_t rows = task.rows, D = task.D;
  const int64_t width = expanded_dim(D), out_width = round_up(D, kPanel);
  float* expanded = task.scratch;
  float* x = expanded + kRowBlock * width;
  const Table table(task.centroids);
  for (int64_t r = 0; r < rows; ++r)
    expand_row(task.packed[r], task.byte_stride, D, table, expanded + r * width, kPanel);
  gemm(rows, out_width / kPanel, width, expanded, width, task.rotation_panels, width * kPanel, x,
       out_width, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * out_width;
    const float norm = load_one(task.norms[r], 0);
    for (int64_t i = 0; i < D; ++i) row[i] *= norm;
    if (task.offset)
      for (int64_t i = 0; i < D; ++i) row[i] += load_one(task.offset[r], i);
    store(task.x[r], task.dtype, row, D);
  }
}

constexpr Kernels table(const char* isa) {
  return {isa, &load, &store, &gemm, &attend, &softmax, &compress, &decompress};
}

}  // namespace
}  // namespace tq::cpu
