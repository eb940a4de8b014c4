// What export/samples/tensorrt.cpp uses of TensorRT's NvInferRuntime.h, with its signatures and no bodies: for a syntax check without TensorRT.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {
struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* msg) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;
    bool setInputShape(const char* tensorName, const Dims& dims) noexcept;
    bool setTensorAddress(const char* tensorName, void* data) noexcept;
    Dims getTensorShape(const char* tensorName) const noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept = default;
    IExecutionContext* createExecutionContext() noexcept;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine* deserializeCudaEngine(const void* blob, size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;
}  // namespace nvinfer1
