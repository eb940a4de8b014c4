// What export/samples/tensorrt.cpp uses of TensorRT's NvInferRuntime.h, with its signatures, and the networks of stand_in.h: the tests run
// the sample without TensorRT. An engine is a file that holds the name of its network.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>

#include "stand_in.h"

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
    explicit IExecutionContext(const std::string& part) : part(part) {}
    virtual ~IExecutionContext() noexcept = default;
    bool setInputShape(const char* tensorName, const Dims& dims) noexcept {
        shapes[tensorName] = dims;
        return true;
    }
    bool setTensorAddress(const char* tensorName, void* data) noexcept {
        held[tensorName] = data;
        return true;
    }
    Dims getTensorShape(const char*) const noexcept {
        if (part == "text_encoder") return {3, {1, shapes.at("input_ids").d[1], stand_in::WIDTH}};
        if (part == "unet") return shapes.at("sample");
        const Dims& x = shapes.at("latent_sample");
        return {4, {1, 3, x.d[2], x.d[3]}};
    }
    bool enqueueV3(cudaStream_t) noexcept {
        if (part == "text_encoder") put("last_hidden_state", stand_in::text_encoder((const int64_t*)held.at("input_ids"), int(size("input_ids"))));
        if (part == "unet") put("out_sample", stand_in::unet(get("sample"), *(const float*)held.at("timestep"), get("encoder_hidden_states"), held.count("timestep_cond") ? get("timestep_cond") : std::vector<float>()));
        if (part == "vae_decoder") put("sample", stand_in::vae_decoder(get("latent_sample"), int(size("latent_sample") / shapes["latent_sample"].d[1])));
        return true;
    }

private:
    std::string part;
    std::map<std::string, Dims> shapes;
    std::map<std::string, void*> held;

    size_t size(const char* name) const {
        size_t out = 1;
        for (int i = 0; i < shapes.at(name).nbDims; i++) out *= size_t(shapes.at(name).d[i]);
        return out;
    }
    std::vector<float> get(const char* name) const { return {(const float*)held.at(name), (const float*)held.at(name) + size(name)}; }
    void put(const char* name, const std::vector<float>& values) { std::memcpy(held.at(name), values.data(), values.size() * 4); }
};

class ICudaEngine {
public:
    explicit ICudaEngine(const std::string& part) : part(part) {}
    virtual ~ICudaEngine() noexcept = default;
    IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(part); }

private:
    std::string part;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine* deserializeCudaEngine(const void* blob, size_t size) noexcept {
        return size ? new ICudaEngine(std::string((const char*)blob, size)) : nullptr;
    }
};

inline IRuntime* createInferRuntime(ILogger&) noexcept { return new IRuntime; }
}  // namespace nvinfer1
