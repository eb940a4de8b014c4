// What export/samples/tensorrt.cpp uses of CUDA's runtime, with its signatures and no bodies: for a syntax check where CUDA is not installed.
#pragma once
#include <cstddef>

enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
typedef struct CUstream_st* cudaStream_t;
const char* cudaGetErrorString(cudaError_t error);
template <class T> cudaError_t cudaMalloc(T** address, size_t size);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
