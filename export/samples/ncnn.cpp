// An image with ncnn: an export of `sdlite export MODEL --target ncnn-fp16`, on Android (NDK), ARM boards or a PC, on Vulkan or the CPU.
//
//   g++ -std=c++17 -O2 ncnn.cpp -o image $(pkg-config --cflags --libs ncnn)        PC, board; Android: android/CMakeLists.txt
//   ./image DIR "red apple" image.ppm 7                                            DIR: the exported folder; 7: the seed
//
// sdlite.h has the tokenizer, the noise and the sampling steps, from DIR/sdlite-device.txt: the image is Python's. Networks: in0, in1, ... in
// the order of sdlite/spec.py without the batch axis; out0.

#include "net.h"  // ncnn

#include "sdlite.h"

// One network of the exported folder.
struct Network {
    ncnn::Net net;

    explicit Network(const std::string& folder) {
#if NCNN_VULKAN
        net.opt.use_vulkan_compute = ncnn::get_gpu_count() > 0;
#endif
        if (net.load_param((folder + "/model.param").c_str()) || net.load_model((folder + "/model.bin").c_str()))
            sdlite::fail(folder + " holds no network that this ncnn can load; export it again");
    }

    ncnn::Mat operator()(const std::vector<ncnn::Mat>& inputs) {
        ncnn::Extractor run = net.create_extractor();
        for (size_t i = 0; i < inputs.size(); i++) run.input(("in" + std::to_string(i)).c_str(), inputs[i]);
        ncnn::Mat out;
        if (run.extract("out0", out)) sdlite::fail("ncnn could not run the network; most often too little memory");
        return out;
    }
};

// ncnn pads the channels of a Mat: copy from and to plain (C, h, w) memory.
static ncnn::Mat to_mat(const std::vector<float>& x, int w, int h, int c) {
    ncnn::Mat out(w, h, c);
    for (int k = 0; k < c; k++) std::copy(x.begin() + size_t(k) * w * h, x.begin() + size_t(k + 1) * w * h, (float*)out.channel(k));
    return out;
}

static std::vector<float> from_mat(const ncnn::Mat& m) {
    std::vector<float> out;
    for (int k = 0; k < m.c; k++) out.insert(out.end(), (const float*)m.channel(k), (const float*)m.channel(k) + size_t(m.w) * m.h);
    return out;
}

// folder: the export; out: a PPM file. Raises std::runtime_error.
static void make_image(const std::string& folder, const std::string& prompt, uint64_t seed, const std::string& out) {
    const sdlite::Device device(folder);
    Network text(folder + "/text_encoder"), unet(folder + "/unet"), decoder(folder + "/vae_decoder");
    const auto latents = [&](const std::vector<float>& x) { return to_mat(x, device.width, device.height, device.channels); };

    const auto encode = [&](const std::vector<int>& ids) { return text({ncnn::Mat(device.length, (void*)ids.data()).clone()}); };
    const auto predict = [&](const std::vector<float>& x, float time, const ncnn::Mat& embeds) {
        ncnn::Mat t(1);
        t[0] = time;
        std::vector<ncnn::Mat> inputs{latents(x), t, embeds};
        for (const auto& [name, values] : device.more) inputs.push_back(ncnn::Mat(int(values.size()), (void*)values.data()).clone());
        return from_mat(unet(inputs));
    };
    const ncnn::Mat image = decoder({latents(sdlite::sample(device, prompt, seed, encode, predict))});
    sdlite::save(out, from_mat(image), image.w, image.h);
}

int main(int argc, char** argv) try {
    const sdlite::Arguments given(argc, argv);
    make_image(given.folder, given.prompt, given.seed, given.image);
    return 0;
} catch (const std::exception& e) {
    fprintf(stderr, "%s\n", e.what());
    return 1;
}
