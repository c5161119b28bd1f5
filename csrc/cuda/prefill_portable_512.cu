#include "prefill_portable.cuh"

template cudaError_t tq::cuda::launch_portable_prefill<512>(const PrefillTask&, cudaStream_t);
