// The cache is decompressed in bounded chunks of keys, and torch's attention runs over each; what
// the chunks gave is merged by their log-sum-exp. For a block of query rows under the causal rule
//
//     keys:   start        context         square
//     row 0     |........####################|        context: every row sees all of it
//     ...       |........####################|##      square: its rows and keys are the same
//     last row  |........####################|####            tokens
//
// Cost per key: D multiply-adds per coordinate to decompress, shared by all rows of the block.
#include "prefill.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "../softmax.h"
#include "buffer.h"
#include "codec.h"
#include "kernels.h"

namespace tq::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kQueryBlock = 2048;         // rows per head; bounds what is merged in float32
constexpr int64_t kChunkElements = 16 << 20;  // of K, and of V: 32 MiB each

std::atomic<bool>& enabled() {
#ifdef __x86_64__
  static std::atomic<bool> flag = __builtin_cpu_supports("amx-bf16") != 0;
#else
  static std::atomic<bool> flag = false;
#endif
  return flag;
}

Tensor tensor_at(const View& v, int64_t b, int64_t heads, int64_t row, int64_t rows, int64_t D) {
  return torch::stable::from_blob(
      row_pointer(v, 2, b, 0, row), {1, heads, rows, D}, {0, v.stride[1], v.stride[2], 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::BFloat16);
}

// Rows [row, row + rows) against keys [key, key + keys).
struct Piece {
  int64_t row, rows, key, keys;
  bool causal;  // row r sees the first r + 1 - row keys; else all
};

struct Result {
  Tensor out, lse;  // [1, Hq, rows, D] bf16, [1, Hq, rows] f32
};

class Prefill {
 public:
  explicit Prefill(const AttentionProblem& problem) : p(problem) {}

  void run() const {
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t row = 0; row < p.Lq; row += kQueryBlock)
        block(b, row, std::min(row + kQueryBlock, p.Lq));
  }

 private:
  const AttentionProblem& p;

  std::vector<Piece> pieces(int64_t b, int64_t begin, int64_t end) const {
    const int64_t length = p.length(b), start = p.start(b);
    const int64_t first_token = length - p.Lq;  // position of query row 0
    const int64_t context_end = p.causal ? first_token + begin : length;
    const int64_t chunk = std::max<int64_t>(kTile, kChunkElements / (p.Hkv * p.D));
    std::vector<Piece> result;
    for (int64_t key = start; key < context_end; key += chunk)
      result.push_back({begin, end - begin, key, std::min(chunk, context_end - key), false});
    if (p.causal) {  // rows before the first visible key see nothing
      const int64_t row = std::max(begin, start - first_token);
      if (row < end) result.push_back({row, end - row, first_token + row, end - row, true});
    }
    return result;
  }

  Tensor decompressed(const View& packed, const View& norms, int64_t b, const Piece& piece) const {
    const std::array<int64_t, 4> sizes = {1, p.Hkv, piece.keys, p.D};
    const Tensor x = torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::BFloat16);
    DecompressProblem problem = {};
    problem.B = 1, problem.H = p.Hkv, problem.S = piece.keys, problem.D = p.D;
    problem.packed = packed;
    problem.packed.data = byte_row(packed, b, 0, piece.key);
    problem.norms = norms;
    problem.norms.data = row_pointer(norms, size_of(norms.dtype), b, 0, piece.key);
    problem.x = {x.data_ptr(), Dtype::bf16, {0, piece.keys * p.D, p.D, 1}};
    problem.rotation = p.rotation;
    problem.centroids = p.centroids;
    decompress(problem);
    return x;
  }

  Result attend(int64_t b, const Piece& piece) const {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const Tensor query = tensor_at(p.query, b, p.Hq, piece.row, piece.rows, p.D);
    const Tensor k = decompressed(p.k_packed, p.k_norms, b, piece);
    const Tensor v = decompressed(p.v_packed, p.v_norms, b, piece);
    std::array<StableIValue, 7> stack = {from(query),
                                         from(k),
                                         from(v),
                                         from(0.0),
                                         from(piece.causal),
                                         from(std::optional<Tensor>()),
                                         from(std::optional<double>(p.scale))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
        "aten::_scaled_dot_product_flash_attention_for_cpu", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }

  void block(int64_t b, int64_t begin, int64_t end) const {
    const std::vector<Piece> parts = pieces(b, begin, end);
    if (parts.size() == 1 && parts[0].rows == end - begin && !p.sinks) {  // nothing to merge
      const Result result = attend(b, parts[0]);
      Tensor out = tensor_at(p.out, b, p.Hq, begin, end - begin, p.D);
      torch::stable::copy_(out, result.out);
      if (p.lse)
        for (int64_t h = 0; h < p.Hq; ++h)
          for (int64_t i = begin; i < end; ++i)
            p.lse[(b * p.Hq + h) * p.Lq + i] = lse_of(result, h, i - begin);
      return;
    }

    const int64_t rows = end - begin;
    const Buffer sums(p.Hq * rows * p.D);
    std::fill(sums.get(), sums + p.Hq * rows * p.D, 0.0f);
    std::vector<SoftmaxState> states(p.Hq * rows);
    const int64_t grain = std::max<int64_t>(1, kGrain / p.D);
    for (const Piece& piece : parts) {
      const Result part = attend(b, piece);
      const auto* values = static_cast<const uint16_t*>(part.out.data_ptr());
      const auto strides = part.out.strides();
      torch::stable::parallel_for(0, p.Hq * piece.rows, grain, [&](int64_t from, int64_t to) {
        const Buffer row(p.D);
        for (int64_t n = from; n < to; ++n) {
          const int64_t h = n / piece.rows, i = n % piece.rows,
                        at = h * rows + piece.row + i - begin;
          float factor;
          const float own = states[at].merge({lse_of(part, h, i), 1.0f}, &factor);
          const auto* value = values + h * strides[1] + i * strides[2];
          kernels().load(row.get(), {value, Dtype::bf16, strides[3]}, p.D);
          float* sum = sums + at * p.D;
          for (int64_t d = 0; d < p.D; ++d) sum[d] = sum[d] * own + row.get()[d] * factor;
        }
      });
    }
    torch::stable::parallel_for(0, p.Hq * rows, grain, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        const int64_t h = n / rows, i = begin + n % rows;
        float* sum = sums + n * p.D;
        float own = 1;
        if (p.sinks) {
          float sink;
          kernels().load(&sink, row(p.sinks, 0, h, 0), 1);
          own = states[n].sink(sink);
        }
        const float scale = own * states[n].scale();
        for (int64_t d = 0; d < p.D; ++d) sum[d] *= scale;
        kernels().store(row_pointer(p.out, 2, b, h, i), Dtype::bf16, sum, p.D);
        if (p.lse) p.lse[(b * p.Hq + h) * p.Lq + i] = states[n].lse();
      }
    });
  }

  static float lse_of(const Result& result, int64_t h, int64_t i) {
    const auto strides = result.lse.strides();
    return static_cast<const float*>(result.lse.data_ptr())[h * strides[1] + i * strides[2]];
  }
};

}  // namespace

bool prefill_enabled() { return enabled(); }
void enable_prefill(bool on) { enabled() = on; }

// Below 2·D rows per key decompression costs more than the matrix units save.
bool prefill_applies(const AttentionProblem& p) {
  return prefill_enabled() && p.query.dtype == Dtype::bf16 && p.query.stride[3] == 1 &&
         p.out.stride[3] == 1 && !p.mask && p.softcap == 0 && p.Lq * p.Hq / p.Hkv >= 2 * p.D;
}

void prefill(const AttentionProblem& problem) { Prefill(problem).run(); }

}  // namespace tq::cpu
