#include "prefill.cuh"

template cudaError_t tq::cuda::launch_prefill_dim<128>(const PrefillTask&, cudaStream_t);
