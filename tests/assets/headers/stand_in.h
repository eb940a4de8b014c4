// The networks of the stand-ins: what anyone can compute. Shapes without the batch: ids (L), embeddings (L, 4), latents (C, h, w),
// image (3, h, w).
#pragma once
#include <string>
#include <vector>

namespace stand_in {
constexpr int WIDTH = 4;

template <typename Id> std::vector<float> text_encoder(const Id* ids, int length) {
    std::vector<float> out;
    for (int i = 0; i < length; i++)
        for (int d = 0; d < WIDTH; d++) out.push_back((float(ids[i] % 97) / 97 - 0.5f) * float((i + d) % 3));
    return out;
}

inline std::vector<float> unet(std::vector<float> x, float time, const std::vector<float>& embeddings, const std::vector<float>& more) {
    float mean = 0;
    for (size_t i = 0; i < more.size(); i++) mean += more[i] * float(i) / 100;
    for (const float e : embeddings) mean += e / float(embeddings.size());
    for (float& v : x) v = v / 2 + time / 4000 + mean;
    return x;
}

inline std::vector<float> vae_decoder(const std::vector<float>& x, int plane) {
    return {x.begin(), x.begin() + 3 * plane};  // its first three channels
}
}  // namespace stand_in
