// One picture with ncnn: an export of `sdlite export MODEL --target ncnn-fp16`, on Android (NDK), ARM boards or a PC, on Vulkan or the CPU.
//
//   g++ -O2 ncnn.cpp -o picture $(pkg-config --cflags --libs ncnn)        PC, board; Android: android/CMakeLists.txt
//   ./picture DIR inputs.bin picture.ppm                                  inputs.bin: python inputs.py DIR "red apple" inputs.bin
//
// The tokenizer and the schedule are not in C++: inputs.bin has the token ids, the noise and two numbers for each step (Python or
// sdlite.js of the web export make them). Names: in0, in1, ... in the order of sdlite/spec.py without the batch axis; out0.

#include "net.h"  // ncnn

#include "picture.h"

// One network of the exported folder.
struct Network {
    ncnn::Net net;

    explicit Network(const std::string& folder) {
#if NCNN_VULKAN
        net.opt.use_vulkan_compute = ncnn::get_gpu_count() > 0;
#endif
        if (net.load_param((folder + "/model.param").c_str()) || net.load_model((folder + "/model.bin").c_str()))
            throw std::runtime_error(folder + " holds no network that this ncnn can load; export it again");
    }

    ncnn::Mat operator()(const std::vector<ncnn::Mat>& inputs) {
        ncnn::Extractor run = net.create_extractor();
        for (size_t i = 0; i < inputs.size(); i++) run.input(("in" + std::to_string(i)).c_str(), inputs[i]);
        ncnn::Mat out;
        if (run.extract("out0", out)) throw std::runtime_error("ncnn could not run the network; most often too little memory");
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
static void picture(const std::string& folder, const std::string& inputs, const std::string& out) {
    const Inputs in = load_inputs(inputs.c_str());
    Network text(folder + "/text_encoder"), unet(folder + "/unet"), decoder(folder + "/vae_decoder");

    const ncnn::Mat embeds = text({ncnn::Mat(in.length, (void*)in.ids.data()).clone()});
    const ncnn::Mat no_embeds = text({ncnn::Mat(in.length, (void*)in.no_ids.data()).clone()});
    std::vector<float> x = in.latents;
    for (int i = 0; i < in.steps; i++) {
        ncnn::Mat t(1);
        t[0] = in.timesteps[i];
        const ncnn::Mat sample = to_mat(x, in.width, in.height, in.channels);
        std::vector<float> v = from_mat(unet({sample, t, embeds}));
        if (in.guidance > 1.f) guide(in, from_mat(unet({sample, t, no_embeds})), v);
        ddim(in, i, v, x);
    }
    for (float& value : x) value /= in.scaling_factor;
    const ncnn::Mat image = decoder({to_mat(x, in.width, in.height, in.channels)});
    save(out.c_str(), from_mat(image), image.w, image.h);
}

int main(int argc, char** argv) try {
    if (argc != 4) throw std::runtime_error("usage: picture DIR inputs.bin picture.ppm");
    picture(argv[1], argv[2], argv[3]);
    return 0;
} catch (const std::exception& e) {
    fprintf(stderr, "%s\n", e.what());
    return 1;
}
