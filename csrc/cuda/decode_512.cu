#include "decode.cuh"

template cudaError_t tq::cuda::launch_decode<512>(const DecodeTask&, cudaStream_t);
