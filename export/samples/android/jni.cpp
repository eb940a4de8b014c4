// ncnn.cpp as a library for Android: Sdlite.kt calls it. Paths are plain files: copy assets to filesDir first.

#define main sdlite_main
#include "../ncnn.cpp"
#undef main

#include <jni.h>

// null on success, or what went wrong
extern "C" JNIEXPORT jstring JNICALL Java_sdlite_Sdlite_picture(JNIEnv* env, jclass, jstring folder, jstring inputs, jstring out) {
    auto text = [&](jstring s) {
        const char* held = env->GetStringUTFChars(s, nullptr);
        std::string copy = held;
        env->ReleaseStringUTFChars(s, held);
        return copy;
    };
    try {
        picture(text(folder), text(inputs), text(out));
        return nullptr;
    } catch (const std::exception& e) {
        return env->NewStringUTF(e.what());
    }
}
