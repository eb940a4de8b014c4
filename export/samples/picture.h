// What inputs.py writes, and the picture that comes out. Used by ncnn.cpp and tensorrt.cpp.
#pragma once

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

// What inputs.bin holds, all little-endian: int32 header, then the arrays.
struct Inputs {
    int length, channels, height, width, steps;  // tokens; latents; sampling steps
    float guidance, scaling_factor;
    std::vector<int> ids, no_ids;  // the prompt, and the empty prompt for guidance
    std::vector<float> latents, timesteps;
    std::vector<float> signal, noise, to_signal, to_noise;  // square roots of alpha-bar and of 1 - alpha-bar: of each step, and where it goes
};

template <typename T> void read(FILE* f, T* to, size_t n) {
    if (fread(to, sizeof(T), n, f) != n) throw std::runtime_error("inputs.bin is cut off; make it again with inputs.py");
}

inline Inputs load_inputs(const char* path) {
    FILE* f = fopen(path, "rb");
    if (!f) throw std::runtime_error(std::string("cannot open ") + path);
    Inputs in;
    int head[5];
    float scale[2];
    read(f, head, 5);
    read(f, scale, 2);
    in.length = head[0], in.channels = head[1], in.height = head[2], in.width = head[3], in.steps = head[4];
    in.guidance = scale[0], in.scaling_factor = scale[1];
    in.ids.resize(in.length), in.no_ids.resize(in.length);
    in.latents.resize(size_t(in.channels) * in.height * in.width);
    for (std::vector<float>* v : {&in.timesteps, &in.signal, &in.noise, &in.to_signal, &in.to_noise}) v->resize(in.steps);
    read(f, in.ids.data(), in.ids.size());
    read(f, in.no_ids.data(), in.no_ids.size());
    read(f, in.latents.data(), in.latents.size());
    for (std::vector<float>* v : {&in.timesteps, &in.signal, &in.noise, &in.to_signal, &in.to_noise}) read(f, v->data(), v->size());
    fclose(f);
    return in;
}

// DDIM, eta 0, for a student that predicts v: latents and prediction of step i -> latents of the next. Source: Song et al. 2020, eq. 12.
inline void ddim(const Inputs& in, int i, const std::vector<float>& v, std::vector<float>& x) {
    for (size_t k = 0; k < x.size(); k++) {
        const float x0 = in.signal[i] * x[k] - in.noise[i] * v[k], eps = in.signal[i] * v[k] + in.noise[i] * x[k];
        x[k] = in.to_signal[i] * x0 + in.to_noise[i] * eps;
    }
}

// u + g (v - u) into v
inline void guide(const Inputs& in, const std::vector<float>& u, std::vector<float>& v) {
    for (size_t k = 0; k < v.size(); k++) v[k] = u[k] + in.guidance * (v[k] - u[k]);
}

// image: 3 x height x width, about -1 to 1, as a PPM file
inline void save(const char* path, const std::vector<float>& image, int width, int height) {
    FILE* f = fopen(path, "wb");
    if (!f) throw std::runtime_error(std::string("cannot write ") + path);
    fprintf(f, "P6 %d %d 255\n", width, height);
    const int plane = width * height;
    for (int p = 0; p < plane; p++)
        for (int k = 0; k < 3; k++) fputc(int(std::fmin(std::fmax(image[k * plane + p] / 2 + 0.5f, 0.f), 1.f) * 255 + 0.5f), f);
    fclose(f);
}
