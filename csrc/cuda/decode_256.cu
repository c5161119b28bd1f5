#include "decode.cuh"

template cudaError_t tq::cuda::launch_decode<256>(const DecodeTask&, cudaStream_t);
