// An image with TensorRT 10 or 11: an export of `sdlite export MODEL --target tensorrt`. TensorRT for RTX (`--target tensorrt-rtx`) has
// the same classes: include <NvInferRuntime.h> of its SDK and link tensorrt_rtx instead of nvinfer.
//
//   g++ -std=c++17 -O2 tensorrt.cpp -o image -I$CUDA_HOME/include -L$CUDA_HOME/lib64 -lnvinfer -lcudart
//   ./image DIR "red apple" image.ppm 7           DIR: the exported folder; 7: the seed
//
// sdlite.h has the tokenizer, the noise and the sampling steps, from DIR/sdlite-device.txt: the image is Python's. Names and types are those
// of sdlite/spec.py; the engines take any batch of the profile's range, here 1.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>

#include "sdlite.h"

static void ok(cudaError_t e) {
    if (e != cudaSuccess) sdlite::fail(std::string("CUDA: ") + cudaGetErrorString(e));
}

struct Log : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) fprintf(stderr, "%s\n", message);
    }
};

// A host array with its shape; `data` is not owned.
struct Array {
    const void* data;
    nvinfer1::Dims shape;
    size_t bytes;
};

static Array array(const void* data, size_t size_of, std::vector<int64_t> shape) {
    Array out{data, {}, size_of};
    out.shape.nbDims = int32_t(shape.size());
    for (size_t i = 0; i < shape.size(); i++) out.shape.d[i] = shape[i], out.bytes *= size_t(shape[i]);
    return out;
}

// One network of the exported folder. Device buffers stay from call to call.
struct Network {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    std::map<std::string, std::pair<void*, size_t>> buffers;
    std::string result;

    Network(nvinfer1::IRuntime& runtime, const std::string& folder, const std::string& result) : result(result) {
        std::ifstream file(folder + "/model.engine", std::ios::binary);
        const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
        engine.reset(runtime.deserializeCudaEngine(bytes.data(), bytes.size()));
        if (!engine) sdlite::fail(folder + "/model.engine is not for this GPU and TensorRT; export it on this machine");
        context.reset(engine->createExecutionContext());
    }
    ~Network() {
        for (auto& [name, buffer] : buffers) cudaFree(buffer.first);
    }

    void* bind(const std::string& name, size_t bytes) {
        auto& [address, size] = buffers[name];
        if (bytes > size) {
            if (address) ok(cudaFree(address));
            ok(cudaMalloc(&address, bytes));
            size = bytes;
        }
        context->setTensorAddress(name.c_str(), address);
        return address;
    }

    std::vector<float> operator()(cudaStream_t stream, const std::map<std::string, Array>& inputs) {
        for (const auto& [name, x] : inputs) {
            if (!context->setInputShape(name.c_str(), x.shape)) sdlite::fail("the engine was not built for this shape of " + name);
            ok(cudaMemcpyAsync(bind(name, x.bytes), x.data, x.bytes, cudaMemcpyHostToDevice, stream));
        }
        const nvinfer1::Dims shape = context->getTensorShape(result.c_str());
        size_t count = 1;
        for (int i = 0; i < shape.nbDims; i++) count *= size_t(shape.d[i]);
        std::vector<float> out(count);
        void* address = bind(result, count * sizeof(float));
        if (!context->enqueueV3(stream)) sdlite::fail("TensorRT could not run the network; its log has the reason");
        ok(cudaMemcpyAsync(out.data(), address, count * sizeof(float), cudaMemcpyDeviceToHost, stream));
        ok(cudaStreamSynchronize(stream));
        return out;
    }
};

// folder: the export; out: a PPM file. Raises std::runtime_error.
static void make_image(const std::string& folder, const std::string& prompt, uint64_t seed, const std::string& out) {
    const sdlite::Device device(folder);
    Log log;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
    Network text(*runtime, folder + "/text_encoder", "last_hidden_state"), unet(*runtime, folder + "/unet", "out_sample"),
        decoder(*runtime, folder + "/vae_decoder", "sample");
    cudaStream_t stream;
    ok(cudaStreamCreate(&stream));
    const auto latents = [&](const std::vector<float>& x) {
        return array(x.data(), sizeof(float), {1, device.channels, device.height, device.width});
    };

    const auto encode = [&](const std::vector<int>& ids) {
        const std::vector<int64_t> wide(ids.begin(), ids.end());
        return text(stream, {{"input_ids", array(wide.data(), sizeof(int64_t), {1, device.length})}});
    };
    const auto predict = [&](const std::vector<float>& x, float time, const std::vector<float>& e) {
        std::map<std::string, Array> inputs{
            {"sample", latents(x)},
            {"timestep", array(&time, sizeof(float), {})},
            {"encoder_hidden_states", array(e.data(), sizeof(float), {1, device.length, int64_t(e.size()) / device.length})}};
        for (const auto& [name, values] : device.more) inputs[name] = array(values.data(), sizeof(float), {1, int64_t(values.size())});
        return unet(stream, inputs);
    };
    const std::vector<float> z = sdlite::sample(device, prompt, seed, encode, predict);
    const std::vector<float> image = decoder(stream, {{"latent_sample", latents(z)}});
    const nvinfer1::Dims shape = decoder.context->getTensorShape("sample");
    sdlite::save(out, image, int(shape.d[3]), int(shape.d[2]));
    ok(cudaStreamDestroy(stream));
}

int main(int argc, char** argv) try {
    const sdlite::Arguments given(argc, argv);
    make_image(given.folder, given.prompt, given.seed, given.image);
    return 0;
} catch (const std::exception& e) {
    fprintf(stderr, "%s\n", e.what());
    return 1;
}
