// ncnn.cpp as a library for Android: Sdlite.kt calls it. Paths are plain files: copy assets to filesDir first.

#define main sdlite_main
#include "../ncnn.cpp"
#undef main

#include <jni.h>

// null on success, or what went wrong
extern "C" JNIEXPORT jstring JNICALL Java_sdlite_Sdlite_image(JNIEnv* env, jclass, jstring folder, jstring prompt, jlong seed, jstring out) {
    auto text = [&](jstring s) {  // Java's own UTF-8 writes other bytes for emoji, so: UTF-16
        const jchar* held = env->GetStringChars(s, nullptr);
        std::string out;
        for (jsize i = 0, n = env->GetStringLength(s); i < n; i++) {
            uint32_t c = held[i];
            if (c >> 10 == 0x36 && i + 1 < n) c = 0x10000 + ((c & 0x3ff) << 10 | (held[++i] & 0x3ff));
            out += sdlite::encoded(c);
        }
        env->ReleaseStringChars(s, held);
        return out;
    };
    try {
        make_image(text(folder), text(prompt), uint64_t(seed), text(out));
        return nullptr;
    } catch (const std::exception& e) {
        return env->NewStringUTF(e.what());
    }
}
