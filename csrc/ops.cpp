// START HERE: every op of turboquant, on one page.
//
// torch.ops.turboquant.* are declared below through torch's stable ABI (STABLE_TORCH_LIBRARY),
// which registers with the same dispatcher as TORCH_LIBRARY and lets one build run on torch 2.10
// and later. Each backend registers its implementations in its own ops.cpp: csrc/cpu/ops.cpp,
// csrc/cuda/ops.cpp. The fake kernels, which tell torch.compile and torch.export the output shapes,
// are in turboquant/ops.py beside the documented Python functions.
//
// These signatures are frozen: new arguments are appended, keyword-only, with defaults, so that a
// model exported against an older schema runs on a newer library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(turboquant, m) {
  m.def(
      "compress(Tensor x, Tensor rotation, Tensor boundaries, *, Tensor? centroids=None, "
      "str norm='l2', Tensor? offset=None) -> (Tensor packed, Tensor norms)");
  m.def(
      "decompress(Tensor packed, Tensor norms, Tensor centroids, Tensor rotation, *, "
      "Tensor? offset=None, ScalarType? dtype=None) -> Tensor");
  m.def(
      "update_(Tensor k, Tensor v, Tensor input_pos, Tensor rotation, Tensor boundaries, "
      "Tensor(a!) k_packed, Tensor(b!) k_norms, Tensor(c!) v_packed, Tensor(d!) v_norms, *, "
      "Tensor? centroids=None, str k_norm='l2', str v_norm='l2', Tensor? k_offset=None) -> ()");
  m.def(
      "tq4_sdpa(Tensor query, Tensor k_packed, Tensor k_norms, Tensor v_packed, Tensor v_norms, "
      "Tensor centroids, Tensor rotation, Tensor? attn_mask=None, bool is_causal=False, "
      "float? scale=None, Tensor? kv_len=None, bool mask_is_causal=False) -> Tensor");
  m.def(
      "tq4_attention(Tensor query, Tensor k_packed, Tensor k_norms, Tensor v_packed, "
      "Tensor v_norms, Tensor centroids, Tensor rotation, Tensor? attn_mask=None, "
      "bool is_causal=False, float? scale=None, Tensor? kv_len=None, bool mask_is_causal=False, "
      "*, Tensor? kv_start=None, float? softcap=None, Tensor? sinks=None) "
      "-> (Tensor out, Tensor lse)");

  // Private, for tests and `turboquant info`. `_cpu_isas`: the instruction sets that this host can
  // run, separated by blanks. `_cpu_isa`: the one in use, after switching to `use` if it is given.
  // `_cpu_amx`: whether attention of bf16 queries may go to the matrix units, after setting it:
  // many rows through torch's attention (csrc/cpu/prefill.cpp), others where the processor has AMX
  // (csrc/cpu/amx.cpp).
  m.def("_cpu_isas() -> str");
  m.def("_cpu_isa(str? use=None) -> str");
  m.def("_cpu_amx(bool? use=None) -> bool");
}
