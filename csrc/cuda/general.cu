// Attention over the packed cache for every shape, stride and option, in float32 on the CUDA cores
// of any GPU since sm_80. The tuned kernels take what they can; this one takes the rest.
//
// The G·Lq rows of a KV head (row i·G + g) are cut into tiles of R = 1, 4, 8 or 16 rows, so that a
// key is decoded once for R rows. Rounds of a bounded number of tiles bound the workspace:
//   rotate   q^ = scale · rotation · q, to the workspace (general_rotate.cu)
//   attend   grid (tile, split), 128 threads: leaves max, sum and undivided output of each split
//   merge    a row a block: adds up the splits in order, the sink, divides; in place of q^
//   rotate   back, by the transpose, to the output
// Splits are cut on the device, by the lengths found there and never by Lkv: the bits of a result
// do not depend on the buffer, and blocks beyond the last split return at once.
//
// attend, per 64 keys, with three barriers:
//   score       a warp takes a quarter of the words (8 coordinates), two keys a lane; the four
//               parts of a score meet in shared memory
//   softmax     a warp a row, two keys a lane; leaves exp(score - max) · value norm
//   accumulate  a thread takes 4 coordinates of every 128·4/D-th key
// The next K arrives during softmax and accumulate, V during score. Numbers are added up in short
// chains (8 coordinates; 64 keys), whose totals are added up in turn: nearly a tree's accuracy. The
// last steps of a score, its four parts and the norm, are computed in two floats: the larger a
// score, the more its rounding errors weigh.
//
// Shared memory of attend: q^ 4·R·D bytes, scores 1 KB·R, weights 256·R, K and V 64·(D + 8); 16 KB
// for R = 4, D = 128. Cost per coordinate of a key: one lookup in 16 floats (no bank conflicts),
// two integer instructions, R multiply-adds, R/8 (K) or R/16 (V) loads from shared memory.
#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "general.cuh"

namespace tq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The threads of a block as groups of one thread for each four coordinates.
struct Groups {
  int units, unit, group, count;
  __device__ explicit Groups(int width)
      : units(width / 4),
        unit(threadIdx.x % units),
        group(threadIdx.x / units),
        count(kThreads / units) {}

  // To the threads of group 0 the sum of x over all groups, in order. By all threads.
  __device__ float4 sum(float4 x, float4 (&shared)[kThreads]) const {
    __syncthreads();
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int i = unit + units; i < units * count; i += units) {
      const float4 y = shared[i];
      x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
    return x;
  }
};

// Bytes of shared memory; the arrays are named in the kernel.
int attend_bytes(int rows, int width) {
  const int quads = (rows + 3) / 4;
  return 4 * (rows * width + kWarps * rows * kKeys + quads * 4 * kKeys +
              2 * kKeys * (width / kWord | 1));
}

template <int R>
__global__ void __launch_bounds__(kThreads, R == 16 ? 3 : 4)
    attend_kernel(const AttentionProblem p, const Plan plan) {
  constexpr int kRowsPerWarp = (R + kWarps - 1) / kWarps;
  constexpr int kQuads = (R + 3) / 4;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int words = plan.width / kWord, pitch = words | 1;  // odd: a column lies in 32 banks

  extern __shared__ float4 q[];                                            // [R][width / 4]
  auto* scores = reinterpret_cast<float*>(q + R * plan.width / 4);         // [kWarps][R][kKeys]
  auto* weights = reinterpret_cast<float4*>(scores + kWarps * R * kKeys);  // [kQuads][kKeys]
  auto* k = reinterpret_cast<uint32_t*>(weights + kQuads * kKeys);         // [kKeys][pitch]
  uint32_t* v = k + kKeys * pitch;                                         // [kKeys][pitch]
  __shared__ float4 exchange[kThreads];
  __shared__ float table[kLevels];
  __shared__ float norms[2][kKeys];  // of the keys; of the values
  __shared__ float correction[R];    // of the sums so far
  __shared__ int limit[R];           // a row sees keys of this split below this
  __shared__ const uint8_t* mask[R];

  const int64_t index = gridDim.x - 1 - blockIdx.x;  // under the causal rule the longest first
  const int split = blockIdx.y;
  const Tile tile(p, plan, index);
  const Keys keys(p, plan, tile);
  if (split >= keys.splits) return;
  const int64_t begin = keys.begin + split * keys.per_split;
  const int count = static_cast<int>(min(keys.per_split, keys.end - begin));
  // From here on keys are counted from `begin`.

  // Words that are not there keep what they had: any byte can be decoded.
  const auto fetch = [&](const View& packed, bool in_words, int start, uint32_t* to) {
    const auto* from =
        static_cast<const uint8_t*>(packed.data) + offset_of(packed, tile.b, tile.h, begin + start);
    for (int key = tid / plan.span; key < min(kKeys, count - start); key += kThreads / plan.span) {
      const uint8_t* bytes = from + key * packed.stride[2];
      for (int word = tid % plan.span; word < words; word += plan.span) {
        if (in_words) {
          __pipeline_memcpy_async(to + key * pitch + word, bytes + 4 * word, 4);
        } else {
          uint32_t value = 0;
          for (int j = 4 * word; j < min(4 * word + 4, static_cast<int>(p.D) / 2); ++j)
            value |= uint32_t{bytes[j * packed.stride[3]]} << 8 * (j % 4);
          to[key * pitch + word] = value;
        }
      }
    }
    __pipeline_commit();
  };
  const int side = tid / kKeys;  // keys, values
  const View norm_view = side == 0 ? p.k_norms : p.v_norms;
  const auto fetch_norm = [&](int start) {
    const int key = start + tid % kKeys;
    if (key >= count) return 0.0f;
    return load_element(norm_view, offset_of(norm_view, tile.b, tile.h, begin + key));
  };
  const auto level = [&](uint32_t bytes, int i) {  // of coordinate i of 8
    const auto byte = static_cast<uint8_t>(bytes >> i / 2 * 8);
    return table[i % 2 == 0 ? even_index(byte) : odd_index(byte)];
  };

  // Which keys this warp's rows see: bit 2j for row warp + j·kWarps and key lane, 2j + 1 for the
  // key 32 further.
  const auto visible = [&](int start) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * kRowsPerWarp; ++i) {
      const int row = warp + i / 2 * kWarps, key = start + lane + i % 2 * 32;
      if (row < R && key < limit[row] && (!p.mask || mask[row][key * p.mask.stride[3]]))
        bits |= 1u << i;
    }
    return bits;
  };

  const auto score = [&] {
    float sum[R][2] = {};
    for (int word = words * warp / kWarps; word < words * (warp + 1) / kWarps; ++word) {
      float key[2][kWord];
#pragma unroll
      for (int i = 0; i < 2 * kWord; ++i)
        key[i / kWord][i % kWord] = level(k[(lane + i / kWord * 32) * pitch + word], i % kWord);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float4 a = q[(r * words + word) * 2], b = q[(r * words + word) * 2 + 1];
        const float query[kWord] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float part = query[0] * key[n][0];
#pragma unroll
          for (int i = 1; i < kWord; ++i) part = fmaf(query[i], key[n][i], part);
          sum[r][n] += part;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * R; ++i)
      scores[(warp * R + i / 2) * kKeys + lane + i % 2 * 32] = sum[i / 2][i % 2];
  };

  SoftmaxState state[kRowsPerWarp];  // of the rows of this warp, with this lane's part of the sum
  const auto softmax = [&](uint32_t seen) {
#pragma unroll
    for (int j = 0; j < kRowsPerWarp; ++j) {
      const int row = warp + j * kWarps;
      if (row >= R) break;
      float s[2], rest[2];  // a score is s + rest
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        constexpr int kNext = R * kKeys;
        const float* part = scores + row * kKeys + lane + n * 32;
        const float norm = norms[0][lane + n * 32];
        float lost[3];
        const float total = add(add(part[0], part[kNext], &lost[0]),
                                add(part[2 * kNext], part[3 * kNext], &lost[1]), &lost[2]);
        s[n] = __fmul_rn(total, norm);
        rest[n] = fmaf(lost[0] + lost[1] + lost[2], norm, fmaf(total, norm, -s[n]));
        if (p.softcap != 0) s[n] = p.softcap * tanhf(s[n] / p.softcap);
        if (p.softcap != 0 || !(fabsf(s[n]) < INFINITY)) rest[n] = 0;
        if (!(seen >> (2 * j + n) & 1)) s[n] = -INFINITY;
      }
      const float largest = fmaxf(state[j].max, warp_max(fmaxf(s[0], s[1])));
      const float own = state[j].max == -INFINITY ? 0.0f : expf(state[j].max - largest);
      float sum = state[j].sum * own;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int key = lane + n * 32;
        const bool sees = seen >> (2 * j + n) & 1;  // selected: what is unseen may be NaN
        const float weight = sees ? expf(s[n] - largest + rest[n]) : 0;
        reinterpret_cast<float*>(weights + row / 4 * kKeys + key)[row % 4] =
            sees ? weight * norms[1][key] : 0;
        sum += weight;
      }
      state[j] = {largest, sum};
      if (lane == 0) correction[row] = own;
    }
  };

  const Groups groups(plan.width);
  float sum[R][4] = {};
  const auto accumulate = [&](int n) {
    const uint32_t* column = v + groups.unit / 2;
    const int shift = groups.unit % 2 * 16;
    float part[R][4] = {};
#pragma unroll 2
    for (int key = groups.group; key < n; key += groups.count) {
      const uint32_t bytes = column[key * pitch] >> shift;
      const float value[4] = {level(bytes, 0), level(bytes, 1), level(bytes, 2), level(bytes, 3)};
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const float4 w = weights[quad * kKeys + key];
        const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int r = 4 * quad; r < min(R, 4 * quad + 4); ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) part[r][i] = fmaf(weight[r % 4], value[i], part[r][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[r][i] = fmaf(sum[r][i], correction[r], part[r][i]);
  };

  fetch(p.k_packed, plan.k_words, 0, k);
  float next_norm = fetch_norm(0);
  const auto* rotated = reinterpret_cast<const float4*>(plan.q + index * R * plan.width);
  for (int i = tid; i < R * plan.width / 4; i += kThreads) q[i] = rotated[i];
  if (tid < kLevels) table[tid] = p.centroids[tid];
  if (tid < R) {
    const int64_t token = tile.token(plan, tid);
    const int64_t seen = tid < tile.rows ? key_limit(p, tile.b, token) - begin : 0;
    limit[tid] = static_cast<int>(max(int64_t{0}, min(seen, int64_t{count})));
    mask[tid] = static_cast<const uint8_t*>(p.mask.data) + offset_of(p.mask, tile.b, 0, token) +
                begin * p.mask.stride[3];
  }
  for (int start = 0; start < count; start += kKeys) {
    norms[side][tid % kKeys] = next_norm;
    __pipeline_wait_prior(0);
    __syncthreads();  // K and the norms are there; V and the weights have been read
    fetch(p.v_packed, plan.v_words, start, v);
    next_norm = fetch_norm(start + kKeys);
    const uint32_t seen = visible(start);
    score();
    __syncthreads();  // the scores are there; K has been read
    fetch(p.k_packed, plan.k_words, start + kKeys, k);
    softmax(seen);
    __pipeline_wait_prior(1);
    __syncthreads();  // V and the weights are there
    accumulate(min(kKeys, count - start));
  }

  auto* output = reinterpret_cast<float4*>(plan.output + plan.part(index, split, 0) * plan.width);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float4 own = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    const float4 all = groups.sum(own, exchange);
    if (groups.group == 0) output[r * groups.units + groups.unit] = all;
  }
#pragma unroll
  for (int j = 0; j < kRowsPerWarp; ++j) {
    const int row = warp + j * kWarps;
    const float all = warp_sum(state[j].sum);
    if (row < R && lane == 0) plan.state[plan.part(index, split, row)] = {state[j].max, all};
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(const AttentionProblem p, const Plan plan) {
  __shared__ float4 exchange[kThreads];
  __shared__ float factors[kMaxSplits];
  const int64_t index = blockIdx.x / plan.rows;
  const int row = blockIdx.x % plan.rows, lane = threadIdx.x;
  const Tile tile(p, plan, index);
  if (row >= tile.rows) return;
  const int splits = Keys(p, plan, tile).splits;

  if (lane < 32) {
    const SoftmaxState* parts = plan.state + plan.part(index, 0, row);
    SoftmaxState state;
    float ignored;
    for (int s = lane; s < splits; s += 32) state.merge(parts[s * plan.rows], &ignored);
    for (int lanes = 16; lanes > 0; lanes /= 2)
      state.merge({__shfl_xor_sync(~0u, state.max, lanes), __shfl_xor_sync(~0u, state.sum, lanes)},
                  &ignored);
    // One result for all lanes: theirs may be rounded differently.
    state = {__shfl_sync(~0u, state.max, 0), __shfl_sync(~0u, state.sum, 0)};
    const int64_t head = tile.query_head(plan, row);
    if (p.sinks) state.sink(load_element(p.sinks, head * p.sinks.stride[1]));
    for (int s = lane; s < splits; s += 32) {
      const float max = parts[s * plan.rows].max;
      factors[s] = max == -INFINITY ? 0.0f : expf(max - state.max) * state.scale();
    }
    if (p.lse && lane == 0)
      p.lse[(tile.b * p.Hq + head) * p.Lq + tile.token(plan, row)] = state.lse();
  }
  __syncthreads();

  const Groups groups(plan.width);
  float4 sum = {};
  const auto* parts =
      reinterpret_cast<const float4*>(plan.output + plan.part(index, 0, row) * plan.width);
#pragma unroll 8
  for (int s = groups.group; s < splits; s += groups.count) {
    const float4 part = parts[int64_t{s} * plan.rows * groups.units + groups.unit];
    const float f = factors[s];
    sum = make_float4(fmaf(f, part.x, sum.x), fmaf(f, part.y, sum.y), fmaf(f, part.z, sum.z),
                      fmaf(f, part.w, sum.w));
  }
  sum = groups.sum(sum, exchange);
  auto* output = reinterpret_cast<float4*>(plan.q + int64_t{blockIdx.x} * plan.width);
  if (groups.group == 0) output[groups.unit] = sum;
}

unsigned blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <int R>
void launch_attend(const AttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  const int bytes = attend_bytes(R, plan.width);
  if (bytes > 40 * 1024)  // with the static arrays it may be more than a kernel has unasked
    // The most that any problem needs: another thread may be about to launch a larger one.
    cudaFuncSetAttribute(attend_kernel<R>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         attend_bytes(R, kMaxDim));
  const dim3 grid(blocks(plan.count, 1), std::min<unsigned>(plan.splits, blocks(p.Lkv, kKeys)));
  attend_kernel<R><<<grid, kThreads, bytes, stream>>>(p, plan);
}

void launch_round(const AttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  launch_rotate_to(p, plan, stream);
  if (p.Lkv > 0) {
    switch (plan.rows) {
      case 1: launch_attend<1>(p, plan, stream); break;
      case 4: launch_attend<4>(p, plan, stream); break;
      case 8: launch_attend<8>(p, plan, stream); break;
      default: launch_attend<16>(p, plan, stream);
    }
  }
  merge_kernel<<<blocks(plan.count * plan.rows, 1), kThreads, 0, stream>>>(p, plan);
  launch_rotate_back(p, plan, stream);
}

bool readable_in_words(const View& packed, int64_t D) {
  const auto address = reinterpret_cast<uintptr_t>(packed.data);
  return packed.stride[3] == 1 && D % kWord == 0 && address % 4 == 0 && packed.stride[0] % 4 == 0 &&
         packed.stride[1] % 4 == 0 && packed.stride[2] % 4 == 0;
}

}  // namespace

int64_t general_workspace(const AttentionProblem& p, int multiprocessors) {
  return Plan(p, multiprocessors).round_floats() * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_general(const AttentionProblem& p, void* workspace, int multiprocessors,
                           cudaStream_t stream) {
  Plan plan(p, multiprocessors);
  plan.k_words = readable_in_words(p.k_packed, p.D);
  plan.v_words = readable_in_words(p.v_packed, p.D);
  plan.q = static_cast<float*>(workspace);
  plan.output = plan.q + plan.round_slots() * plan.width;
  plan.state =
      reinterpret_cast<SoftmaxState*>(plan.output + plan.round_slots() * plan.splits * plan.width);
  for (; plan.first < plan.tiles; plan.first += plan.count) {
    plan.count = std::min(plan.tiles_per_round, plan.tiles - plan.first);
    launch_round(p, plan, stream);
  }
  return cudaGetLastError();
}

}  // namespace tq::cuda
