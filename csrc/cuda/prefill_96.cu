#include "prefill.cuh"

template cudaError_t tq::cuda::launch_prefill_dim<96>(const PrefillTask&, cudaStream_t);
