#include "decode.cuh"

template cudaError_t tq::cuda::launch_decode<128>(const DecodeTask&, cudaStream_t);
