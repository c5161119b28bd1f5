#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <utility>

namespace tq {
namespace {

using Dtypes = std::initializer_list<ScalarType>;
using Sizes = std::vector<int64_t>;

constexpr Dtypes kFloats = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                            ScalarType::Double};
constexpr Dtypes kQueryDtypes = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
constexpr Dtypes kNormDtypes = {ScalarType::BFloat16, ScalarType::Float};
constexpr Dtypes kSinkDtypes = {ScalarType::Float, ScalarType::BFloat16};
constexpr Dtypes kInts = {ScalarType::Int, ScalarType::Long};
constexpr Dtypes kByte = {ScalarType::Byte};

// ------------------------------------------------------------------------------------ messages

std::string name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return torch::headeronly::toString(dtype);
  }
}

template <class List>
std::string sizes_text(const List& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i)
    text += (i ? ", " : "") + std::to_string(sizes.begin()[i]);
  return text + "]";
}

std::string dtypes_text(Dtypes dtypes) {
  std::string text;
  for (auto it = dtypes.begin(); it != dtypes.end(); ++it)
    text += (it == dtypes.begin() ? "" : it + 1 == dtypes.end() ? " or " : ", ") + name(*it);
  return text;
}

// A tensor argument with what is asked about it more than once; reading it through the stable ABI
// costs a call each time.
struct Arg {
  const char* name;
  Tensor tensor;
  ScalarType dtype;
  int64_t rank;
  const int64_t *sizes, *strides;
  int32_t device_type, device_index;

  Arg(const char* name, const Tensor& t)
      : name(name), tensor(t), dtype(t.scalar_type()), rank(t.dim()) {
    int64_t *size, *stride;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &stride));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
    sizes = size, strides = stride;
  }

  int64_t last_size() const { return sizes[rank - 1]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < rank; ++i) n *= sizes[i];
    return n;
  }
  bool is(Dtypes dtypes) const {
    for (const ScalarType d : dtypes)
      if (d == dtype) return true;
    return false;
  }
  bool same_sizes(const int64_t* want, size_t n) const {
    if (static_cast<size_t>(rank) != n) return false;
    for (size_t i = 0; i < n; ++i)
      if (sizes[i] != want[i]) return false;
    return true;
  }
  std::string found() const { return tq::name(dtype) + " " + sizes_text(all_sizes()); }
  Sizes all_sizes() const { return {sizes, sizes + rank}; }
  std::string device() const {
    if (device_type == aoti_torch_device_type_cpu()) return "cpu";
    const std::string kind = device_type == aoti_torch_device_type_cuda()   ? "cuda"
                             : device_type == aoti_torch_device_type_meta() ? "meta"
                                                                            : "another device";
    return device_index < 0 ? kind : kind + ":" + std::to_string(device_index);
  }
};
using OptionalArg = std::optional<Arg>;

OptionalArg optional_arg(const char* name, const OptionalTensor& t) {
  if (!t) return std::nullopt;
  return Arg(name, *t);
}

// Not through a stream: a process can hold two C++ libraries (torch brings parts of one), and
// printing a number then crashes in the locale of the wrong one.
std::string text(const char* part) { return part; }
std::string text(const std::string& part) { return part; }
std::string text(int64_t part) { return std::to_string(part); }
std::string text(double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  return digits;
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error(std::string(op) + ": " + (text(parts) + ...));
}

// -------------------------------------------------------------------------------------- checks

// Type and rank, before any size is read. `dims` is a picture: "[B, H, T, D]".
void check_rank(const char* op, const Arg& arg, Dtypes dtypes, int64_t rank, const char* dims) {
  if (!arg.is(dtypes) || arg.rank != rank)
    fail(op, arg.name, " must be ", dtypes_text(dtypes), " ", dims, ", got ", arg.found());
}

template <class List = std::initializer_list<int64_t>>
void check_shape(const char* op, const Arg& arg, Dtypes dtypes, const char* dims,
                 const List& sizes) {
  if (!arg.is(dtypes) || !arg.same_sizes(&*sizes.begin(), sizes.size()))
    fail(op, arg.name, " must be ", dtypes_text(dtypes), " ", dims, " = ", sizes_text(sizes),
         ", got ", arg.found());
}

void check_head_dim(const char* op, const Arg& arg, int64_t D) {
  if (!valid_dim(D))
    fail(op, arg.name, " must have an even head dim D from 16 to 512, got ", arg.found());
}

void check_rotation(const char* op, const Arg& rotation, int64_t D) {
  check_shape(op, rotation, kFloats, "[D, D]", {D, D});
}
void check_boundaries(const char* op, const Arg& boundaries) {
  check_shape(op, boundaries, kFloats, "[15]", {kBoundaries});
}
void check_centroids(const char* op, const Arg& centroids) {
  check_shape(op, centroids, kFloats, "[16]", {kLevels});
}

NormPolicy check_policy(const char* op, const char* arg, const std::string& policy,
                        const OptionalArg& centroids) {
  if (policy == "l2") return NormPolicy::l2;
  if (policy != "preserve" && policy != "unbiased")
    fail(op, arg, " must be 'l2', 'preserve' or 'unbiased', got '", policy, "'");
  if (!centroids) fail(op, arg, "='", policy, "' needs centroids, got None");
  return policy == "preserve" ? NormPolicy::preserve : NormPolicy::unbiased;
}

// One vector per head: broadcastable to [..., 1, D], with D spelled out. `like` are the sizes of
// what it is subtracted from.
void check_offset(const char* op, const Arg& offset, const Sizes& like) {
  const int64_t rank = like.size();
  bool ok = offset.is(kFloats) && 1 <= offset.rank && offset.rank <= rank;
  for (int64_t i = 1; ok && i <= offset.rank; ++i) {
    const int64_t size = offset.sizes[offset.rank - i], want = like[rank - i];
    ok = i == 1 ? size == want : i == 2 ? size == 1 : size == 1 || size == want;
  }
  if (ok) return;
  Sizes target = like;
  if (rank >= 2) target[rank - 2] = 1;
  fail(op, offset.name, " must be ", dtypes_text(kFloats),
       " broadcastable to [..., 1, D] = ", sizes_text(target), ", got ", offset.found());
}

void check_lengths(const char* op, const Arg& arg, int64_t B) {
  const int64_t n = arg.numel();
  if (!arg.is(kInts) || (n != 1 && (arg.rank != 1 || n != B)))
    fail(op, arg.name, " must be ", dtypes_text(kInts), " with one element or [B] = [", B,
         "], got ", arg.found());
}

void check_device(const char* op, const Arg& first, const Arg& arg) {
  if (arg.device_type != first.device_type || arg.device_index != first.device_index)
    fail(op, arg.name, " must be on ", first.name, "'s device ", first.device(), ", got ",
         arg.device());
}
void check_device(const char* op, const Arg& first, const OptionalArg& arg) {
  if (arg) check_device(op, first, *arg);
}
template <class... Args>
void check_devices(const char* op, const Arg& first, const Args&... others) {
  (check_device(op, first, others), ...);
}

// --------------------------------------------------------------------------- tensors to structs

Dtype to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: return Dtype::f32;  // also for bytes and bools, whose view needs no type
  }
}

// [..., S, n] of up to four dimensions as [B, H, S, n]; sizes of 1 get stride 0.
View view(const Arg& arg) {
  View v{arg.tensor.data_ptr(), to_dtype(arg.dtype)};
  for (int64_t i = 0; i < arg.rank; ++i)
    v.stride[4 - arg.rank + i] = arg.sizes[i] == 1 ? 0 : arg.strides[i];
  return v;
}
View view(const Tensor& t) { return view(Arg("", t)); }

Integers integers(const OptionalArg& arg) {
  if (!arg) return {};
  Integers n{arg->tensor.data_ptr(), arg->dtype == ScalarType::Long};
  if (arg->numel() != 1) n.stride[0] = arg->strides[0];
  return n;
}

// Uninitialised, on the device of `like`. torch::stable::new_empty and empty_like look their op up
// by name and call it boxed: a microsecond each.
Tensor empty(const Tensor& like, const Sizes& sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i]))
    strides[i] = stride;
  return empty(like, sizes, strides.data(), dtype);
}

// The kernels read f32, f16 and bf16; a double is converted first.
Tensor without_double(const Tensor& t, ScalarType dtype) {
  return dtype == ScalarType::Double ? torch::stable::to(t, ScalarType::Float) : t;
}

const float* constant(const Arg& arg, std::vector<Tensor>& owned) {
  if (arg.dtype == ScalarType::Float && arg.tensor.is_contiguous())
    return static_cast<const float*>(arg.tensor.data_ptr());
  owned.push_back(torch::stable::contiguous(torch::stable::to(arg.tensor, ScalarType::Float)));
  return static_cast<const float*>(owned.back().data_ptr());
}

// More than four dimensions are folded into one; that may copy.
Tensor fold(const Tensor& t) {
  const auto sizes = t.sizes();
  const size_t rank = sizes.size();
  if (rank <= 4) return t;
  int64_t outer = 1;
  for (size_t i = 0; i + 2 < rank; ++i) outer *= sizes[i];
  return torch::stable::reshape(t, {1, outer, sizes[rank - 2], sizes[rank - 1]});
}

View offset_view(const OptionalArg& offset, const Sizes& like, std::vector<Tensor>& owned) {
  if (!offset) return {};
  Tensor t = without_double(offset->tensor, offset->dtype);
  if (like.size() > 4) {  // expand it, so that it can be folded as `like` is
    Sizes target = like;
    target[target.size() - 2] = 1;
    Tensor expanded = torch::stable::new_empty(t, target);
    torch::stable::copy_(expanded, t);
    t = fold(expanded);
  }
  owned.push_back(t);
  return view(t);
}

Sizes with_last(Sizes sizes, int64_t last) {
  sizes.back() = last;
  return sizes;
}

template <class Problem>
void set_sizes(Problem& p, const Tensor& folded, int64_t D) {
  const auto sizes = folded.sizes();
  const auto from_end = [&](size_t i) { return i <= sizes.size() ? sizes[sizes.size() - i] : 1; };
  p.B = from_end(4), p.H = from_end(3), p.S = from_end(2), p.D = D;
}

}  // namespace

// ------------------------------------------------------------------------------------- problems

Checked<CompressProblem> check_compress(const Tensor& x_, const Tensor& rotation_,
                                        const Tensor& boundaries_, const OptionalTensor& centroids_,
                                        const std::string& norm, const OptionalTensor& offset_) {
  const char* op = "compress";
  const Arg x("x", x_), rotation("rotation", rotation_), boundaries("boundaries", boundaries_);
  const OptionalArg centroids = optional_arg("centroids", centroids_);
  const OptionalArg offset = optional_arg("offset", offset_);
  if (!x.is(kFloats) || x.rank < 1)
    fail(op, "x must be ", dtypes_text(kFloats), " [..., D], got ", x.found());
  const int64_t D = x.last_size();
  const Sizes sizes = x.all_sizes();
  check_head_dim(op, x, D);
  check_rotation(op, rotation, D);
  check_boundaries(op, boundaries);
  if (centroids) check_centroids(op, *centroids);
  const NormPolicy policy = check_policy(op, "norm", norm, centroids);
  if (offset) check_offset(op, *offset, sizes);
  check_devices(op, x, rotation, boundaries, centroids, offset);

  Checked<CompressProblem> checked;
  CompressProblem& p = checked.problem;
  const Tensor values = fold(without_double(x_, x.dtype));
  const Tensor packed = empty(x_, with_last(sizes, D / 2), ScalarType::Byte);
  const Tensor norms = empty(x_, with_last(sizes, 1), ScalarType::BFloat16);
  set_sizes(p, values, D);
  p.capacity = p.S;
  p.slot = {};
  p.x = view(values);
  p.offset = offset_view(offset, sizes, checked.owned);
  p.packed = view(fold(packed));
  p.norms = view(fold(norms));
  p.rotation = constant(rotation, checked.owned);
  p.boundaries = constant(boundaries, checked.owned);
  p.centroids = centroids ? constant(*centroids, checked.owned) : nullptr;
  p.policy = policy;
  checked.owned.push_back(values);
  checked.outputs = {packed, norms};
  return checked;
}

Checked<DecompressProblem> check_decompress(const Tensor& packed_, const Tensor& norms_,
                                            const Tensor& centroids_, const Tensor& rotation_,
                                            const OptionalTensor& offset_,
                                            std::optional<ScalarType> dtype) {
  const char* op = "decompress";
  const Arg packed("packed", packed_), norms("norms", norms_);
  const Arg centroids("centroids", centroids_), rotation("rotation", rotation_);
  const OptionalArg offset = optional_arg("offset", offset_);
  if (!packed.is(kByte) || packed.rank < 1)
    fail(op, "packed must be uint8 [..., D/2], got ", packed.found());
  const int64_t D = 2 * packed.last_size();
  const Sizes sizes = with_last(packed.all_sizes(), D);
  check_head_dim(op, packed, D);
  check_shape(op, norms, kNormDtypes, "[..., 1]", with_last(sizes, 1));
  check_centroids(op, centroids);
  check_rotation(op, rotation, D);
  if (offset) check_offset(op, *offset, sizes);
  const ScalarType out_dtype = dtype.value_or(norms.dtype);
  if (std::find(kFloats.begin(), kFloats.end(), out_dtype) == kFloats.end())
    fail(op, "dtype must be ", dtypes_text(kFloats), ", got ", name(out_dtype));
  check_devices(op, packed, norms, centroids, rotation, offset);

  Checked<DecompressProblem> checked;
  DecompressProblem& p = checked.problem;
  const Tensor bytes = fold(packed_), lengths = fold(norms_);
  const bool wide = out_dtype == ScalarType::Double;  // the caller converts
  const Tensor x = empty(packed_, sizes, wide ? ScalarType::Float : out_dtype);
  set_sizes(p, bytes, D);
  p.packed = view(bytes);
  p.norms = view(lengths);
  p.offset = offset_view(offset, sizes, checked.owned);
  p.x = view(fold(x));
  p.rotation = constant(rotation, checked.owned);
  p.centroids = constant(centroids, checked.owned);
  checked.owned.insert(checked.owned.end(), {bytes, lengths});
  checked.outputs = {x};
  return checked;
}

CheckedUpdate check_update(const Tensor& k_, const Tensor& v_, const Tensor& input_pos_,
                           const Tensor& rotation_, const Tensor& boundaries_,
                           const Tensor& k_packed_, const Tensor& k_norms_, const Tensor& v_packed_,
                           const Tensor& v_norms_, const OptionalTensor& centroids_,
                           const std::string& k_norm, const std::string& v_norm,
                           const OptionalTensor& k_offset_) {
  const char* op = "update_";
  const Arg k("k", k_), v("v", v_), input_pos("input_pos", input_pos_);
  const Arg rotation("rotation", rotation_), boundaries("boundaries", boundaries_);
  const Arg k_packed("k_packed", k_packed_), k_norms("k_norms", k_norms_);
  const Arg v_packed("v_packed", v_packed_), v_norms("v_norms", v_norms_);
  const OptionalArg centroids = optional_arg("centroids", centroids_);
  const OptionalArg k_offset = optional_arg("k_offset", k_offset_);

  check_rank(op, k, kFloats, 4, "[B, H, T, D]");
  const int64_t B = k.sizes[0], H = k.sizes[1], T = k.sizes[2], D = k.sizes[3];
  check_head_dim(op, k, D);
  check_shape(op, v, {k.dtype}, "[B, H, T, D]", {B, H, T, D});
  check_rank(op, k_packed, kByte, 4, "[B, H, S, D/2]");
  const int64_t S = k_packed.sizes[2];
  check_shape(op, k_packed, kByte, "[B, H, S, D/2]", {B, H, S, D / 2});
  check_shape(op, k_norms, kNormDtypes, "[B, H, S, 1]", {B, H, S, 1});
  check_shape(op, v_packed, kByte, "[B, H, S, D/2]", {B, H, S, D / 2});
  check_shape(op, v_norms, kNormDtypes, "[B, H, S, 1]", {B, H, S, 1});
  const int64_t rank = input_pos.rank;
  if (!input_pos.is(kInts) || rank < 1 || rank > 2 || input_pos.last_size() != T ||
      (rank == 2 && input_pos.sizes[0] != B))
    fail(op, "input_pos must be ", dtypes_text(kInts), " [T] or [B, T] = [", T, "] or [", B, ", ",
         T, "], got ", input_pos.found());
  if (T > S) fail(op, "k must have at most as many tokens as the cache, got T = ", T, ", S = ", S);
  check_rotation(op, rotation, D);
  check_boundaries(op, boundaries);
  if (centroids) check_centroids(op, *centroids);
  const NormPolicy k_policy = check_policy(op, "k_norm", k_norm, centroids);
  const NormPolicy v_policy = check_policy(op, "v_norm", v_norm, centroids);
  if (k_offset) check_offset(op, *k_offset, k.all_sizes());
  check_devices(op, k, v, input_pos, rotation, boundaries, k_packed, k_norms, v_packed, v_norms,
                centroids, k_offset);

  CheckedUpdate checked;
  CompressProblem& p = checked.k;
  p.B = B, p.H = H, p.S = T, p.D = D, p.capacity = S;
  p.slot = {input_pos_.data_ptr(), input_pos.dtype == ScalarType::Long};
  p.slot.stride[0] = rank == 2 ? input_pos.strides[0] : 0;
  p.slot.stride[1] = input_pos.strides[rank - 1];
  const Tensor k_values = without_double(k_, k.dtype), v_values = without_double(v_, v.dtype);
  p.x = view(k_values);
  p.offset = offset_view(k_offset, k.all_sizes(), checked.owned);
  p.packed = view(k_packed);
  p.norms = view(k_norms);
  p.rotation = constant(rotation, checked.owned);
  p.boundaries = constant(boundaries, checked.owned);
  p.centroids = centroids ? constant(*centroids, checked.owned) : nullptr;
  p.policy = k_policy;

  checked.v = checked.k;
  checked.v.x = view(v_values);
  checked.v.offset = {};
  checked.v.packed = view(v_packed);
  checked.v.norms = view(v_norms);
  checked.v.policy = v_policy;
  checked.owned.insert(checked.owned.end(), {k_values, v_values});
  return checked;
}

Checked<AttentionProblem> check_attention(
    const char* op, const Tensor& query_, const Tensor& k_packed_, const Tensor& k_norms_,
    const Tensor& v_packed_, const Tensor& v_norms_, const Tensor& centroids_,
    const Tensor& rotation_, const OptionalTensor& attn_mask_, bool is_causal,
    std::optional<double> scale, const OptionalTensor& kv_len_, bool mask_is_causal,
    const OptionalTensor& kv_start_, std::optional<double> softcap, const OptionalTensor& sinks_,
    bool with_lse) {
  const Arg query("query", query_), centroids("centroids", centroids_);
  const Arg rotation("rotation", rotation_);
  const Arg k_packed("k_packed", k_packed_), k_norms("k_norms", k_norms_);
  const Arg v_packed("v_packed", v_packed_), v_norms("v_norms", v_norms_);
  const OptionalArg mask = optional_arg("attn_mask", attn_mask_);
  const OptionalArg kv_len = optional_arg("kv_len", kv_len_);
  const OptionalArg kv_start = optional_arg("kv_start", kv_start_);
  const OptionalArg sinks = optional_arg("sinks", sinks_);

  check_rank(op, query, kQueryDtypes, 4, "[B, Hq, Lq, D]");
  const int64_t B = query.sizes[0], Hq = query.sizes[1], Lq = query.sizes[2], D = query.sizes[3];
  check_head_dim(op, query, D);
  check_rank(op, k_packed, kByte, 4, "[B, Hkv, Lkv, D/2]");
  const int64_t Hkv = k_packed.sizes[1], Lkv = k_packed.sizes[2];
  if (Hkv < 1 || Hq % Hkv != 0)
    fail(op, "k_packed must have Hkv >= 1 heads that divide Hq = ", Hq, ", got Hkv = ", Hkv);
  check_shape(op, k_packed, kByte, "[B, Hkv, Lkv, D/2]", {B, Hkv, Lkv, D / 2});
  check_shape(op, k_norms, kNormDtypes, "[B, Hkv, Lkv, 1]", {B, Hkv, Lkv, 1});
  check_shape(op, v_packed, kByte, "[B, Hkv, Lkv, D/2]", {B, Hkv, Lkv, D / 2});
  check_shape(op, v_norms, kNormDtypes, "[B, Hkv, Lkv, 1]", {B, Hkv, Lkv, 1});
  check_centroids(op, centroids);
  check_rotation(op, rotation, D);
  if (mask && (mask->dtype != ScalarType::Bool || mask->rank != 4 ||
               (mask->sizes[0] != 1 && mask->sizes[0] != B) || mask->sizes[1] != 1 ||
               mask->sizes[2] != Lq || mask->sizes[3] != Lkv))
    fail(op, "attn_mask must be bool [B or 1, 1, Lq, Lkv] = [", B, " or 1, 1, ", Lq, ", ", Lkv,
         "], got ", mask->found());
  if (is_causal && mask_is_causal)
    fail(op, "is_causal and mask_is_causal exclude each other, got both True");
  if (is_causal && Lq != Lkv)
    fail(op,
         "is_causal must come with Lq == Lkv (mask_is_causal is the rule for queries at the end "
         "of a longer context), got Lq = ",
         Lq, ", Lkv = ", Lkv);
  if (kv_len) check_lengths(op, *kv_len, B);
  if (kv_start) check_lengths(op, *kv_start, B);
  if (sinks) check_shape(op, *sinks, kSinkDtypes, "[Hq]", {Hq});
  if (scale && !std::isfinite(*scale)) fail(op, "scale must be finite, got ", *scale);
  if (softcap && !(std::isfinite(*softcap) && *softcap > 0))
    fail(op, "softcap must be finite and above 0, got ", *softcap);
  check_devices(op, query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, mask, kv_len,
                kv_start, sinks);

  Checked<AttentionProblem> checked;
  AttentionProblem& p = checked.problem;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lkv = Lkv, p.D = D;
  // In the query's memory layout where that is dense, in its order of strides otherwise.
  const Tensor out = query_.is_contiguous()
                         ? empty(query_, query.all_sizes(), query_.strides().data(), query.dtype)
                         : torch::stable::empty_like(query_);
  checked.outputs.push_back(out);
  p.query = view(query);
  p.out = view(out);
  p.k_packed = view(k_packed);
  p.k_norms = view(k_norms);
  p.v_packed = view(v_packed);
  p.v_norms = view(v_norms);
  if (mask) p.mask = view(*mask);
  p.kv_len = integers(kv_len);
  p.kv_start = integers(kv_start);
  if (sinks) {
    p.sinks = {sinks_->data_ptr(), to_dtype(sinks->dtype)};
    p.sinks.stride[1] = sinks->strides[0];
  }
  p.rotation = constant(rotation, checked.owned);
  p.centroids = constant(centroids, checked.owned);
  p.lse = nullptr;
  if (with_lse) {
    const Tensor lse = empty(query_, {B, Hq, Lq}, ScalarType::Float);
    p.lse = static_cast<float*>(lse.data_ptr());
    checked.outputs.push_back(lse);
  }
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(D))));
  p.softcap = static_cast<float>(softcap.value_or(0));
  p.causal = is_causal || mask_is_causal;
  return checked;
}

}  // namespace tq
