// What export/samples/ncnn.cpp uses of ncnn's net.h and mat.h, with ncnn's signatures, and the networks of stand_in.h: the tests run the
// sample where ncnn is not installed. A network is told by the folder of its file.
#pragma once
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>

#include "stand_in.h"

#define NCNN_VULKAN 1

namespace ncnn {
struct Allocator;
inline int get_gpu_count() { return 0; }

class Mat {
public:
    Mat() : Mat(0, 0, 0) {}
    explicit Mat(int w, size_t = 4u, Allocator* = 0) : Mat(w, 1, 1) {}
    Mat(int w, int h, int c, size_t = 4u, Allocator* = 0) : w(w), h(h), d(1), c(c) {
        memory = std::make_shared<std::vector<float>>(step() * size_t(c));
        data = memory->data();
    }
    Mat(int w, void* data, size_t = 4u, Allocator* = 0) : w(w), h(1), d(1), c(1), data((float*)data) {}
    Mat clone(Allocator* = 0) const {
        Mat out(w, h, c);
        std::memcpy(out.data, data, step() * size_t(c) * 4 - (step() - size_t(w) * h) * 4);
        return out;
    }
    Mat channel(int k) { return Mat(w, h, data + step() * size_t(k)); }
    const Mat channel(int k) const { return Mat(w, h, data + step() * size_t(k)); }
    float& operator[](size_t i) { return data[i]; }
    template <typename T> operator T*() { return (T*)data; }
    template <typename T> operator const T*() const { return (const T*)data; }
    int w, h, d, c;

private:
    Mat(int w, int h, float* data) : w(w), h(h), d(1), c(1), data(data) {}
    size_t step() const { return c > 1 ? (size_t(w) * h + 3) / 4 * 4 : size_t(w) * h; }  // channels are padded
    std::shared_ptr<std::vector<float>> memory;
    float* data;
};

struct Option {
    bool use_vulkan_compute;
};

class Extractor {
public:
    explicit Extractor(const std::string& part) : part(part) {}
    int input(const char* blob_name, const Mat& in) {
        given.emplace(blob_name, in);
        return 0;
    }
    int extract(const char* blob_name, Mat& feat, int = 0) {
        if (std::strcmp(blob_name, "out0")) return 1;
        const Mat& x = given.at("in0");
        if (part == "text_encoder") feat = filled(stand_in::WIDTH, x.w, 1, stand_in::text_encoder((const int*)x, x.w));
        if (part == "unet") feat = filled(x.w, x.h, x.c, stand_in::unet(plain(x), ((const float*)given.at("in1"))[0], plain(given.at("in2")), given.count("in3") ? plain(given.at("in3")) : std::vector<float>()));
        if (part == "vae_decoder") feat = filled(x.w, x.h, 3, stand_in::vae_decoder(plain(x), x.w * x.h));
        return 0;
    }

private:
    std::string part;
    std::map<std::string, Mat> given;

    static std::vector<float> plain(const Mat& m) {
        std::vector<float> out;
        for (int k = 0; k < m.c; k++) out.insert(out.end(), (const float*)m.channel(k), (const float*)m.channel(k) + m.w * m.h);
        return out;
    }

    static Mat filled(int w, int h, int c, const std::vector<float>& values) {
        Mat out(w, h, c);
        for (int k = 0; k < c; k++) std::memcpy((float*)out.channel(k), values.data() + size_t(k) * w * h, size_t(w) * h * 4);
        return out;
    }
};

class Net {
public:
    Option opt;
    int load_param(const char* protopath) {
        std::string path = protopath;
        path.resize(path.rfind('/'));
        part = path.substr(path.rfind('/') + 1);
        return 0;
    }
    int load_model(const char*) { return 0; }
    Extractor create_extractor() const { return Extractor(part); }

private:
    std::string part;
};
}  // namespace ncnn
