#include "prefill_portable.cuh"

template cudaError_t tq::cuda::launch_portable_prefill<96>(const PrefillTask&, cudaStream_t);
