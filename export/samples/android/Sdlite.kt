package sdlite

import android.graphics.Bitmap
import android.graphics.Color
import java.io.DataInputStream
import java.io.File

/** An image from a folder that `sdlite export MODEL --target ncnn-fp16` made. Call it off the main thread. */
object Sdlite {
    init { System.loadLibrary("sdlite") }

    @JvmStatic private external fun image(folder: String, prompt: String, seed: Long, out: String): String?

    /** folder: the export, copied to filesDir. The seed gives the image that Python gives. */
    fun generate(folder: File, prompt: String, seed: Long, cache: File): Bitmap {
        val out = File(cache, "image.ppm")
        image(folder.path, prompt, seed, out.path)?.let { throw IllegalStateException(it) }
        DataInputStream(out.inputStream().buffered()).use { ppm ->
            val (_, width, height, _) = generateSequence { ppm.read().toChar() }.takeWhile { it != '\n' }.joinToString("").split(" ")
            val pixels = IntArray(width.toInt() * height.toInt()) {
                Color.rgb(ppm.readUnsignedByte(), ppm.readUnsignedByte(), ppm.readUnsignedByte())
            }
            return Bitmap.createBitmap(pixels, width.toInt(), height.toInt(), Bitmap.Config.ARGB_8888)
        }
    }
}
