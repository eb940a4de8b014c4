// What export/samples/ncnn.cpp uses of ncnn's net.h and mat.h, with ncnn's signatures and no bodies: for a syntax check where ncnn is not installed.
#pragma once
#include <cstddef>

#define NCNN_VULKAN 1

namespace ncnn {
struct Allocator;
int get_gpu_count();

class Mat {
public:
    Mat();
    explicit Mat(int w, size_t elemsize = 4u, Allocator* allocator = 0);
    Mat(int w, int h, int c, size_t elemsize = 4u, Allocator* allocator = 0);
    Mat(int w, void* data, size_t elemsize = 4u, Allocator* allocator = 0);
    Mat clone(Allocator* allocator = 0) const;
    Mat channel(int c);
    const Mat channel(int c) const;
    float& operator[](size_t i);
    template <typename T> operator T*();
    template <typename T> operator const T*() const;
    int w, h, d, c;
};

struct Option {
    bool use_vulkan_compute;
};

class Extractor {
public:
    int input(const char* blob_name, const Mat& in);
    int extract(const char* blob_name, Mat& feat, int type = 0);
};

class Net {
public:
    Option opt;
    int load_param(const char* protopath);
    int load_model(const char* modelpath);
    Extractor create_extractor() const;
};
}  // namespace ncnn
