#include "decode.cuh"

template cudaError_t tq::cuda::launch_decode<192>(const DecodeTask&, cudaStream_t);
