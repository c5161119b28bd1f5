#include "prefill.cuh"

template cudaError_t tq::cuda::launch_prefill_dim<192>(const PrefillTask&, cudaStream_t);
