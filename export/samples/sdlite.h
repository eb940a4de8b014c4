// What a program needs beside the networks of an export: tokens, noise, sampling steps and an image file, all from
// sdlite-device.txt in the exported folder (sdlite/exporters/device.py says what it holds). C++17, no other library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sdlite {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// --- sdlite-device.txt

struct Step {
    float time, scale, a, b, c;  // the UNet is given scale * x; its output v gives a x + b v + c z
    int draws;                   // 1 where z is a new draw of noise
};

struct Range {
    uint32_t first, last;
};

struct Added {
    int id;
    bool normalized;
    std::string text;
};

struct Device {
    int channels, height, width;  // of latents
    float guidance, scaling, shift, start;
    std::vector<std::pair<std::string, std::vector<float>>> more;  // further inputs of the UNet, in order
    std::vector<Step> steps;
    int length, bos, eos, pad, unk;  // tokens of a prompt, and ids
    std::vector<Added> added;
    std::unordered_map<std::string, int> vocab, ranks;  // token -> id, "a b" -> rank of that merge
    std::map<std::string, std::vector<Range>> classes;
    std::unordered_map<uint32_t, std::vector<uint32_t>> lower;

    explicit Device(const std::string& folder) : path(folder + "/sdlite-device.txt"), file(path) {
        if (!file) fail("cannot open " + path + "; export the model again (an export whose sampler C++ has not says so in its README)");
        if (words("sdlite-device", 1)[0] != "2") fail(path + " is of another version of sdlite; export the model again");
        const auto latents = words("latents", 3);
        channels = std::stoi(latents[0]), height = std::stoi(latents[1]), width = std::stoi(latents[2]);
        guidance = std::stof(words("guidance", 1)[0]);
        each("more", [&](std::istringstream& in) {
            std::string name;
            std::vector<float> values;
            in >> name;
            for (float x; in >> x;) values.push_back(x);
            if (values.empty()) broken();
            more.emplace_back(name, values);
        });
        const auto decoder = words("decoder", 2);
        scaling = std::stof(decoder[0]), shift = std::stof(decoder[1]);
        start = std::stof(words("start", 1)[0]);
        each("steps", [&](std::istringstream& in) {
            Step s;
            if (!(in >> s.time >> s.scale >> s.a >> s.b >> s.c >> s.draws)) broken();
            steps.push_back(s);
        });
        const auto ids = words("tokens", 5);
        length = std::stoi(ids[0]), bos = std::stoi(ids[1]), eos = std::stoi(ids[2]), pad = std::stoi(ids[3]), unk = std::stoi(ids[4]);
        each("added", [&](std::istringstream& in) {
            Added t;
            if (!(in >> t.id >> t.normalized) || !in.ignore() || !std::getline(in, t.text)) broken();
            added.push_back(t);
        });
        each("vocab", [&](std::istringstream& in) {
            int id;
            std::string token;
            if (!(in >> id >> token)) broken();
            vocab[token] = id;
        });
        each("merges", [&](std::istringstream& in) { ranks.emplace(in.str(), int(ranks.size())); });
        each("classes", [&](std::istringstream& in) {
            std::string kind;
            Range r;
            if (!(in >> kind >> r.first >> r.last)) broken();
            classes[kind].push_back(r);
        });
        each("lower", [&](std::istringstream& in) {
            uint32_t from, to;
            if (!(in >> from)) broken();
            while (in >> to) lower[from].push_back(to);
        });
    }

    bool is(const char* kind, uint32_t c) const {
        for (const Range& r : classes.at(kind))
            if (c <= r.last) return c >= r.first;
        return false;
    }

private:
    std::string path;
    std::ifstream file;

    [[noreturn]] void broken() const { fail(path + " is damaged or cut off; copy the exported folder again"); }

    std::string line() {
        std::string out;
        if (!std::getline(file, out)) broken();
        return out;
    }

    std::vector<std::string> words(const std::string& name, size_t count) {
        std::istringstream in(line());
        std::string word;
        if (!(in >> word) || word != name) broken();
        std::vector<std::string> out;
        while (in >> word) out.push_back(word);
        if (out.size() != count) broken();
        return out;
    }

    template <typename F> void each(const std::string& name, F read) {
        for (int n = std::stoi(words(name, 1)[0]); n > 0; n--) {
            std::istringstream in(line());
            read(in);
        }
    }
};

// --- text: CLIP's byte-pair tokenizer, as sdlite/tokenizer.py

using Text = std::u32string;

inline Text decoded(const std::string& utf8) {
    Text out;
    for (size_t i = 0; i < utf8.size();) {
        const unsigned char first = utf8[i++];
        const int more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : -1;
        uint32_t c = more <= 0 ? first : first & (0x3f >> more);
        for (int k = 0; k < more; k++) {
            if (i == utf8.size() || (utf8[i] & 0xc0) != 0x80) fail("the prompt is not UTF-8");
            c = c << 6 | (utf8[i++] & 0x3f);
        }
        if (more < 0) fail("the prompt is not UTF-8");
        out.push_back(c);
    }
    return out;
}

inline std::string encoded(uint32_t c) {
    if (c < 0x80) return {char(c)};
    if (c < 0x800) return {char(0xc0 | c >> 6), char(0x80 | (c & 0x3f))};
    if (c < 0x10000) return {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 0x3f)), char(0x80 | (c & 0x3f))};
    return {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 0x3f)), char(0x80 | (c >> 6 & 0x3f)), char(0x80 | (c & 0x3f))};
}

inline std::string encoded(const Text& text) {
    std::string out;
    for (const uint32_t c : text) out += encoded(c);
    return out;
}

class Tokenizer {
public:
    explicit Tokenizer(const Device& device) : device(device) {
        uint32_t next = 256;
        for (int b = 0; b < 256; b++) {
            const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
            letters.push_back(encoded(printable ? uint32_t(b) : next++));
        }
    }

    // prompt in UTF-8 -> device.length ids; `dropped` counts the tokens that did not fit
    std::vector<int> operator()(const std::string& prompt, int* dropped = nullptr) const {
        const std::vector<int> all = tokens(decoded(prompt));
        std::vector<int> out{device.bos};
        for (const int id : all)
            if (int(out.size()) < device.length - 1) out.push_back(id);
        if (dropped) *dropped = int(all.size() - out.size()) + 1;
        out.push_back(device.eos);
        out.resize(device.length, device.pad);
        return out;
    }

private:
    const Device& device;
    std::vector<std::string> letters;  // what a byte is called in the vocabulary

    std::vector<int> tokens(const Text& text) const {
        std::vector<int> out;
        split(text, false, out, [&](const Text& given) {
            split(normalized(given), true, out, [&](const Text& plain) { words(plain, out); });
        });
        return out;
    }

    // added tokens to ids, what is between them to `rest`: the leftmost token, and of those the longest
    template <typename F> void split(const Text& text, bool normalized, std::vector<int>& out, F rest) const {
        size_t begin = 0;
        for (size_t i = 0; i < text.size();) {
            const Added* best = nullptr;
            size_t size = 0;
            for (const Added& t : device.added) {
                const Text wanted = decoded(t.text);
                if (t.normalized == normalized && wanted.size() > size && text.compare(i, wanted.size(), wanted) == 0)
                    best = &t, size = wanted.size();
            }
            if (!best) {
                i++;
                continue;
            }
            rest(text.substr(begin, i - begin));
            out.push_back(best->id);
            begin = i += size;
        }
        rest(text.substr(begin));
    }

    Text normalized(const Text& text) const {
        Text out;
        bool space = false;
        for (const uint32_t c : text) {
            if (device.is("compose", c)) fail("the prompt has accents or syllables in parts; give it in Unicode's NFC form");
            const bool now = device.is("space", c);
            const auto small = device.lower.find(c);
            if (now && !space) out.push_back(U' ');
            if (!now && small == device.lower.end()) out.push_back(c);
            if (!now && small != device.lower.end()) out.append(small->second.begin(), small->second.end());
            space = now;
        }
        return out;
    }

    // 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+
    void words(const Text& text, std::vector<int>& out) const {
        const auto letter = [&](size_t i) { return i < text.size() && device.is("letter", text[i]); };
        const auto number = [&](size_t i) { return i < text.size() && device.is("number", text[i]); };
        const auto other = [&](size_t i) { return i < text.size() && !letter(i) && !number(i) && !device.is("space", text[i]); };
        for (size_t i = 0; i < text.size();) {
            size_t end = i + contraction(text, i);
            if (end == i && letter(i)) while (letter(end)) end++;
            else if (end == i && number(i)) end++;
            else if (end == i) while (other(end)) end++;
            if (end > i) word(encoded(text.substr(i, end - i)), out);
            i = end > i ? end : i + 1;
        }
    }

    static size_t contraction(const Text& text, size_t i) {
        for (const Text& c : {Text(U"'s"), Text(U"'t"), Text(U"'re"), Text(U"'ve"), Text(U"'m"), Text(U"'ll"), Text(U"'d")})
            if (text.compare(i, c.size(), c) == 0) return c.size();
        return 0;
    }

    void word(const std::string& utf8, std::vector<int>& out) const {
        std::vector<std::string> parts;
        for (const unsigned char b : utf8) parts.push_back(letters[b]);
        parts.back() += "</w>";
        for (;;) {
            size_t at = parts.size();
            int best = INT32_MAX;
            for (size_t i = 0; i + 1 < parts.size(); i++) {
                const auto found = device.ranks.find(parts[i] + " " + parts[i + 1]);
                if (found != device.ranks.end() && found->second < best) best = found->second, at = i;
            }
            if (at == parts.size()) break;
            parts[at] += parts[at + 1];
            parts.erase(parts.begin() + long(at) + 1);
        }
        for (const std::string& p : parts) {
            const auto found = device.vocab.find(p);
            const int id = found == device.vocab.end() ? device.unk : found->second;
            if (id >= 0) out.push_back(id);
        }
    }
};

// --- noise: torch.randn on the CPU, as sdlite/sampling/noise.py

class Noise {
public:
    explicit Noise(uint64_t seed) : bits(uint32_t(seed)) {}

    std::vector<float> normal(size_t n) {
        if (n < 16) fail("noise of fewer than 16 values");
        std::vector<float> out = uniform(n);
        for (size_t i = 0; i + 16 <= n; i += 16) pairs(&out[i]);
        if (n % 16) {  // torch draws the last sixteen again
            std::vector<float> tail = uniform(16);
            pairs(tail.data());
            std::copy(tail.begin(), tail.end(), out.end() - 16);
        }
        return out;
    }

private:
    std::mt19937 bits;

    std::vector<float> uniform(size_t n) {
        std::vector<float> out(n);
        for (float& u : out) u = float(bits() & 0xffffff) * 0x1p-24f;
        return out;
    }

    static void pairs(float* u) {
        for (int k = 0; k < 8; k++) {
            const float radius = std::sqrt(-2.f * std::log(1.f - u[k])), theta = float(2 * M_PI) * u[k + 8];
            u[k] = radius * std::cos(theta), u[k + 8] = radius * std::sin(theta);
        }
    }
};

// --- the loop

// u + g (c - u), as sdlite/sampling/loop.py
inline std::vector<float> guide(const std::vector<float>& uncond, const std::vector<float>& cond, float scale) {
    std::vector<float> out(cond.size());
    for (size_t k = 0; k < out.size(); k++) out[k] = uncond[k] + scale * (cond[k] - uncond[k]);
    return out;
}

// latents -> what the decoder takes, as Pipeline.decode in sdlite/pipeline.py
inline std::vector<float> unscaled(const Device& device, std::vector<float> latents) {
    for (float& x : latents) x = x / device.scaling + device.shift;
    return latents;
}

// The latents that the decoder takes. encode(ids) -> embeddings; unet(x, time, embeddings) -> its output.
template <typename Encode, typename Unet>
std::vector<float> sample(const Device& device, const std::string& prompt, uint64_t seed, Encode encode, Unet unet) {
    const Tokenizer tokenizer(device);
    int dropped = 0;
    const auto cond = encode(tokenizer(prompt, &dropped));
    if (dropped) fprintf(stderr, "the prompt is %d tokens too long; its end is dropped\n", dropped);
    const bool guided = device.guidance > 1;
    const auto uncond = guided ? encode(tokenizer("")) : cond;
    const size_t n = size_t(device.channels) * device.height * device.width;
    Noise noise(seed);
    std::vector<float> x = noise.normal(n);
    for (float& v : x) v *= device.start;
    for (const Step& s : device.steps) {
        std::vector<float> given = x;
        for (float& v : given) v *= s.scale;
        std::vector<float> out = unet(given, s.time, cond);
        if (guided) out = guide(unet(given, s.time, uncond), out, device.guidance);
        const std::vector<float> z = s.draws ? noise.normal(n) : std::vector<float>(n);
        for (size_t k = 0; k < n; k++) x[k] = s.a * x[k] + s.b * out[k] + s.c * z[k];
    }
    return unscaled(device, x);
}

// image: 3 x height x width, about -1 to 1, as a PPM file
inline void save(const std::string& path, const std::vector<float>& image, int width, int height) {
    FILE* f = fopen(path.c_str(), "wb");
    if (!f) fail("cannot write " + path);
    fprintf(f, "P6 %d %d 255\n", width, height);
    const int plane = width * height;
    for (int p = 0; p < plane; p++)
        for (int k = 0; k < 3; k++) fputc(int(std::lrint(std::fmin(std::fmax(image[k * plane + p] / 2 + 0.5f, 0.f), 1.f) * 255)), f);
    fclose(f);
}

// argv of a sample: DIR PROMPT IMAGE.ppm [SEED]
struct Arguments {
    std::string folder, prompt, image;
    uint64_t seed = 0;

    Arguments(int argc, char** argv) {
        if (argc < 4 || argc > 5) fail("usage: image DIR PROMPT IMAGE.ppm [SEED]");
        folder = argv[1], prompt = argv[2], image = argv[3];
        if (argc == 5) seed = std::stoull(argv[4]);
    }
};

}  // namespace sdlite
